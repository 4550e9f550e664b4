"""Drop-ins take what the originals take, in every form in which that may come."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attnvariants
from attnvariants import attention, flash_attn_func, flash_attn_varlen_func, get_variant
from attnvariants.api import iter_weights
from attnvariants.recurrent import prefill

Q = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
P = Q[0].transpose(0, 1)
CU = torch.tensor([0, 4, 9], dtype=torch.int32)


def forms(number):
    """One number as Python, numpy and torch have it."""
    kinds = (np.int32, np.int64) if isinstance(number, int) else (np.float16, np.float32, Fraction)
    dtype = torch.int32 if isinstance(number, int) else torch.float32
    arrays = np.array(number), torch.tensor(number, dtype=dtype), torch.tensor([number])
    return [number, *(kind(number) for kind in kinds), *arrays]


NUMBERS = {
    "scale": (0.5, lambda x: attention(Q, Q, Q, scale=x)),
    "softcap": (2.5, lambda x: attention(Q, Q, Q, "softpick", softcap=x)),
    "window": (3, lambda x: attention(Q, Q, Q, window_size=(x, x))),
    "position": (1, lambda x: attention(Q, Q, Q, "cosformer", max_len=20, position=x)),
    "option": (0.5, lambda x: attention(Q, Q, Q, "softpick", eps=x)),
    "learned option": (0.5, lambda x: attention(Q, Q, Q, "ssmax", s=x)),
    "whole option": (20, lambda x: attention(Q, Q, Q, "cosformer", max_len=x)),
    "softmax_scale": (0.5, lambda x: flash_attn_func(Q, Q, Q, softmax_scale=x)),
    "max_seqlen": (5, lambda x: flash_attn_varlen_func(P, P, P, CU, CU, x, x)),
    "sdpa's scale": (0.5, lambda x: attnvariants.scaled_dot_product_attention(Q, Q, Q, scale=x)),
    "weights' scale": (0.5, lambda x: [b.weights for b in iter_weights(Q, Q, scale=x)]),
    "max_len": (20, lambda x: prefill(Q, Q, Q, max_len=x)[0]),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_may_come_in_any_form(case):
    number, call = NUMBERS[case]
    given = forms(number)
    if case == "position":
        # a scalar there may be one that cannot be read
        given = given[:-1]
    want = call(number)
    for form in given:
        torch.testing.assert_close(call(form), want, msg=lambda m, f=form: f"{f!r}: {m}")


@pytest.mark.parametrize("p", [0.5, np.float32(0.5), torch.tensor(0.5)])
def test_dropout_p_may_come_in_any_form(p):
    def call(p):
        torch.manual_seed(1)
        out, _, signed = flash_attn_func(Q, Q, Q, dropout_p=p, return_attn_probs=True)
        return out, signed, flash_attn_varlen_func(P, P, P, CU, CU, dropout_p=p)

    torch.testing.assert_close(call(p), call(0.5))


@pytest.mark.parametrize("yes", [True, np.True_, 1, np.int64(1), torch.tensor(True)])
def test_a_flag_may_come_in_any_form(yes):
    want = attention(Q, Q, Q, causal=True, return_weights=True)
    torch.testing.assert_close(attention(Q, Q, Q, causal=yes, return_weights=yes), want)
    assert torch.equal(flash_attn_func(Q, Q, Q, causal=yes), flash_attn_func(Q, Q, Q, causal=True))
    sdpa = attnvariants.scaled_dot_product_attention
    got = sdpa(Q, Q[:, :2], Q[:, :2], is_causal=yes, enable_gqa=yes)
    torch.testing.assert_close(got, sdpa(Q, Q[:, :2], Q[:, :2], is_causal=True, enable_gqa=True))


WINDOWS = {
    "tuple": (3, 1),
    "list": [3, 1],
    "tensor": torch.tensor([3, 1]),
    "int32 tensor": torch.tensor([3, 1], dtype=torch.int32),
    "array": np.array([3, 1]),
    "numpy numbers": (np.int64(3), np.int32(1)),
    "tensors": (torch.tensor(3), torch.tensor(1)),
    "size": torch.Size([3, 1]),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_may_come_in_any_form(case):
    want = attention(Q, Q, Q, window_size=(3, 1))
    torch.testing.assert_close(attention(Q, Q, Q, window_size=WINDOWS[case]), want)
    assert not torch.allclose(want, attention(Q, Q, Q))


@pytest.mark.parametrize("window", [(-1, -1), (None, None), [None, -1], torch.tensor([-1, -1])])
def test_an_unlimited_window_limits_nothing(window):
    assert torch.equal(attention(Q, Q, Q, window_size=window), attention(Q, Q, Q))


@pytest.mark.parametrize("off", [None, 0, 0.0, -1.0, np.float32(-2)])
def test_a_softcap_of_flash_attn_that_is_not_positive_is_off(off):
    assert torch.equal(flash_attn_func(Q, Q, Q, softcap=off), flash_attn_func(Q, Q, Q))
    got = flash_attn_varlen_func(P, P, P, CU, CU, softcap=off)
    assert torch.equal(got, flash_attn_varlen_func(P, P, P, CU, CU))


def random(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(len(sizes) + sizes[0]))


SDPA = {
    "2-D": ((5, 8), (7, 8), {}),
    "3-D": ((3, 5, 8), (3, 7, 8), {}),
    "3-D, causal": ((3, 5, 8), (3, 7, 8), {"is_causal": True}),
    "3-D, a mask each": ((3, 5, 8), (3, 7, 8), {"attn_mask": random(3, 5, 7) > -0.5}),
    "4-D, a mask a batch": ((3, 2, 5, 8), (3, 2, 7, 8), {"attn_mask": random(3, 1, 5, 7)}),
    "5-D": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), {"is_causal": True}),
    "5-D, a mask": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), {"attn_mask": random(3, 1, 5, 7)}),
    "broadcast batch": ((1, 2, 5, 8), (3, 2, 7, 8), {}),
    "broadcast heads": ((3, 2, 5, 8), (3, 1, 7, 8), {}),
    "more dimensions in keys": ((2, 5, 8), (3, 2, 7, 8), {}),
    "groups": ((3, 4, 5, 8), (3, 2, 7, 8), {"enable_gqa": True}),
    "groups in 3-D": ((4, 5, 8), (2, 7, 8), {"enable_gqa": True}),
    "groups in 5-D": ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), {"enable_gqa": True}),
    "more queries than keys, causal": ((3, 2, 9, 8), (3, 2, 7, 8), {"is_causal": True}),
    "no batch": ((0, 2, 5, 8), (0, 2, 7, 8), {}),
    "scale": ((3, 2, 5, 8), (3, 2, 7, 8), {"scale": 0.1}),
}


@pytest.mark.parametrize("impl", ["auto", "chunked"])
@pytest.mark.parametrize("case", SDPA)
def test_sdpa_takes_the_shapes_that_torch_takes(case, impl):
    of_query, of_keys, call = SDPA[case]
    q, k, v = random(*of_query), random(*of_keys), random(*of_keys[:-1], 6)
    want = F.scaled_dot_product_attention(q, k, v, **call)
    got = attnvariants.scaled_dot_product_attention(q, k, v, impl=impl, **call)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)


def paged(page=4):
    """Keys of three sequences, flat and in a pool with garbage in what is not used."""
    lengths = 9, 0, 5
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    flat = random(14, 2, 8), random(14, 2, 6)
    table = torch.tensor([[5, 0, 3], [-1, 99, 7], [1, 4, -7]], dtype=torch.int32)
    pools = [torch.full((6, page, *t.shape[1:]), torch.nan) for t in flat]
    for sequence, length in enumerate(lengths):
        for token in range(length):
            for pool, rows in zip(pools, flat, strict=True):
                page_of = table[sequence, token // page]
                pool[page_of, token % page] = rows[bounds[sequence] + token]
    return random(7, 4, 8), flat, pools, bounds, table


QUERIES = torch.tensor([0, 2, 4, 7], dtype=torch.int32)


@pytest.mark.parametrize("name", ["softmax", "relu"])
def test_keys_in_pages_are_the_keys(name):
    q, flat, pools, bounds, table = paged()
    call = {"causal": True, "window_size": torch.tensor([6, 0]), "variant": name}
    leaves = [q.requires_grad_(), *(pool.requires_grad_() for pool in pools)]
    want = flash_attn_varlen_func(q, *flat, QUERIES, bounds, 3, 9, **call)
    got = flash_attn_varlen_func(*leaves, QUERIES, bounds, 3, 9, block_table=table, **call)
    assert torch.equal(got, want)
    for grad, leaf in zip(torch.autograd.grad(got.sum(), leaves), leaves, strict=True):
        assert grad.isfinite().all()
        assert grad.shape == leaf.shape
    used = bounds.diff()
    alone = flash_attn_varlen_func(
        q, *pools, QUERIES, None, 3, 9, block_table=table.long(), seqused_k=used, **call
    )
    assert torch.equal(alone, want)


@pytest.mark.parametrize("in_pages", [False, True])
def test_only_the_used_keys_count(in_pages):
    q, flat, pools, bounds, table = paged()
    used, skipped = torch.tensor([7, 0, 5]), torch.tensor([2, 0, 5], dtype=torch.int32)
    keep = [rows[torch.tensor([2, 3, 4, 5, 6])] for rows in flat]
    cut = torch.tensor([0, 5, 5, 5], dtype=torch.int32)
    want = flash_attn_varlen_func(q, *keep, QUERIES, cut, causal=True)
    keys = {"block_table": table} if in_pages else {}
    got = flash_attn_varlen_func(
        q, *(pools if in_pages else flat), QUERIES, bounds, causal=True,
        seqused_k=used, leftpad_k=skipped, **keys,
    )  # fmt: skip
    assert torch.equal(got, want)


BAD_PAGES = {
    "outside": ({"block_table": [[5, 0, 6], [0] * 3, [1] * 3]}, r"pages 0 \.\. 5 .* got 6"),
    "negative": ({"block_table": [[5, 0, -1], [0] * 3, [1] * 3]}, r"pages 0 \.\. 5 .* got -1"),
    "short": ({"block_table": [[5, 0], [0, 0], [1, 2]]}, "2 pages of 4 keys.*a sequence has 9"),
    "float": ({"block_table": [[0.5] * 3] * 3}, "block_table must be an int32 or int64 tensor"),
    "rank": ({"block_table": [0, 1, 2]}, r"shape \[sequences, blocks\] for 3 sequences, got \[3\]"),
    "rows": ({"block_table": [[0, 1, 2]] * 2}, r"for 3 sequences, got \[2, 3\]"),
    "used": ({"seqused_k": [1, 2]}, r"seqused_k must have shape \[sequences\] for 3"),
    "used negative": ({"seqused_k": [-1, 0, 2]}, "seqused_k must not be negative"),
    "padding": ({"leftpad_k": [10, 0, 2]}, "leftpad_k must not exceed the numbers of keys"),
    "no bounds": ({"cu_seqlens_k": None}, "cu_seqlens_k must be a tensor"),
}


@pytest.mark.parametrize("case", BAD_PAGES)
def test_a_bad_block_table_is_a_sentence(case):
    changes, message = BAD_PAGES[case]
    q, _, pools, bounds, table = paged()
    given = {k: v if v is None else torch.tensor(v) for k, v in changes.items()}
    call = {"cu_seqlens_k": bounds, "block_table": table, **given}
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, *pools, QUERIES, **call)


def test_bad_pools_and_lengths_are_sentences():
    q, flat, pools, bounds, table = paged()
    with pytest.raises(ValueError, match=r"k must be a pool \[pages, page_size"):
        flash_attn_varlen_func(q, *flat, QUERIES, bounds, block_table=table)
    with pytest.raises(ValueError, match="as many pages of one size"):
        flash_attn_varlen_func(q, pools[0], pools[1][1:], QUERIES, bounds, block_table=table)
    with pytest.raises(ValueError, match="seqused_k must not exceed the sequences' lengths"):
        flash_attn_varlen_func(q, *flat, QUERIES, bounds, seqused_k=torch.tensor([9, 1, 5]))
    with pytest.raises(ValueError, match="max_seqlen_k is 8, but a sequence has 9 tokens"):
        flash_attn_varlen_func(q, *pools, QUERIES, bounds, 3, 8, block_table=table)


LACKING = {
    "later": (lambda: flash_attn_func(Q, Q, Q, num_splits=2), "leave it out, it changes no result"),
    "sinks": (lambda: flash_attn_func(Q, Q, Q, s_aux=Q[0, 0]), "its sinks are not computed"),
    "scale": (lambda: flash_attn_func(Q, Q, Q, scale=2.0), "did you mean 'softmax_scale'"),
    "mask": (lambda: flash_attn_func(Q, Q, Q, attn_mask=None), r"got 'attn_mask' \(attention has"),
    "causal": (
        lambda: attnvariants.scaled_dot_product_attention(Q, Q, Q, causal=True),
        "did you mean 'is_causal'",
    ),
    "weights": (lambda: iter_weights(Q, Q, dropout_p=0.5), "attention has a dropout_p, this"),
    "both": (lambda: attnvariants.explain(Q, Q, Q, cu_seqlens_q=CU), "pass both"),
}


@pytest.mark.parametrize("case", LACKING)
def test_what_a_function_lacks_is_refused_by_name(case):
    call, message = LACKING[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_private_names_are_no_variants():
    for name in ("__class__", "__dict__", "_shared", ""):
        with pytest.raises(ValueError, match="unknown variant"):
            get_variant(name)


def test_a_fraction_is_the_number_it_is():
    assert torch.equal(attention(Q, Q, Q, scale=Fraction(1, 4)), attention(Q, Q, Q, scale=0.25))
    assert math.isclose(get_variant("ssmax").resolve({"s": Fraction(1, 3)})["s"], 1 / 3)
