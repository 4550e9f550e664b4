"""What a call runs under: compilers, tracers, transforms, and tensors that have no values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_MODES = torch._C._TorchDispatchModeKey
# the oldest torch does not tell exporting from compiling
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: not of meta or fake tensors, nor where a call is recorded
    to run on others, nor in a vmap.
    """
    if recorded() or _has_mode(_MODES.FAKE) or batched(tensor):
        return False
    return not shapes_alone(tensor)


def batched(tensor: Tensor) -> bool:
    """Whether a vmap of torch.func maps this very tensor, under whatever other transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def shapes_alone(tensor: Tensor) -> bool:
    """Whether a tensor has no values: on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor) or _has_mode(_MODES.FAKE)


def fake_mode(tensor: Any) -> AbstractContextManager[Any]:
    """The mode that a fake tensor came out of, so that what a call makes is fake as well."""
    outside = not torch.compiler.is_compiling() and not _has_mode(_MODES.FAKE)
    return tensor.fake_mode if outside and isinstance(tensor, FakeTensor) else nullcontext()


def recorded() -> bool:
    """Whether a call is recorded, to be run on other values: compiled, exported or traced."""
    return torch.compiler.is_compiling() or unguarded() or _has_mode(_MODES.PROXY)


def unguarded() -> bool:
    """Whether torch.jit.trace records, whose graph runs whatever shapes it gets as they come."""
    return torch.jit.is_tracing()


def exported() -> bool:
    """Whether what is recorded runs without a check of what it was recorded with, but for sizes."""
    return unguarded() or _is_exporting()


def transformed() -> bool:
    """Whether a transform of torch.func is active."""
    return torch._C._functorch.maybe_current_level() is not None


def plain() -> bool:
    """Whether a call simply runs: it is not recorded, nor is a transform active."""
    return not recorded() and not transformed()


def mapped(tensor: Tensor) -> bool:
    """Whether a vmap maps what runs now, be it the one of is_grads_batched."""
    return transformed() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def plain_torch_alone(*tensors: Any) -> str | None:
    """Why only operators of torch itself can run a call on these, as a clause; None if not so."""
    if torch.compiler.is_compiling():
        if _to_onnx():
            return "torch.onnx.export translates operators of torch alone"
        return "a torch.func transform takes operators of torch alone" if transformed() else None
    if unguarded():
        what = "torch.onnx.export" if _to_onnx() else "torch.jit.trace"
        return f"{what} records operators of torch alone"
    if transformed():
        names = " of ".join(f"torch.func's {name}" for name in transforms())
        return f"{names} takes operators of torch alone"
    if _has_tangent(*tensors):
        return "forward-mode derivatives are those of operators of torch alone"
    return None


def beyond_operators(*tensors: Any) -> str | None:
    """As `plain_torch_alone`, for operators that a vmap maps and that differentiate once."""
    if transformed() and not unguarded():
        if torch.compiler.is_compiling():
            return None
        names = transforms()
        if names.count("grad") <= 1 and set(names) <= {"grad", "vmap"}:
            return None
    return plain_torch_alone(*tensors)


def transforms() -> tuple[str, ...]:
    """The active transforms of torch.func, outermost first: "vmap", "grad", "jvp", ..."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return tuple(interpreter.key().name.lower() for interpreter in stack)


def _has_mode(key: Any) -> bool:
    return torch._C._get_dispatch_mode(key) is not None


def _has_tangent(*tensors: Any) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def _to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()
