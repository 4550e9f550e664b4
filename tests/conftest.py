"""What every interpreted test needs: uninitialised memory that shows, and a true bfloat16."""

from functools import wraps

import pytest
import torch

from attnvariants_kernels._triton import INTERPRETED


def _poisoned(allocate):
    @wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor:
            return tensor
        known = tensor.device.type == "cpu" and tensor.is_floating_point()
        return tensor.fill_(torch.nan) if known else tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What kernels allocate and do not write is NaN."""
    if INTERPRETED:
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Triton's interpreter truncates to bfloat16 and multiplies its bits; a GPU does neither."""
    if not INTERPRETED:
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        values = torch.from_numpy(source.data.copy()).bfloat16()
        return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    def widened(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)
