"""The kernels at many magnitudes, and what once left the range of float16."""

import magnitudes
import pytest
import torch
from engines import kernels_run

from attnvariants import attention

pytestmark = kernels_run

# scores, their squares and their weights within float32's range, and outputs within the dtype's
SIZES = {
    torch.float32: [(1e-8, 1e-8, 1.0), (1e-3, 1e-3, 1.0), (1e3, 1.0, 1e20)],
    torch.bfloat16: [(1e-8, 1e-8, 1.0), (1e-3, 1e-3, 1.0), (1e7, 1e7, 1.0)],
    torch.float16: [(1e-3, 1e-3, 1.0), (5e1, 5e1, 1.0), (1e-7, 1.0, 8e3)],
}
QUICK = [
    ("softmax", {}),
    ("softpick", {}),
    ("sa_softmax", {"form": "x"}),
    ("relu", {"act": "relu2", "length": 512}),
]
CASES = [(form, dtype, size) for form in QUICK for dtype, sizes in SIZES.items() for size in sizes]


def faults(form, dtype, size, **call):
    unit = None if dtype == torch.float32 else torch.finfo(dtype).eps
    name, options = form
    return magnitudes.faults(name, {**options, **call}, "triton", dtype, size, unit=unit)


@pytest.mark.parametrize(("form", "dtype", "size"), CASES)
def test_kernels_at_some_magnitudes(form, dtype, size):
    assert faults(form, dtype, size) == []


@pytest.mark.parametrize("call", [{"window_size": (4, 0)}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("size", [1e-3, 60.0])
def test_cosformer_in_float16_where_its_sum_is_tiny_or_large(size, call):
    q, k, v = (magnitudes.numbers((1, 1, 9, 16), torch.float16, s, i).half().requires_grad_()
               for i, s in enumerate((size, size, 1.0)))  # fmt: skip
    with torch.no_grad():
        # relu leaves nothing of one query
        q[0, 0, 3] = -q[0, 0, 3].abs()
    results = {}
    for impl in ("triton", "chunked"):
        generator = {"generator": torch.Generator().manual_seed(0)} if "dropout_p" in call else {}
        out = attention(
            q, k, v, "cosformer", causal=True, max_len=16, impl=impl, **call, **generator
        )
        results[impl] = [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]
    for mine, other in zip(results["triton"], results["chunked"], strict=True):
        assert torch.isfinite(mine).all()
        # g.v and the sum that comes off it cancel
        torch.testing.assert_close(mine, other, rtol=0, atol=0.03 * float(other.abs().max()))


def test_weights_over_65504_before_the_division():
    q = torch.full((1, 1, 2, 16), 9.0).half()
    v = torch.eye(2).half().view(1, 1, 2, 2)
    out = attention(q, q, v, "relu", act="relu2", length=512, impl="triton")
    torch.testing.assert_close(out, torch.full((1, 1, 2, 2), 324**2 / 512).half())


@pytest.mark.parametrize("name", ["softmax", "lssa", "sa_softmax", "sparsemax"])
@pytest.mark.parametrize("offset", [-3e4, -1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_far_from_zero_is_what_its_differences_say(name, offset, dtype):
    q, k, v = (magnitudes.numbers((1, 1, 6, 8), dtype, 1.0, i).to(dtype) for i in range(3))
    bias = torch.zeros(6, 6)
    # of no query alone: differences that float32 holds beside the offset
    bias[:, ::2] = 64.0
    bias += offset
    q = torch.zeros_like(q).requires_grad_() if offset < -1e8 else q.requires_grad_()
    call = {"bias": bias, "impl": "triton"}
    out = attention(q, k, v, name, **call)
    wanted = attention(q.double(), k.double(), v.double(), name, bias=bias.double())
    step = torch.finfo(torch.float32).eps * abs(offset) if offset > -1e8 else 0.0
    limits = torch.finfo(dtype)
    budget = (4 * limits.eps + 2 * step) * float(wanted.abs().max())
    budget += limits.smallest_normal * limits.eps
    assert float((out.double() - wanted).abs().max()) <= budget
    (grad,) = torch.autograd.grad(out.float().sum(), q)
    assert torch.isfinite(grad).all()
