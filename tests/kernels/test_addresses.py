"""Strides as wide as tensors may have: no kernel reads or writes beside its rows."""

import numpy
import pytest
import torch
from engines import kernels_run

from attnvariants import attention, attention_varlen
from attnvariants_kernels._triton import INTERPRETED

# the last names the linear kernels, which are cosformer's without a window
CALLS = [("softmax", {}), ("sparsemax", {}), ("cosformer", {"window_size": (5, 0)}),
         ("cosformer", {"max_len": 16})]  # fmt: skip


def spread(tensor, strides):
    """The same tensor with these strides, in memory that is only reserved."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)) + 1
    memory = torch.from_numpy(numpy.empty(reach, dtype=numpy.float16))
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


def run(tensors, grad_out, name, **call):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = attention(*tensors, name, causal=True, impl="triton", **call)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad_out)]


@kernels_run
@pytest.mark.skipif(not INTERPRETED, reason="memory on the GPU is not reserved, it is there")
@pytest.mark.parametrize(("name", "options"), CALLS, ids=lambda value: str(value))
@pytest.mark.parametrize(
    "strides",
    [(16, 16, 2**27 + 2**24, 1), (16, 2**30, 16, 1), (2**30, 16, 16, 1)],
    ids=["tokens", "heads", "batch"],
)
def test_strides_beyond_32_bits(name, options, strides):
    # as many tokens, heads or sequences as reach over 2^31 elements
    sizes = [3 if stride == 2**30 else 1 for stride in strides[:2]]
    sizes += [16 if strides[2] > 16 else 4, 16]
    generator = torch.Generator().manual_seed(0)
    near = [torch.randn(sizes, generator=generator).half() for _ in range(4)]
    want = run(near[:3], near[3], name, **options)
    far = [spread(x, strides) for x in near]
    got = run(far[:3], far[3], name, **options)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@kernels_run
def test_boundaries_that_are_not_neighbours_in_memory():
    x = torch.randn(20, 2, 16)
    apart = torch.tensor([0, 9, 5, 9, 20, 9], dtype=torch.int32)[::2]
    near = apart.contiguous()
    got = attention_varlen(x, x, x, apart, apart, 15, 15, impl="triton")
    assert torch.equal(got, attention_varlen(x, x, x, near, near, 15, 15, impl="triton"))


@kernels_run
def test_slopes_of_any_stride():
    x = torch.randn(3, 2, 9, 16)
    slopes = torch.rand(2, 3).t()
    got = attention(x, x, x, alibi_slopes=slopes, impl="triton")
    want = attention(x, x, x, alibi_slopes=slopes.contiguous(), impl="triton")
    assert torch.equal(got, want)


@pytest.mark.skipif(not INTERPRETED, reason="it is about Triton's interpreter")
@pytest.mark.parametrize("name", ["softmax", "lssar", "sparsemax", "cosformer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_interpreter_rounds_as_a_gpu_does(name, dtype):
    x = torch.randn(1, 1, 24, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = attention(x, x, x, name, causal=True, impl="triton").double()
    want = attention(x.double(), x.double(), x.double(), name, causal=True, impl="reference")
    # weights and output rounded once each
    assert float((got - want).abs().max()) <= 2 * torch.finfo(dtype).eps * float(want.abs().max())
