"""What autocast means for a call: inputs are cast as SDPA's are, and nothing inside is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The inputs in autocast's dtype where it is on, float64 left alone, as SDPA has it."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.amp.is_autocast_available(first.device.type):
        return tensors
    if not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(tensor: Tensor) -> Tensor:
        casts = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(dtype) if casts and tensor.dtype != torch.float64 else tensor

    return tuple(cast(tensor) for tensor in tensors)


def no_autocast(like: Any) -> AbstractContextManager[Any]:
    """Autocast off: the engines choose their dtypes themselves."""
    if not isinstance(like, Tensor) or not torch.amp.is_autocast_available(like.device.type):
        return nullcontext()
    if not torch.is_autocast_enabled(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
