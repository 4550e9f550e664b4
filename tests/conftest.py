"""What every interpreted test needs: uninitialised memory that shows."""

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
