"""What autocast means for a call: inputs are cast as SDPA's are, and nothing inside is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The inputs in autocast's dtype where it is on, float64 left alone, as SDPA has it."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not _is_on(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(tensor: Tensor) -> Tensor:
        casts = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(dtype) if casts and tensor.dtype != torch.float64 else tensor

    return tuple(cast(tensor) for tensor in tensors)


def no_autocast(like: Any) -> AbstractContextManager[Any]:
    """Autocast off: the engines choose their dtypes themselves."""
    if not isinstance(like, Tensor) or not _is_on(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def _is_on(device: str) -> bool:
    """Whether autocast is on for a type of device, which not all of them have."""
    # torch 2.6 cannot trace the question, and compiles for no other device than these without it
    has_it = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return device != "meta" and has_it and torch.is_autocast_enabled(device)
