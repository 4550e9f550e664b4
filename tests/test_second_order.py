"""Gradients of gradients: right to second order in the engines in torch, refused elsewhere."""

import plain_streaming
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnvariants import attention, attention_varlen, blocks, linear_ops, list_variants, reference

pytestmark = pytest.mark.filterwarnings("ignore:.*non-deterministic")


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def qkv(batch=2, heads=4, kv_heads=2, q_len=3, kv_len=4, dim=3, value_dim=2):
    sizes = (heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, value_dim)
    return [random(batch, *size, seed=i).requires_grad_() for i, size in enumerate(sizes)]


MASK = random(2, 1, 3, 4, seed=5) > -0.7
MASK[:, :, 1] = False
LEARNED = {"bias": random(1, 4, 3, 4, seed=6), "alibi_slopes": random(2, 4, seed=7).abs()}
CALLS = {
    "causal": {"causal": True},
    "window": {"window_size": (1, 1)},
    "mask": {"attn_mask": MASK},
    "padding": {"attn_mask": MASK[:, :, :1], "causal": True},
    "softcap": {"softcap": 1.5, "scale": -0.7},
    "dropout": {"dropout_p": 0.4},
    "scores": {**LEARNED, "softcap": 2.0, "causal": True},
}
OPTIONS = {
    "ssmax": {"s": random(4, seed=8), "b": random(4, seed=9)},
    "lssar": {"p": 3, "offset": 0.6, "exempt_rows": 1},
    "cosformer": {"max_len": 8},
}


def leaves_of(variant, call):
    """All of a call by name: what requires a gradient apart from the rest."""
    rest = {**CALLS[call], **OPTIONS.get(variant, {})}
    learned = {
        name: value.clone().requires_grad_()
        for name, value in rest.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    rest = {name: value for name, value in rest.items() if name not in learned}
    return dict(zip(("query", "key", "value"), qkv(), strict=True)) | learned, rest


def run(leaves, variant, impl, rest):
    generator = torch.Generator().manual_seed(3) if "dropout_p" in rest else None
    return attention(**leaves, variant=variant, impl=impl, generator=generator, **rest)


def penalty(leaves, variant, impl, rest, weighs=None):
    """Gradients of the squared norm of the gradients, the incoming one a constant or not."""
    out = run(leaves, variant, impl, rest)
    loss = out.sum() if weighs is None else (out * weighs).sum()
    wanted = list(leaves.values())
    grads = torch.autograd.grad(loss, wanted, create_graph=True)
    total = sum((grad.square() * (i + 1)).sum() for i, grad in enumerate(grads))
    wanted += [] if weighs is None else [weighs]
    return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)


def takes(variant, call):
    scores = {"scores", "softcap"}
    return not (variant == "cosformer" and call in scores)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("variant", list_variants())
def test_second_order_is_the_reference_s(variant, call, monkeypatch):
    if not takes(variant, call):
        pytest.skip("cosformer has no scores to cap or to add to")
    # a block for each batch entry and key head
    monkeypatch.setattr(blocks, "_THREAD_SCORES", 8)
    leaves, rest = leaves_of(variant, call)
    weighs = random(2, 4, 3, 2, seed=11).requires_grad_()
    for incoming in (None, weighs):
        want = penalty(leaves, variant, "reference", rest, incoming)
        got = penalty(leaves, variant, "chunked", rest, incoming)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", list_variants())
def test_second_order_is_right(variant):
    leaves, rest = leaves_of(variant, "causal")
    names = list(leaves)

    def function(*tensors):
        return run(dict(zip(names, tensors, strict=True)), variant, "chunked", rest)

    # one row of the matrix, at random, for each: quick, and as good for finding what is missing
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_a_block_at_a_time_is_kept(monkeypatch):
    seen, weights_of = [], reference.weights_of

    def spy(query, *rest):
        seen.append(query.shape[2])
        return weights_of(query, *rest)

    monkeypatch.setattr(reference, "weights_of", spy)
    q = random(1, 1, 300, 4).requires_grad_()

    def norm(impl):
        out = attention(q, q * 0.5, q, "softpick", window_size=(90, 0), impl=impl)
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), q)[0]

    found = norm("chunked")
    assert sum(seen) == 300
    assert max(seen) <= 128
    torch.testing.assert_close(found, norm("reference"))


def test_key_and_value_may_depend_on_query():
    x = random(1, 2, 5, 4).requires_grad_()

    def norm(impl):
        y = attention(x, x * 0.5, x.sin(), "softpick", impl=impl, causal=True)
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(norm("chunked"), norm("reference"))


def test_half_precision_keeps_its_dtype():
    leaves = [tensor.detach().half().requires_grad_() for tensor in qkv()]
    out = attention(*leaves, "softpick", impl="chunked")
    grads = torch.autograd.grad(out.float().square().sum(), leaves, create_graph=True)
    total = sum(grad.float().square().sum() for grad in grads)
    second = torch.autograd.grad(total, leaves)
    assert {grad.dtype for grad in (*grads, *second)} == {torch.float16}
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out = attention(*wide, "softpick", impl="reference")
    grads = torch.autograd.grad(out.square().sum(), wide, create_graph=True)
    want = torch.autograd.grad(sum(grad.square().sum() for grad in grads), wide)
    for one, other in zip(second, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)


def test_only_what_is_wanted_is_differentiated_twice():
    q, k, v = (tensor.detach() for tensor in qkv())
    q.requires_grad_()
    for impl in ("chunked", "auto", "reference"):
        out = attention(q, k, v, "lssa", impl=impl)
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), q)
        if impl == "chunked":
            want = second
        torch.testing.assert_close(second, want)


def test_packed_sequences_and_checkpoints():
    x = random(7, 2, 3).requires_grad_()
    bounds = torch.tensor([0, 3, 3, 7])

    def call(impl):
        return lambda x: attention_varlen(
            x, x, x, bounds, bounds, variant="softpick", causal=True, impl=impl
        )

    def norm(function):
        (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    want = norm(call("reference"))
    torch.testing.assert_close(norm(call("auto")), want)
    kept = norm(lambda x: checkpoint(call("chunked"), x, use_reentrant=False))
    torch.testing.assert_close(kept, want)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        torch.testing.assert_close(norm(call("chunked")), want)


def test_softmax_by_torch_s_kernels_has_second_order_too():
    for variant in ("softmax", "ssmax"):
        for call in ("causal", "mask", "padding"):
            leaves, rest = leaves_of(variant, call)
            want = penalty(leaves, variant, "reference", rest)
            for impl in ("sdpa", "auto"):
                got = penalty(leaves, variant, impl, rest)
                for one, other in zip(got, want, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    leaves, rest = leaves_of("softmax", "scores")
    rest.pop("softcap")
    got, want = (penalty(leaves, "softmax", impl, rest) for impl in ("sdpa", "reference"))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("call", ["dropout", "padding", "scores"])
@pytest.mark.parametrize("variant", list_variants())
def test_third_order_is_the_reference_s(variant, call, monkeypatch):
    if not takes(variant, call):
        pytest.skip("cosformer has no scores to cap or to add to")
    monkeypatch.setattr(blocks, "_THREAD_SCORES", 1)

    def third(impl):
        leaves, rest = leaves_of(variant, call)
        grads, wanted = [run(leaves, variant, impl, rest)], list(leaves.values())
        for power in (1, 2, 2):
            total = sum((grad**power).sum() * (i + 1) for i, grad in enumerate(grads))
            grads = torch.autograd.grad(
                total, wanted, create_graph=True, allow_unused=True, materialize_grads=True
            )
        return grads

    for one, other in zip(third("chunked"), third("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", ["softmax", "softpick"])
def test_fourth_order_is_refused(variant):
    q, k, v = qkv()
    grad = attention(q, k, v, variant, impl="auto")
    for _ in range(3):
        (grad,) = torch.autograd.grad(grad.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="use impl='reference' to differentiate four"):
        grad.sum().backward()


@pytest.mark.parametrize("product", ["hvp", "vhp"])
def test_hessian_vector_products(product):
    """hvp differentiates what is linear in its vector, which is a third derivative."""
    inputs = tuple(tensor.detach() for tensor in qkv())
    direction = tuple(random(*tensor.shape, seed=20 + i) for i, tensor in enumerate(inputs))

    def found(impl):
        def loss(q, k, v):
            return attention(q, k, v, "softpick", impl=impl, causal=True).square().sum()

        return getattr(torch.autograd.functional, product)(loss, inputs, direction)[1]

    torch.testing.assert_close(found("auto"), found("reference"))


@pytest.mark.parametrize("vectorize", [False, True])
def test_hessians_of_autograd_functional(vectorize):
    q, k, v = (tensor.detach() for tensor in qkv(batch=1, heads=2, kv_heads=1))

    def loss(impl):
        return lambda q: attention(q, k, v, "softpick", impl=impl, causal=True).square().sum()

    functional = torch.autograd.functional
    got, want = (functional.hessian(loss(impl), q, vectorize=vectorize) for impl in
                 ("chunked", "reference"))  # fmt: skip
    torch.testing.assert_close(got, want)
    got, want = (functional.jacobian(lambda q, impl=impl: attention(q, q, v, "lssa", impl=impl,
                                                                    scale=0.5)[0, 0, 0],
                                     v[..., :2], vectorize=vectorize)
                 for impl in ("chunked", "reference"))  # fmt: skip
    torch.testing.assert_close(got, want)


def test_operators_give_second_order_where_they_run_eagerly():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, "softpick", causal=True, impl="chunked")

    leaves = qkv()
    example = tuple(tensor.detach() for tensor in leaves)
    exported = torch.export.export(Layer(), example, strict=False).module()
    eager = torch.compile(Layer(), backend="eager", fullgraph=True)

    def second(function):
        grads = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    want = second(lambda *t: attention(*t, "softpick", causal=True, impl="reference"))
    for function in (exported, eager):
        for one, other in zip(second(function), want, strict=True):
            torch.testing.assert_close(one, other)


def test_fused_kernels_refuse_second_order_whatever_comes_in(monkeypatch):
    plain_streaming.install(monkeypatch)
    leaves = [tensor.detach().float().requires_grad_() for tensor in qkv(kv_len=3)]
    calls = [("softmax", {}), ("softmax", {"bias": torch.zeros(3, 3, requires_grad=True)})]
    for variant, rest in calls:
        out = attention(*leaves, variant, impl="triton", **rest)
        wanted = [*leaves, *rest.values()]
        for incoming in (torch.ones_like(out), torch.ones_like(out, requires_grad=True)):
            grads = torch.autograd.grad(out, wanted, incoming, create_graph=True, retain_graph=True)
            for grad in grads:
                assert grad.requires_grad
                with pytest.raises(NotImplementedError, match="differentiate twice"):
                    torch.autograd.grad(grad.sum(), wanted, retain_graph=True)


def test_linear_kernels_refuse_second_order_whatever_comes_in(monkeypatch):
    linear = pytest.importorskip("attnvariants_kernels.linear", reason="Triton is missing")
    monkeypatch.setattr(linear, "forward", lambda q, k, v, **_: (v.clone(), v[..., 0].clone()))
    monkeypatch.setattr(linear, "backward", lambda grad, q, k, v, *_, **__: (
        q.clone(), k.clone(), grad.clone()))  # fmt: skip
    leaves = [random(1, 2, 3, 4, seed=i).float().requires_grad_() for i in range(3)]
    out, _ = linear_ops.linear_forward(*leaves, None, None, None, 1.0, 1e-6, True, 0, 3, 3)
    for incoming in (torch.ones_like(out), torch.ones_like(out, requires_grad=True)):
        grads = torch.autograd.grad(out, leaves, incoming, create_graph=True, retain_graph=True)
        for grad in grads:
            with pytest.raises(NotImplementedError, match="differentiate twice"):
                torch.autograd.grad(grad.sum(), leaves, retain_graph=True)
