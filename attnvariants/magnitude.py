"""Which calls leave the range in which float32 computes them without overflow or underflow.

Products of queries and keys of 1e20 are beyond float32, and sums of them would be NaN; the engines
in torch compute such calls in float64, and round the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnvariants.context import readable
from attnvariants.problem import Problem

# Scores, their squares and what gradients multiply them by stay inside float32.
_LARGEST_SCORE, _SMALLEST_SCORE = 2.0**60, 2.0**-40
_LARGEST_VALUE, _SMALLEST_VALUE = 2.0**60, 2.0**-60
# a value times a query or a key, of which gradients are sums
_LARGEST_PRODUCT = 2.0**90


def beyond_float32(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> bool:
    """Whether a prepared call that is computed in float32 is to be computed in float64.

    False where values cannot be looked at, as in a call being compiled, and on devices that have no
    float64. NaN is nobody's magnitude.
    """
    tensors = query, key, value
    if value.dtype == torch.float64 or value.device.type == "mps":
        return False
    if not all(tensor.numel() and readable(tensor) for tensor in tensors):
        return False
    q, k = _largest(query), _largest(key)
    score = abs(problem.scale) * query.shape[-1] * q * k
    if score > _LARGEST_SCORE or 0 < score < _SMALLEST_SCORE:
        return True
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        # weights of values are means or small multiples: only gradients multiply twice
        return False
    v = _largest(value)
    if v > _LARGEST_VALUE or 0 < v < _SMALLEST_VALUE:
        return True
    return v * max(q, k) > _LARGEST_PRODUCT


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor.detach())
    return max(-float(low), float(high))
