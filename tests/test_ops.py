"""The operators around the kernels: what they hand over, gradients, compile, export, transforms."""

from dataclasses import replace

import plain_streaming
import pytest
import torch
from plain_streaming import leaf, random

from attnvariants import attention, get_variant, ops


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    plain_streaming.install(monkeypatch)


def qkv(batch=2, heads=4, kv_heads=2, q_len=7, kv_len=7, dim=8, value_dim=8, dtype=torch.float32):
    sizes = (heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, value_dim)
    return [random(batch, *size, seed=i).to(dtype).requires_grad_() for i, size in enumerate(sizes)]


MASK = random(2, 4, 7, 7, seed=5) > -0.5
DEAD = MASK.clone()
DEAD[:, :, 2] = False
CALLS = {
    "plain": ("softmax", {}),
    "causal": ("softmax", {"causal": True}),
    "window": ("softmax", {"window_size": (2, 1)}),
    "mask": ("softmax", {"attn_mask": DEAD}),
    "padding": ("softmax", {"attn_mask": MASK[:, :1, :1], "causal": True}),
    "bias": ("softmax", {"bias": leaf(random(1, 4, 1, 7, seed=6))}),
    "alibi": ("softmax", {"alibi_slopes": leaf(random(4, seed=7).abs()), "causal": True}),
    "alibi_batch": ("softmax", {"alibi_slopes": leaf(random(2, 4, seed=7).abs())}),
    "softcap": ("softmax", {"softcap": 1.5, "scale": 0.7}),
    "learned": ("ssmax", {"s": leaf(random(4, seed=8)), "b": 0.2, "causal": True}),
    "cosine": ("lssa", {"causal": True, "attn_mask": MASK[:, :1, :1]}),
    "options": ("relu", {"power": 0.5, "attn_mask": DEAD}),
    "counted": ("relu", {"causal": True}),
}


def results(call, leaves, impl, **more):
    variant, rest = call
    leaves = [*leaves, *(t for t in rest.values() if isinstance(t, torch.Tensor) and t.is_leaf
                         and t.requires_grad)]  # fmt: skip
    out = attention(*leaves[:3], variant, impl=impl, **rest, **more)
    grads = torch.autograd.grad(out, leaves, random(*out.shape, seed=9).to(out.dtype))
    return [out, *grads]


@pytest.mark.parametrize("case", CALLS)
def test_a_call_reaches_the_kernels_whole(case):
    for one, other in zip(
        results(CALLS[case], qkv(), "triton"), results(CALLS[case], qkv(), "chunked"), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    assert len(plain_streaming.calls) == 1


def test_what_the_kernels_are_handed():
    q, k, v = qkv(q_len=3)
    attention(q, k, v, "softmax", impl="triton", window_size=(2, 0), softcap=2.0)
    (call,) = plain_streaming.calls
    assert (call.offset, call.left, call.right, call.softcap) == (4, 2, 0, 2.0)
    assert call.mask is call.bias is call.slopes is call.visible is call.cu_q is None
    assert call.scale == pytest.approx(8**-0.5)
    attention(q, k, v, "relu", impl="triton", attn_mask=MASK[:, :1, :1], power=0.5)
    call = plain_streaming.calls[-1]
    # expanded without a copy, and counted because there is a mask
    assert call.mask.shape == (2, 4, 3, 7)
    assert call.mask.stride()[1:3] == (0, 0)
    assert call.visible.dtype == torch.int32
    assert call.visible.tolist() == MASK[:, :1, :1].sum(-1).expand(2, 4, 3).tolist()
    assert call.theta == (0.5,)
    real = pytest.importorskip("attnvariants_kernels.hooks", reason="kernels are missing")
    assert {"saves", "needs_n"} <= set(real.Hooks._fields)


def test_dropout_is_the_same_mask_as_elsewhere():
    q, k, v = qkv()
    outs = [
        attention(q, k, v, impl=impl, dropout_p=0.4, generator=torch.Generator().manual_seed(3))
        for impl in ("triton", "chunked")
    ]
    torch.testing.assert_close(*outs)


def test_half_precision_stays_half():
    leaves = qkv(dtype=torch.bfloat16)
    for call in CALLS["causal"], CALLS["learned"]:
        out, *grads = results(call, leaves, "triton")
        assert out.dtype == torch.bfloat16
        assert {g.dtype for g in grads[:3]} == {torch.bfloat16}
    assert len(plain_streaming.calls) == 2


def test_only_what_is_wanted_is_differentiated(monkeypatch):
    wants = []
    backward = plain_streaming.backward

    def spy(*args):
        wants.append(args[-2:])
        return backward(*args)

    monkeypatch.setattr(plain_streaming, "backward", spy)
    q, k, v = qkv()
    bias, slopes = random(7, 7), random(4).abs().requires_grad_()
    attention(q, k, v, impl="triton", bias=bias, alibi_slopes=slopes).sum().backward()
    assert wants == [(False, True)]
    assert bias.grad is None
    assert slopes.grad is not None


def test_second_derivatives_are_refused():
    q, k, v = qkv()
    out = attention(q, k, v, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="use impl='reference' to differentiate twice"):
        grad.sum().backward()


def arguments(case):
    """The arguments the operator gets of a call."""
    seen = []
    operator = ops.streaming_forward

    class Spy:
        def __call__(self, *args):
            seen.append(args)
            return operator(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "streaming_forward", Spy())
        variant, rest = CALLS[case]
        attention(*qkv(), variant, impl="triton", **rest)
    return seen[0]


@pytest.mark.parametrize("case", ["plain", "mask", "bias", "alibi_batch", "options"])
def test_opcheck(case):
    torch.library.opcheck(torch.ops.attnvariants.streaming_forward.default, arguments(case))


def test_opcheck_of_the_backward():
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments("bias")]
    out, saved = ops.streaming_forward(*args)
    grad = torch.randn_like(out)
    for wants in (True, False), (False, False):
        torch.library.opcheck(
            torch.ops.attnvariants.streaming_backward.default,
            (grad, *args[:3], out, saved, *args[3:10], *wants, *args[10:]),
        )


@pytest.mark.parametrize("case", CALLS)
def test_compiles_in_one_graph(case):
    def forward(leaves, rest, impl):
        return attention(*leaves, CALLS[case][0], impl=impl, **rest)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    leaves, rest = qkv(), CALLS[case][1]
    extra = [t for t in rest.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    outs = [forward(leaves, rest, "triton"), compiled(leaves, rest, "triton")]
    grads = [torch.autograd.grad(out.square().sum(), [*leaves, *extra]) for out in outs]
    torch.testing.assert_close(*outs)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_compiles_a_float_mask_without_reading_it():
    mask = torch.zeros(7, 7).masked_fill(~MASK[0, 0], -torch.inf)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q, k, v = qkv()
    torch.testing.assert_close(
        compiled(q, k, v, attn_mask=mask, impl="triton"), attention(q, k, v, attn_mask=mask)
    )


def test_compiled_dropout_follows_the_seed():
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q, k, v = qkv()

    def run():
        return compiled(q, k, v, impl="triton", dropout_p=0.5)

    torch.manual_seed(3)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    torch.testing.assert_close(run(), first)
    seeds = [call.seed for call in plain_streaming.calls]
    assert seeds[0] != seeds[1]
    assert seeds[0] == seeds[2]


@pytest.mark.parametrize("name", ["softmax", "ssmax", "relu"])
def test_one_compilation_serves_all_lengths(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def run(q, k, v, mask):
        return attention(q, k, v, name, impl="triton", causal=True, attn_mask=mask)

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for q_len, kv_len in ((7, 7), (9, 9), (33, 33), (5, 21), (6, 50)):
        q, k, v = qkv(q_len=q_len, kv_len=kv_len)
        mask = torch.ones(2, 1, 1, kv_len, dtype=torch.bool)
        torch.testing.assert_close(
            compiled(q, k, v, mask), attention(q, k, v, name, causal=True, attn_mask=mask),
            rtol=2e-5, atol=2e-5,
        )  # fmt: skip
    # square calls may have one of their own
    assert len(graphs) <= 2


def test_autocast():
    q, k, v = qkv()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v, "ssmax", impl="triton", causal=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = attention(*(t.bfloat16() for t in (q, k, v)), "ssmax", impl="triton", causal=True)
    assert run().dtype == torch.bfloat16
    assert torch.equal(run(), want)
    assert torch.equal(compiled(), want)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.s = torch.nn.Parameter(torch.full((4,), 0.4))

    def forward(self, q, k, v):
        return attention(q, k, v, "ssmax", s=self.s, causal=True, impl="triton")


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_length(strict):
    layer = Layer()
    inputs = [t.detach() for t in qkv()]
    tokens = torch.export.Dim("tokens", min=2, max=512)
    exported = torch.export.export(
        layer, tuple(inputs), dynamic_shapes=[{2: tokens}] * 3, strict=strict
    )
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "attnvariants.streaming_forward.default" in targets, " ".join(sorted(targets))
    for length in (7, 12):
        inputs = [t.detach() for t in qkv(q_len=length, kv_len=length)]
        torch.testing.assert_close(exported.module()(*inputs), layer(*inputs))


def test_func_grad_and_vmap():
    q, k, v = (t.detach().unflatten(0, (3, 2)) for t in qkv(batch=6))
    slopes = random(3, 4).abs()

    def loss(q, k, v, slopes):
        # the slopes of one mapped element serve a batch of two
        out = attention(q, k, v, alibi_slopes=slopes, impl="triton", causal=True)
        return out.square().sum()

    every = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    got = torch.func.vmap(every)(q, k, v, slopes)
    shared = torch.func.vmap(every, in_dims=(0, None, 0, None))(q, k[0], v, slopes[0])
    for i in range(3):
        for one, other in zip(got, every(q[i], k[i], v[i], slopes[i]), strict=True):
            torch.testing.assert_close(one[i], other)
        for one, other in zip(shared, every(q[i], k[0], v[i], slopes[0]), strict=True):
            torch.testing.assert_close(one[i], other)
    leaf_q = q[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf_q, k[0], v[0], slopes[0]), leaf_q)
    torch.testing.assert_close(got[0][0], want)
    total = torch.func.grad(
        lambda s: torch.func.vmap(loss, in_dims=(0, 0, 0, None))(q, k, v, s).sum()
    )(slopes[0])
    each = [every(*parts, slopes[0])[3] for parts in zip(q, k, v, strict=True)]
    torch.testing.assert_close(total, sum(each))


def test_vmap_of_the_backward_operator():
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments("bias")]
    out, saved = ops.streaming_forward(*args)

    def backward(grad):
        rest = *args[:3], out, saved, *args[3:10], True, False, *args[10:]
        return ops.streaming_backward(grad, *rest)

    grads = random(3, *out.shape, seed=3)
    got = torch.func.vmap(backward)(grads)
    for i in range(3):
        torch.testing.assert_close(tuple(part[i] for part in got), backward(grads[i]))


def test_vmap_of_masks_and_biases():
    q, k, v = (t.detach() for t in qkv(batch=3))
    bias, mask = random(3, 4, 7, 7), random(3, 1, 7, seed=4) > 0

    def run(q, k, v, bias, mask):
        return attention(q[None], k[None], v[None], bias=bias, attn_mask=mask, impl="triton")[0]

    got = torch.func.vmap(run)(q, k, v, bias, mask)
    torch.testing.assert_close(
        got, torch.stack([run(*t) for t in zip(q, k, v, bias, mask, strict=True)])
    )


def test_unregistered_variants():
    mine = replace(get_variant("relu"), name="")
    renamed = replace(get_variant("relu"), theta=lambda options, case: (2.0,))
    assert renamed.name == "relu"
    q, k, v = qkv()
    compiled = torch.compile(
        lambda: attention(q, k, v, mine, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    want = attention(q, k, v, "relu", impl="chunked")
    for out in (attention(q, k, v, mine, impl="triton"), compiled()):
        torch.testing.assert_close(out, want)
        torch.autograd.grad(out.sum(), q)
    attention(q, k, v, renamed, impl="triton")
    assert plain_streaming.calls[-1].theta == (2.0,)
