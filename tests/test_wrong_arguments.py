"""Every argument of every public call, given every wrong kind of value: one sentence, naming it."""

import inspect
import sys

import numpy as np
import pytest
import torch
from torch.masked import as_masked_tensor

import attnvariants
from attnvariants import attention, get_variant, list_variants, recurrent
from attnvariants.api import iter_weights
from attnvariants.diagnostics import attention_metrics
from attnvariants.diagnostics.metrics import AttentionSums

Q = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
P = Q[0].transpose(0, 1)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
HEADS = {"query": Q, "key": Q, "value": Q}
FLASH = {"q": Q, "k": Q, "v": Q}
PACKED = {"cu_seqlens_q": CU, "cu_seqlens_k": CU}
STATE = recurrent.prefill(Q, Q, Q, max_len=50)[1]

CALLS = {
    "attention": (attnvariants.attention, HEADS),
    "explain": (attnvariants.explain, HEADS),
    "iter_weights": (iter_weights, {"query": Q, "key": Q}),
    "attention_varlen": (
        attnvariants.attention_varlen,
        {"query": P, "key": P, "value": P, **PACKED},
    ),
    "sdpa": (attnvariants.scaled_dot_product_attention, HEADS),
    "flash_attn_func": (attnvariants.flash_attn_func, FLASH),
    "flash_attn_varlen_func": (
        attnvariants.flash_attn_varlen_func,
        {"q": P, "k": P, "v": P, **PACKED},
    ),
    "prefill": (recurrent.prefill, {**HEADS, "max_len": 50}),
    "step": (recurrent.step, {**HEADS, "state": STATE}),
    "attention_metrics": (attention_metrics, {"query": Q, "key": Q}),
}
# what `explain` takes by any name
MORE = {"explain": [*attnvariants.registry.CALL_ARGUMENTS, "cu_seqlens_q", "max_seqlen_q"]}

WRONG = {
    "string": "yes",
    "bytes": b"1",
    "object": object(),
    "class": dict,
    "dict": {"a": 1},
    "list of strings": ["a", "b"],
    "pair of floats": (1.5, 2.5),
    "triple": (1, 2, 3),
    "nan": float("nan"),
    "complex": 1j,
    "minus seven": -7,
    "numpy nan": np.float32("nan"),
    "numpy array": np.ones((2, 4, 6, 8), dtype=np.float32),
    "numpy strings": np.array(["a", "b"]),
    "function": len,
    "learned number": torch.nn.Parameter(torch.tensor(0.5)),
    "int tensor": torch.ones(2, 4, 6, 8, dtype=torch.int64),
    "complex tensor": torch.ones(2, 4, 6, 8, dtype=torch.complex64),
    "float8 tensor": torch.ones(2, 4, 6, 8).to(torch.float8_e4m3fn),
    "large tensor": torch.ones(3, 5, 7, 11, 13),
    "empty tensor": torch.ones(0),
    "sparse": torch.eye(6).to_sparse(),
    "csr": torch.eye(6).to_sparse_csr(),
    "nested": torch.nested.nested_tensor([torch.ones(4, 8), torch.ones(2, 8)]),
    "jagged": torch.nested.nested_tensor([torch.ones(4, 8), torch.ones(2, 8)], layout=torch.jagged),
    "quantized": torch.quantize_per_tensor(torch.ones(6, 6), 0.1, 0, torch.quint8),
    "masked": as_masked_tensor(torch.ones(6, 6), torch.ones(6, 6).bool()),
    # the real one needs processes
    "sharded": torch.ones(2, 4, 6, 8).as_subclass(type("DTensor", (torch.Tensor,), {})),
    "meta": torch.ones(2, 4, 6, 8, device="meta"),
    "meta scalar": torch.ones((), device="meta"),
    "bool tensors": torch.ones(2, 4, 6, 8, dtype=torch.bool),
}


def arguments(case):
    function, _ = CALLS[case]
    names = [
        n for n, p in inspect.signature(function).parameters.items() if p.kind != p.VAR_KEYWORD
    ]
    return [*names, *(n for n in MORE.get(case, ()) if n not in names)]


# values that an argument may have after all
RIGHT = {
    "scale": {"minus seven"},
    "softmax_scale": {"minus seven"},
    "attn_mask": {"learned number"},
    "bias": {"learned number"},
}
EVERY = [(case, name) for case in CALLS for name in arguments(case)]


def faults(call, name, right=()):
    """What each wrong value came to, if not to a sentence that holds the name."""
    found = []
    for kind, value in WRONG.items():
        try:
            call(value)
        except ValueError as error:
            if name not in str(error) or not str(error).endswith("."):
                found.append(f"{kind}: {error}")
        except Exception as error:
            found.append(f"{kind}: {type(error).__name__}: {error}")
        else:
            if kind not in right:
                found.append(f"{kind}: was accepted")
    return "\n".join(found)


@pytest.mark.parametrize(("case", "name"), EVERY)
def test_a_wrong_argument_is_a_sentence_that_names_it(case, name):
    function, given = CALLS[case]
    right = RIGHT.get(name, set())
    if name == "softcap" and case.startswith("flash"):
        # off, as it is in flash-attn
        right = {"minus seven"}
    found = faults(lambda value: function(**{**given, name: value}), name, right)
    assert not found, found


OPTIONS = [(name, option) for name in list_variants() for option in get_variant(name).options]


@pytest.mark.parametrize(("variant", "option"), OPTIONS)
def test_a_wrong_option_is_a_sentence_that_names_it(variant, option):
    number = get_variant(variant).options[option]
    right = {"learned number"} if number.learned else set()
    if number.number and number.minimum is None and number.above is None:
        right.add("minus seven")
    found = faults(lambda value: attention(Q, Q, Q, variant, **{option: value}), option, right)
    assert not found, found


@pytest.mark.parametrize("name", ["sink_threshold", "blocks' query_mask"])
def test_wrong_arguments_of_sums_are_sentences(name):
    if name == "sink_threshold":
        assert not faults(AttentionSums, name)
    else:
        call = lambda mask: AttentionSums().add((), (2, 4, 6), query_mask=mask)  # noqa: E731
        assert not faults(call, "query_mask")


NUMBERS = "scale", "softcap", "dropout_p", "position"


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("yes", [True, np.True_, torch.tensor(True)])
def test_a_bool_is_no_number(name, yes):
    with pytest.raises(ValueError, match=name):
        attention(Q, Q, Q, **{name: yes})


@pytest.mark.parametrize("window", [(True, False), (1.0, 0.0), (1,), (-2, 0), "ab", (1, None, 2)])
def test_a_bad_window_is_a_sentence(window):
    with pytest.raises(ValueError, match="window_size must"):
        attention(Q, Q, Q, window_size=window)


@pytest.mark.parametrize("variant", list_variants())
def test_an_integer_beyond_64_bits_is_a_sentence(variant):
    numeric = [name for name, option in get_variant(variant).options.items() if option.number]
    for name in (*NUMBERS, *numeric):
        for huge in (2**70, 10**400):
            with pytest.raises(ValueError, match=f"{name} must .*beyond 64 bits"):
                attention(Q, Q, Q, variant, **{name: huge})
    with pytest.raises(ValueError, match="window_size must be two integers"):
        attention(Q, Q, Q, variant, window_size=(2**63, 0))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("variant", list_variants())
def test_the_largest_window_is_unlimited(variant, impl):
    widest = sys.maxsize
    for window, same in (((widest, widest), (-1, -1)), ((widest - 1, 0), (-1, 0)),
                         ((0, widest), (0, -1))):  # fmt: skip
        one, other = (attention(Q, Q, Q, variant, impl=impl, window_size=size)
                      for size in (window, same))  # fmt: skip
        assert torch.equal(one, other)


def mask(*sizes):
    return torch.ones(sizes, dtype=torch.bool)


HINTS = {
    "batch, q, kv": (mask(2, 6, 7), r"attn_mask.*\[2, 6, 7\].*mask\[:, None\]"),
    "batch, 1, kv": (mask(2, 1, 7), r"mask\[:, None\]"),
    "heads, q, kv of others": (mask(3, 6, 7), r"must broadcast to .* got shape \[3, 6, 7\]\.$"),
    "padding": (mask(2, 7), r"mask\[:, None, None, :\]"),
    "padding of numbers": (mask(2, 7).long(), r"mask\[:, None, None, :\]"),
    "batch times heads": (mask(8, 6, 7), r"attn_mask\.unflatten\(0, \(2, 4\)\)"),
    "swapped": (mask(7, 6), r"if they are swapped, pass attn_mask\.mT"),
    "too long": (mask(6, 9), "There are 7 keys: if those behind them are empty, cut attn_mask"),
    "another layout": (mask(4, 4), r"flash-attn's \[batch, tokens, heads, head_dim\]"),
    "numbers": (mask(6, 7).int(), r"got torch.int32; convert it: \.bool\(\) shows all but"),
    "five dimensions": (mask(1, 2, 4, 6, 7), r"must broadcast to \[batch, heads, q_len, kv_len\]"),
}


@pytest.mark.parametrize("case", HINTS)
def test_a_mask_of_another_kind_is_told_what_to_do(case):
    given, message = HINTS[case]
    keys = torch.randn(2, 4, 7, 8)
    with pytest.raises(ValueError, match=message):
        attention(Q, keys, keys, attn_mask=given)


def test_a_mask_a_head_is_a_mask():
    assert attention(Q, Q, Q, attn_mask=mask(4, 6, 6)).shape == Q.shape


def test_another_layout_is_told_what_to_do():
    q, k = torch.randn(2, 16, 4, 8), torch.randn(2, 10, 2, 8)
    with pytest.raises(ValueError, match=r"key has 10 heads.*\.transpose\(1, 2\), or call flash"):
        attention(q, k, k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    with pytest.raises(ValueError, match=r"k has 10 heads.*\.transpose\(1, 2\), or call attention"):
        attnvariants.flash_attn_func(q, k, k)
    with pytest.raises(ValueError, match=r"key has 10 heads.*\.transpose\(0, 1\)"):
        attnvariants.attention_varlen(q[0], k[0], k[0], CU, CU)


def test_a_number_to_be_learned_is_told_what_to_do():
    learned = torch.nn.Parameter(torch.tensor(5.0))
    with pytest.raises(ValueError, match="softcap itself is not learned"):
        attention(Q, Q, Q, softcap=learned)
    with pytest.raises(ValueError, match="multiply query by it"):
        attention(Q, Q, Q, scale=learned)
    with pytest.raises(ValueError, match=r"softmax_scale.*multiply q by it"):
        attnvariants.flash_attn_func(Q, Q, Q, softmax_scale=learned)
