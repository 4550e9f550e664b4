"""The fused kernels beyond the contract's cells: tiles, widths, precision, repeatability, torch."""

from dataclasses import replace

import pytest
import torch
from engines import kernels_compile, kernels_run
from torch_plain import plain_attention

import attnvariants
from attnvariants import attention, attention_varlen, fused
from attnvariants.testing import TILED_CASES, conformance

VARIANTS = [
    name
    for name in attnvariants.list_variants()
    if attnvariants.get_variant(name).hooks is not None
]
FORMS = [(name, {}) for name in VARIANTS] + [
    ("sa_softmax", {"form": "x"}),
    ("relu", {"act": "gelu", "power": 0.5}),
]
IDS = [name + "-".join(map(str, options.values())) for name, options in FORMS]


def leaves(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def run(tensors, name, grad_out=None, **call):
    out = attention(*tensors, name, **call)
    grad_out = torch.ones_like(out) if grad_out is None else grad_out.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad_out)]


def budget(name):
    # p = 15 multiplies the scores' own rounding
    return 3e-5 if name == "lssar" else 1e-5


def test_every_variant_has_kernels():
    assert set(VARIANTS) == set(attnvariants.list_variants())


@kernels_run
@pytest.mark.parametrize(("name", "options"), FORMS, ids=IDS)
def test_several_tiles_in_every_direction(name, options):
    conformance(name, cases=TILED_CASES, tolerance=budget(name), **options)


@kernels_run
@pytest.mark.parametrize("name", ["softmax", "lssar", "sparsemax"])
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 3), (16, 16), (80, 24), (192, 128), (256, 256)])
def test_head_dims(name, dim, value_dim):
    shapes = (1, 2, 19, dim), (1, 1, 21, dim), (1, 1, 21, value_dim)
    got = run(leaves(*shapes), name, causal=True, impl="triton")
    want = run([x.double().detach().requires_grad_() for x in leaves(*shapes)], name, causal=True)
    for found, expected in zip(got, want, strict=True):
        largest = max(1, float(expected.abs().max()))
        assert float((found - expected).abs().max()) <= budget(name) * largest


@kernels_run
@pytest.mark.parametrize(("name", "options"), FORMS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_within_twice_plain_torch(name, options, dtype):
    shapes = [(1, 2, 70, 32)] * 3
    inputs = leaves(*shapes, dtype=dtype, seed=4)
    grad_out = torch.randn(1, 2, 70, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = run(exact, name, grad_out, causal=True, impl="reference", **options)
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    out = plain_attention(*plain, name, **options)
    plain = [out.detach(), *torch.autograd.grad(out, plain, grad_out)]
    got = run(inputs, name, grad_out, causal=True, impl="triton", **options)
    for what, mine, theirs, true in zip(("out", "dq", "dk", "dv"), got, plain, want, strict=True):
        assert mine.dtype == dtype
        error = float((mine.double() - true).abs().max())
        budget = 2 * float((theirs.double() - true).abs().max())
        # where plain torch happens to be exact, one rounding of the result is still allowed
        rounding = float((true - true.to(dtype).double()).abs().max())
        assert error <= budget + rounding, (what, error, budget)


@kernels_run
@pytest.mark.parametrize(("name", "options"), FORMS, ids=IDS)
def test_twice_the_same_bits(name, options):
    tensors = leaves((2, 4, 40, 16), (2, 2, 70, 16), (2, 2, 70, 16))
    one, other = (run(tensors, name, causal=True, impl="triton", **options) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@kernels_run
@pytest.mark.parametrize(("name", "options"), FORMS, ids=IDS)
def test_decoding_token_by_token_is_prefill(name, options):
    options = {**options, **({"max_len": 64} if name == "cosformer" else {})}
    q, k, v = leaves((1, 4, 20, 16), (1, 2, 20, 16), (1, 2, 20, 8))
    whole = attention(q, k, v, name, causal=True, impl="triton", **options)
    for i in range(20):
        one = attention(
            q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], name, causal=True,
            impl="triton", **options,
        )  # fmt: skip
        torch.testing.assert_close(one, whole[:, :, i : i + 1], rtol=1e-5, atol=1e-5)


@kernels_run
@pytest.mark.parametrize(("name", "options"), FORMS, ids=IDS)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_do_not_see_each_other(name, options, causal):
    lengths = [5, 0, 33, 1, 18]
    bounds = torch.tensor([0, 5, 5, 38, 39, 57], dtype=torch.int32)
    tensors = leaves((57, 4, 16), (57, 2, 16), (57, 2, 8))
    packed = attention_varlen(
        *tensors, bounds, bounds, max(lengths), max(lengths), name, causal=causal, impl="triton",
        **options,
    )  # fmt: skip
    parts = [t.detach().double().requires_grad_() for t in tensors]
    single = attention_varlen(
        *parts, bounds, bounds, max(lengths), max(lengths), name, causal=causal, impl="reference",
        **options,
    )  # fmt: skip
    torch.testing.assert_close(packed.double(), single, rtol=1e-5, atol=2e-5)
    grad_out = torch.randn_like(single)
    got = torch.autograd.grad(packed, tensors, grad_out.float())
    for found, expected in zip(got, torch.autograd.grad(single, parts, grad_out), strict=True):
        scale = max(1, float(expected.abs().max()))
        assert float((found - expected).abs().max()) <= 2e-5 * scale


@kernels_run
@pytest.mark.parametrize("name", ["softmax", "softpick", "relu", "lssar"])
def test_dropout_is_that_of_every_engine(name):
    tensors = leaves((2, 4, 21, 16), (2, 2, 37, 16), (2, 2, 37, 8))
    found = {
        impl: run(
            tensors, name, causal=True, dropout_p=0.4, impl=impl,
            generator=torch.Generator().manual_seed(3),
        )
        for impl in ("triton", "chunked")
    }  # fmt: skip
    for mine, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(found["triton"][0], run(tensors, name, causal=True)[0])


@kernels_run
@pytest.mark.parametrize(("name", "options"), FORMS, ids=IDS)
def test_full_graph_of_any_length(name, options):
    torch._dynamo.reset()
    call = torch.compile(
        lambda q, k, v: attention(q, k, v, name, causal=True, impl="triton", **options),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (12, 19, 33):
            tensors = leaves(*[(1, 2, length, 16)] * 3)
            out = call(*tensors)
            grads = torch.autograd.grad(out.square().sum(), tensors)
            want = attention(*tensors, name, causal=True, impl="triton", **options)
            torch.testing.assert_close(out, want)
            wanted = torch.autograd.grad(want.square().sum(), tensors)
            for found, expected in zip(grads, wanted, strict=True):
                torch.testing.assert_close(found, expected)


@kernels_run
@pytest.mark.parametrize("name", ["softmax", "lssar", "relu"])
def test_opcheck(name):
    from attnvariants import ops

    seen = []
    original = ops.streaming_forward

    def spy(*args):
        seen.append(args)
        return original(*args)

    ops.streaming_forward = spy
    try:
        tensors = leaves((1, 2, 9, 16), (1, 1, 11, 16), (1, 1, 11, 8))
        attention(*tensors, name, bias=torch.randn(2, 9, 11), causal=True, impl="triton")
    finally:
        ops.streaming_forward = original
    torch.library.opcheck(original, seen[0])


@kernels_compile
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_a_new_length_compiles_nothing(kernel):
    def compiled(tokens, heads):
        launches = fused.shipped(
            "softmax", target="sm_90", head_dim=64, tokens=tokens, heads=heads, kv_heads=heads
        )
        return launches[kernel].compile("sm_90").hash

    for heads in (3, 16):
        assert len({compiled(tokens, heads) for tokens in (1024, 1025, 3000, 4096)}) == 1


@kernels_run
def test_a_jacobian_of_one_sequence():
    q, k, v = (x.detach() for x in leaves(*[(1, 2, 6, 8)] * 3))

    def jacobian(impl):
        return torch.func.jacrev(lambda q: attention(q, k, v, "softpick", impl=impl).sum(-1))(q)

    torch.testing.assert_close(jacobian("triton"), jacobian("reference"), rtol=1e-5, atol=1e-5)


@kernels_run
def test_a_backward_keeps_the_variant_of_its_forward(monkeypatch):
    monkeypatch.setattr(attnvariants.registry, "_registered", {})
    relu, softmax = (
        replace(attnvariants.get_variant(name), name="") for name in ("relu", "softmax")
    )
    tensors = leaves(*[(1, 2, 6, 8)] * 3)
    attnvariants.register("replaced", relu, replace_existing=True)
    out = attention(*tensors, "replaced", impl="triton")
    attnvariants.register("replaced", softmax, replace_existing=True)
    got = torch.autograd.grad(out.sum(), tensors)
    for found, expected in zip(got, run(tensors, "relu", impl="triton")[1:], strict=True):
        torch.testing.assert_close(found, expected)


@kernels_run
@pytest.mark.parametrize("name", ["softpick", "sa_softmax"])
def test_float16_gradients_of_small_scores_are_finite(name):
    tensors = [(0.003 * x.detach()).requires_grad_() for x in leaves(*[(1, 1, 40, 32)] * 3)]
    tensors = [x.detach().half().requires_grad_() for x in tensors]
    assert all(torch.isfinite(x).all() for x in run(tensors, name, causal=True, impl="triton"))


@kernels_run
def test_a_window_as_wide_as_an_integer():
    tensors = leaves(*[(1, 1, 9, 8)] * 3)
    for window in ((0, 2**31 - 1), (2**31 - 5, 2**31 - 5), (2**40, 2)):
        got = attention(*tensors, window_size=window, impl="triton")
        torch.testing.assert_close(
            got, attention(*tensors, window_size=window, impl="reference"), rtol=1e-5, atol=1e-6
        )
