"""Things that must be equal, over drawn shapes (hypothesis)."""

import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from hypothesis import given, settings

import attnvariants
from attnvariants import (
    attention,
    attention_varlen,
    flash_attn_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
)

VARIANTS = st.sampled_from(attnvariants.list_variants())
ENGINE = st.sampled_from(["reference", "chunked"])
SEED = st.integers(0, 10**6)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(seed, batch, heads, kv_heads, q_len, kv_len, dim, value_dim=None):
    return (
        normal(seed, batch, heads, q_len, dim),
        normal(seed + 1, batch, kv_heads, kv_len, dim),
        normal(seed + 2, batch, kv_heads, kv_len, value_dim or dim),
    )


def fixed(name):
    """Options under which prefill and decoding mean the same."""
    return {"max_len": 64} if name == "cosformer" else {}


@settings(deadline=None, max_examples=60)
@given(
    VARIANTS, SEED, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40),
    st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(-1, 9), st.integers(-1, 9),
    st.floats(0, 0.9), st.integers(1, 7),
)  # fmt: skip
def test_chunked_is_the_reference(
    name, seed, batch, kv_heads, group, q_len, kv_len, dim, causal, left, right, hidden, rows
):
    q, k, v = qkv(seed, batch, kv_heads * group, kv_heads, q_len, kv_len, dim, 3)
    mask = torch.rand(batch, 1, q_len, kv_len, generator=torch.Generator().manual_seed(seed))
    call = {"causal": causal, "window_size": (left, right), "attn_mask": mask >= hidden}
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attnvariants.blocks, "_BLOCK_ROWS", rows * group)
        patch.setattr(attnvariants.blocks, "_THREAD_SCORES", 1 << rows)
        for impl in ("reference", "chunked"):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out, w, stats = attention(
                *leaves, name, impl=impl, return_weights=True, return_stats=True, **call
            )
            results.append([out, w, *stats, *torch.autograd.grad(out.sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(VARIANTS, ENGINE, SEED, st.integers(1, 3), st.integers(1, 4), st.integers(1, 12))
def test_gqa_is_repeated_heads(name, impl, seed, kv_heads, group, length):
    q, k, v = qkv(seed, 2, kv_heads * group, kv_heads, length, length, 4)
    full = (repeat(t, "b h n d -> b (h g) n d", g=group) for t in (k, v))
    torch.testing.assert_close(
        attention(q, k, v, name, causal=True, impl=impl),
        attention(q, *full, name, causal=True, impl=impl),
        **EXACT,
    )


@settings(deadline=None, max_examples=40)
@given(VARIANTS, ENGINE, SEED, st.integers(1, 12), st.data())
def test_cached_decoding_is_prefill(name, impl, seed, length, data):
    q, k, v = qkv(seed, 1, 2, 2, length, length, 4)
    step = data.draw(st.integers(1, length))
    call = {"causal": True, "impl": impl, **fixed(name)}
    want = attention(q, k, v, name, **call)
    got = [
        attention(q[:, :, i : i + step], k[:, :, : i + step], v[:, :, : i + step], name, **call)
        for i in range(0, length, step)
    ]
    torch.testing.assert_close(torch.cat(got, 2), want, **EXACT)


@settings(deadline=None, max_examples=40)
@given(VARIANTS, ENGINE, SEED, st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans())
def test_packed_is_separate(name, impl, seed, lengths, causal):
    total = sum(lengths)
    q, k, v = (normal(seed + i, total, 2, 4).requires_grad_() for i in range(3))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    out = attention_varlen(
        q, k, v, bounds, bounds, max(lengths), max(lengths), name, causal=causal, impl=impl
    )
    assert out.shape == (total, 2, 4)
    for start, stop in pairwise(bounds.tolist()):
        parts = (rearrange(t[start:stop], "n h d -> 1 h n d") for t in (q, k, v))
        want = attention(*parts, name, causal=causal, impl=impl)
        torch.testing.assert_close(out[start:stop], rearrange(want, "1 h n d -> n h d"), **EXACT)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.shape == q.shape for grad in grads)


@settings(deadline=None, max_examples=40)
@given(VARIANTS, ENGINE, SEED, st.integers(1, 12), st.booleans())
def test_a_wide_window_is_none(name, impl, seed, length, causal):
    q, k, v = qkv(seed, 1, 2, 2, length, length, 4)
    torch.testing.assert_close(
        attention(q, k, v, name, causal=causal, window_size=(length, length), impl=impl),
        attention(q, k, v, name, causal=causal, impl=impl),
        **EXACT,
    )


@settings(deadline=None, max_examples=40)
@given(VARIANTS.filter(lambda name: name != "cosformer"), ENGINE, SEED, st.integers(1, 12))
def test_keys_have_no_order_without_a_mask(name, impl, seed, length):
    q, k, v = qkv(seed, 1, 2, 2, length, length, 4)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        attention(q, k[:, :, order], v[:, :, order], name, impl=impl),
        attention(q, k, v, name, impl=impl),
        **EXACT,
    )


@settings(deadline=None, max_examples=40)
@given(VARIANTS, ENGINE, SEED, st.integers(1, 10), st.integers(0, 6), st.booleans())
def test_padding_is_absence(name, impl, seed, length, padding, left):
    q, k, v = qkv(seed, 1, 2, 2, length, length, 4)
    call = {"causal": True, "impl": impl, **fixed(name)}
    want = attention(q, k, v, name, **call)
    amounts = (0, 0, padding, 0) if left else (0, 0, 0, padding)
    padded = [F.pad(t, amounts, value=3.0) for t in (q, k, v)]
    keep = F.pad(torch.ones(1, 1, 1, length, dtype=torch.bool), amounts[2:], value=False)
    got = attention(*padded, name, attn_mask=keep, **call)
    real = slice(padding, None) if left else slice(0, length)
    torch.testing.assert_close(got[:, :, real], want, **EXACT)


@settings(deadline=None, max_examples=30)
@given(VARIANTS, ENGINE, SEED, st.integers(2, 12))
def test_the_future_changes_nothing(name, impl, seed, length):
    q, k, v = qkv(seed, 1, 2, 2, length, length, 4)
    call = {"causal": True, "impl": impl}
    before = attention(q, k, v, name, **call)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, -1], v2[:, :, -1] = 7.0, -7.0
    after = attention(q, k2, v2, name, **call)
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])


@settings(deadline=None, max_examples=30)
@given(VARIANTS, SEED, st.integers(1, 12))
def test_weights_give_the_output_and_keep_their_promises(name, seed, length):
    q, k, v = qkv(seed, 1, 2, 2, length, length, 4)
    out, w = attention(q, k, v, name, causal=True, return_weights=True)
    torch.testing.assert_close(w @ v, out, **EXACT)
    variant = attnvariants.get_variant(name)
    mass = w.sum(-1)
    if variant.nonnegative:
        assert (w >= -1e-12).all()
    if variant.row_sum == "one":
        torch.testing.assert_close(mass, torch.ones_like(mass), **EXACT)
    if variant.row_sum == "at most one":
        assert (mass <= 1 + 1e-9).all()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("sizes", [(5, 5), (3, 7), (7, 3), (1, 6)])
@pytest.mark.parametrize("mode", ["plain", "causal", "bool", "float", "gqa", "scale"])
def test_sdpa_drop_in(mode, sizes, impl):
    q, k, v = qkv(0, 2, 4, 2 if mode == "gqa" else 4, *sizes, 8)
    call = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": normal(3, 2, 1, *sizes) > 0},
        "float": {"attn_mask": normal(3, *sizes)},
        "gqa": {"enable_gqa": True},
        "scale": {"scale": 0.3},
    }.get(mode, {})
    want = F.scaled_dot_product_attention(q, k, v, **call)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, impl=impl, **call), want)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 4, 5, 8)])
def test_sdpa_drop_in_of_any_rank(shape):
    q, k, v = (normal(i, *shape) for i in range(3))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=True), want)
    mask = normal(4, *shape[:-1], 5) > -1
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, attn_mask=mask), want)


def test_sdpa_drop_in_broadcasts():
    q, k, v = normal(0, 2, 4, 5, 8), normal(1, 1, 4, 6, 8), normal(2, 2, 1, 6, 8)
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), want)


def test_flash_attn_drop_in_with_dropout():
    q, k, v = (normal(i, 1, 9, 2, 4) for i in range(3))
    keywords = {"causal": True, "window_size": (2, 0)}
    _, lse, signed = flash_attn_func(
        q, k, v, 0.5, return_attn_probs=True, generator=torch.Generator().manual_seed(0), **keywords
    )
    out = flash_attn_func(q, k, v, 0.5, generator=torch.Generator().manual_seed(0), **keywords)
    assert (signed < 0).any()
    kept = rearrange(signed.clamp(min=0) / 0.5 @ rearrange(v, "b n h d -> b h n d"),
                     "b h n d -> b n h d")  # fmt: skip
    torch.testing.assert_close(kept, out)
    assert torch.isfinite(lse).all()
    _, lse, _ = flash_attn_func(q, k[:, :4], v[:, :4], causal=True, return_attn_probs=True)
    assert (lse[:, :, :5] == torch.inf).all()


def test_flash_attn_drop_in():
    q, k, v = qkv(0, 2, 4, 2, 5, 7, 8)
    slopes = normal(3, 4).abs()
    swapped = [rearrange(t, "b h n d -> b n h d") for t in (q, k, v)]
    call = {"causal": True, "window_size": (4, -1), "softcap": 3.0, "alibi_slopes": slopes}
    out, lse, probs = flash_attn_func(
        *swapped, softmax_scale=0.3, return_attn_probs=True, variant="softpick", **call
    )
    want, stats = attention(q, k, v, "softpick", scale=0.3, return_stats=True, **call)
    torch.testing.assert_close(out, rearrange(want, "b h n d -> b n h d"))
    torch.testing.assert_close(lse, stats.lse.float())
    assert probs is None

    packed = [rearrange(t, "b n h d -> (b n) h d") for t in swapped]
    bounds = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 7, 14])
    got, lse_packed, _ = flash_attn_varlen_func(
        *packed, *bounds, 5, 7, softmax_scale=0.3, return_attn_probs=True, variant="softpick",
        **call,
    )  # fmt: skip
    torch.testing.assert_close(got, rearrange(out, "b n h d -> (b n) h d"))
    torch.testing.assert_close(lse_packed, rearrange(lse, "b h n -> h (b n)"))


def test_lse_is_softmax_normaliser():
    q, k, v = qkv(0, 1, 2, 2, 6, 6, 8)
    _, stats = attention(q, k, v, return_stats=True)
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    torch.testing.assert_close(stats.lse, scores.logsumexp(-1))
    torch.testing.assert_close(stats.largest, scores.softmax(-1).amax(-1))
