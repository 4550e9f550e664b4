"""Numbers and flags of a call: Python's, numpy's, symbolic ones, and tensors of one element."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnvariants.checks import dense

# what to do with a number that is to be learned, which a call's own numbers cannot be
_LEARN = {
    "scale": "multiply query by it instead",
    "softmax_scale": "multiply q by it instead",
    "softcap": "softcap itself is not learned, so pass softcap.item()",
}


# No call has as many keys, and positions plus more would overflow.
_ENDLESS = 2**62


def in_words(value: Any) -> str:
    """`value` as an error names it: arrays by their shapes, all else by what Python prints."""
    if isinstance(value, Tensor) and (value.is_nested or value.numel() != 1):
        shape = "several shapes" if value.is_nested else f"shape {list(value.shape)}"
        return f"a tensor of {shape} and {value.dtype}"
    if _is_numpy(value) and value.ndim:
        return f"a numpy array of shape {list(value.shape)} and {value.dtype}"
    text = repr(value)
    text = text if len(text) <= 100 else f"{text[:100]}..."
    return f"{text}, which is beyond 64 bits" if _beyond_64_bits(value) else text


def plain(name: str, value: Any) -> Any:
    """Python's number for a number of numpy or in a tensor; anything else as it came.

    Raises:
        ValueError: the number requires a gradient, or its value cannot be known.
    """
    if isinstance(value, Tensor):
        if value.is_nested or value.layout != torch.strided or value.numel() != 1:
            return value
        if value.requires_grad:
            advice = _LEARN.get(name, "pass its .item()")
            raise ValueError(
                f"{name} must be a number, got a tensor that requires a gradient, which it would "
                f"not get; {advice}."
            )
        return _item(name, value)
    if _is_numpy(value) and not value.ndim:
        return value.item()
    return value


def _item(name: str, value: Tensor) -> Any:
    if torch.compiler.is_compiling():
        return value.item()
    try:
        return value.item()
    except RuntimeError:
        raise ValueError(
            f"{name} must be a number, got a tensor without a value that can be read (on the meta "
            "device, fake, or mapped by vmap); pass a Python number."
        ) from None


def _is_numpy(value: Any) -> bool:
    # numpy need not be installed
    return type(value).__module__ == "numpy" and hasattr(value, "ndim")


def is_real(value: Any) -> bool:
    """Whether it is a number, symbolic ones of a call being compiled included; a bool is none."""
    if isinstance(value, bool) or _beyond_64_bits(value):
        return False
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real))


def _beyond_64_bits(value: Any) -> bool:
    """Whether it is an integer of Python that no tensor holds; a symbolic one is none."""
    if torch.compiler.is_compiling() or not isinstance(value, int):
        return False
    return not -(2**63) <= value < 2**63


def is_whole(value: Any) -> bool:
    """Whether it is an integer, likewise."""
    if isinstance(value, bool) or _beyond_64_bits(value):
        return False
    return isinstance(value, (int, torch.SymInt, numbers.Integral))


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a finite float within bounds."""
    number = plain(name, value)
    # comparisons, which a symbolic number of a call being compiled has too
    if not is_real(number) or not abs(number) < math.inf or not low <= number <= high:
        between = "" if low == -math.inf else f" >= {low:g}"
        between += "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(f"{name} must be a finite number{between}, got {in_words(value)}.")
    return float(number)


def check_integer(name: str, value: Any, low: int = 0, what: str = "") -> int:
    """`value` as an integer of at least `low`; `what` adds to the error what it is."""
    number = plain(name, value)
    if not is_whole(number) or number < low:
        raise ValueError(f"{name} must be an integer >= {low}{what}, got {in_words(value)}.")
    return number


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool; 0 and 1 are taken as flash-attn takes them."""
    flag = plain(name, value)
    if isinstance(flag, bool):
        return flag
    if not is_whole(flag) or flag not in (0, 1):
        raise ValueError(f"{name} must be True or False, got {in_words(value)}.")
    return flag == 1


def check_window(window_size: Any) -> tuple[int | None, int | None]:
    """(left, right) with None for unlimited."""
    if window_size is None:
        return None, None
    pair = window_size
    if isinstance(pair, Tensor) and not pair.is_nested and tuple(pair.shape) == (2,):
        pair = pair.unbind()
    elif _is_numpy(pair) and pair.shape == (2,):
        pair = pair.tolist()
    if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
        sizes = [plain("window_size", size) for size in pair]
        if all(size is None or is_whole(size) for size in sizes):
            if any(size is not None and size < -1 for size in sizes):
                raise ValueError(
                    f"window_size must not be negative (but -1, for unlimited), got {tuple(sizes)}."
                )
            left, right = (
                None if size is None or size == -1 or size >= _ENDLESS else size for size in sizes
            )
            return left, right
    raise ValueError(
        "window_size must be two integers (left, right), -1 for unlimited, "
        f"got {in_words(window_size)}."
    )


def check_position(position: Any, device: torch.device) -> int | Tensor:
    """An integer >= 0, or an int64 scalar tensor on `device`, which is not read."""
    if isinstance(position, Tensor):
        dense("position", position)
        whole = position.dtype in (torch.int32, torch.int64)
        if position.dim() or not whole or position.device != device:
            raise ValueError(
                f"position must be an integer or an int64 scalar on {device}, got shape "
                f"{list(position.shape)} of {position.dtype} on {position.device}."
            )
        return position.long()
    number = plain("position", position)
    if not is_whole(number) or number < 0:
        raise ValueError(
            f"position must be an integer >= 0 or an int64 scalar, got {in_words(position)}."
        )
    return number
