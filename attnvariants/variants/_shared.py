"""Formulas that several variants are built from."""

import math

import torch
import torch.nn.functional as F

from attnvariants.context import readable

LOG2E = math.log2(math.e)

# Up to this score exp2 is far from overflow.
_EXP2_RANGE = 40.0

# Under this, log softplus(x) = x - e^x / 2 to 1e-14; above it, softplus(x) is well inside float32.
_TAIL = -15.0
# Row sums of softplus from here on lost nothing to underflow, and neither will n / sum^2.
_SAFE_SUM = 1e-12


def exp_ratio(scores):
    """e^{s - max s} and its row sum."""
    e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return e, e.sum(-1, keepdim=True)


def exp_fused(scores):
    """As `exp_ratio`, of scores times log2 e; may overwrite those that require no gradient.

    torch's exp2 is three times faster than its exp where that goes through MKL.
    """
    peak = scores.amax(-1, keepdim=True).detach()
    e = (scores - peak).exp2() if scores.requires_grad else scores.sub_(peak).exp2_()
    return e, e.sum(-1, keepdim=True)


def softplus_ratio(scores):
    """softplus(s) and its row sum, both times a factor of the row that keeps them representable."""
    weight = F.softplus(scores, threshold=40)
    total = weight.sum(-1, keepdim=True)
    if readable(total) and bool((total > _SAFE_SUM).all()):
        return weight, total
    body = F.softplus(scores.clamp(min=_TAIL), threshold=40).log()
    tail = scores - scores.clamp(max=_TAIL).exp() / 2
    return exp_ratio(torch.where(scores > _TAIL, body, tail))


def softplus_fused(scores):
    """As `softplus_ratio`, of scores times log2 e, quicker where they are ordinary."""
    peak = scores.detach().amax(-1)
    ordinary = float(peak.max()) < _EXP2_RANGE and float(peak.min()) > _TAIL * LOG2E
    if scores.requires_grad or not ordinary:
        return softplus_ratio(scores / LOG2E)
    weight = scores.exp2_().log1p_()
    return weight, weight.sum(-1, keepdim=True)


def unit(x, length=1.0):
    """length x / |x| along the last dimension; a zero vector stays zero, with zero gradient.

    Divided by its largest entry first, whose gradient cancels: |x|^2 would leave the dtype's range
    from 1e19 on and under 1e-19, and the gradient's terms cancel before they are divided.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    alive = largest > 0
    x = x / torch.where(alive, largest, 1.0)
    square = (x * x).sum(-1, keepdim=True)
    return x * (torch.where(alive, square, 1.0).rsqrt() * alive * length)


def is_bounded(case):
    """Whether kernels may take e^x of `scaled_cosine` scores as it is, in bfloat16's range."""
    # the margin is for the rounding of unit vectors
    largest = 1.02 * case.scale * math.log(case.head_dim) * math.log(max(case.kv_len, 1))
    return case.dtype == "bfloat16" and not case.shaped and largest < 80


def scaled_cosine(query, key, rows, **_):
    """Features whose product is log d log n cos(q, k)."""
    length = math.log(query.shape[-1]) * rows.visible.clamp(min=1).log()
    return unit(query, length), unit(key)
