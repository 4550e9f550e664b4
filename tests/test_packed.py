"""Packed sequences in one launch of the kernels, which plain torch stands in for."""

from itertools import pairwise

import plain_streaming
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnvariants
from attnvariants import attention_varlen, get_variant


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    plain_streaming.install(monkeypatch)


LENGTHS = (3, 5), (0, 2), (7, 7), (4, 1), (2, 0)


def packed(heads=4, kv_heads=2, dim=8):
    cu = [torch.tensor([0, *(n[i] for n in LENGTHS)]).cumsum(0).to(torch.int32) for i in (0, 1)]
    q = plain_streaming.random(int(cu[0][-1]), heads, dim, seed=1).requires_grad_()
    k, v = (
        plain_streaming.random(int(cu[1][-1]), kv_heads, dim, seed=s).requires_grad_()
        for s in (2, 3)
    )
    return [q, k, v], cu


PACKED = {
    "plain": ("softmax", {}),
    "causal": ("softmax", {"causal": True}),
    "window": ("softmax", {"window_size": (1, 1)}),
    "alibi": (
        "softmax",
        {
            "alibi_slopes": plain_streaming.leaf(plain_streaming.random(4, seed=7).abs()),
            "causal": True,
        },
    ),
    "alibi_each": (
        "softmax",
        {"alibi_slopes": plain_streaming.leaf(plain_streaming.random(5, 4, seed=7).abs())},
    ),
    "learned": (
        "ssmax",
        {"s": plain_streaming.leaf(plain_streaming.random(4, seed=8)), "causal": True},
    ),
    "counted": ("relu", {"causal": True}),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_sequences_take_one_launch(case):
    name, call = PACKED[case]
    results = []
    for impl in ("triton", "chunked"):
        leaves, cu = packed()
        extra = [t for t in call.values() if isinstance(t, torch.Tensor)]
        out = attention_varlen(*leaves, *cu, variant=name, impl=impl, **call)
        grads = torch.autograd.grad(
            out, [*leaves, *extra], plain_streaming.random(*out.shape, seed=4)
        )
        results.append([out, *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    (launched,) = plain_streaming.calls
    assert (launched.max_q, launched.max_k) == (7, 7)
    assert launched.cu_q.dtype == torch.int32


def test_packed_dropout_and_weights_go_one_by_one():
    leaves, cu = packed()
    for more in {"dropout_p": 0.5}, {"return_weights": True}:
        outs = []
        for impl in ("triton", "chunked"):
            torch.manual_seed(0)
            outs.append(attention_varlen(*leaves, *cu, causal=True, impl=impl, **more))
        torch.testing.assert_close(*outs)
    assert len(plain_streaming.calls) == 2 * len(LENGTHS)


def test_packed_compiles_in_one_graph():
    leaves, cu = packed()

    def run(q, k, v, cu_q, cu_k):
        return attention_varlen(
            q, k, v, cu_q, cu_k, 7, 7, variant="ssmax", causal=True, impl="triton"
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*leaves, *cu), run(*leaves, *cu))
    # other boundaries over as many tokens are no new compilation
    moved = [cu[0].clone(), cu[1].clone()]
    moved[0][1] -= 1
    torch.testing.assert_close(compiled(*leaves, *moved), run(*leaves, *moved))


def test_packed_positions_of_cosformer():
    """Positions restart, and an unset max_len is the longer of each sequence's own two lengths."""
    variant = get_variant("cosformer")
    leaves, cu = packed()
    (q, k, _), problem = leaves, None
    whole_q, whole_k, _, problem = attnvariants.varlen.packed_problem(
        *leaves, variant, {}, attnvariants.varlen.pack(*leaves, *cu), causal=True
    )
    fq, fk = attnvariants.problem.prepare(whole_q, whole_k, problem)
    bounds = zip(pairwise(cu[0].tolist()), pairwise(cu[1].tolist()), strict=True)
    for (a, b), (c, d) in bounds:
        one_q, one_k = (t.transpose(0, 1).unsqueeze(0) for t in (q[a:b], k[c:d]))
        alone = attnvariants.problem.build(one_q, one_k, one_k, variant, {}, causal=True)
        want = attnvariants.problem.prepare(one_q, one_k, alone)
        torch.testing.assert_close(fq[:, :, a:b], want[0])
        torch.testing.assert_close(fk[:, :, c:d], want[1])


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_packed_sequences_without_values_have_shapes(kind):
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        q, k, cu = torch.empty(10, 4, 8), torch.empty(12, 2, 8), torch.empty(4, dtype=torch.int32)
        slopes = torch.empty(3, 4)
        call = {"variant": "softpick", "causal": True, "alibi_slopes": slopes}
        out, stats = attention_varlen(q, k, k, cu, cu, return_stats=True, **call)
        assert out.shape == (10, 4, 8)
        assert stats.mass.shape == (4, 10)
        assert attnvariants.flash_attn_varlen_func(q, k, k, cu, cu, 5, 6).shape == (10, 4, 8)
        with pytest.raises(ValueError, match="return_weights must be False where cu_seqlens_q"):
            attention_varlen(q, k, k, cu, cu, return_weights=True)


def test_boundaries_that_differ_are_refused_where_they_cannot():
    leaves, cu = packed()
    leaves = [leaf.detach() for leaf in leaves]
    with pytest.raises(ValueError, match="cu_seqlens_q must be the same for all that vmap maps"):
        torch.vmap(lambda c: attention_varlen(*leaves, c, cu[1]))(torch.stack([cu[0], cu[0]]))
    with pytest.raises(ValueError, match=r"cannot be recorded by torch\.jit\.trace"):
        torch.jit.trace(lambda q: attention_varlen(q, *leaves[1:], *cu), leaves[0])
    one = attention_varlen(*leaves, *cu)
    mapped = torch.vmap(lambda q: attention_varlen(q, *leaves[1:], *cu))(leaves[0][None])
    torch.testing.assert_close(mapped[0], one)
