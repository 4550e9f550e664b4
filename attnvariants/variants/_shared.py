"""Formulas that several variants are built from."""

import math

import torch
import torch.nn.functional as F

LOG2E = math.log2(math.e)

# Under this, log softplus(x) = x - e^x / 2 to 1e-14; above it, softplus(x) is well inside float32.
_TAIL = -15.0
# Up to this score e^x is far from overflow.
_HEAD = 60.0
# Row sums of softplus from here on lost nothing to underflow, and neither will n / sum^2.
_SAFE_SUM = 1e-12


def exp_ratio(scores):
    """e^{s - max s} and its row sum."""
    e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return e, e.sum(-1, keepdim=True)


def exp_fused(scores):
    """As `exp_ratio`; may overwrite scores that require no gradient."""
    peak = scores.amax(-1, keepdim=True).detach()
    # torch's exp2 is three times faster than its exp where that goes through MKL
    if scores.requires_grad:
        e = ((scores - peak) * LOG2E).exp2()
    else:
        e = scores.sub_(peak).mul_(LOG2E).exp2_()
    return e, e.sum(-1, keepdim=True)


def softplus_ratio(scores):
    """softplus(s) and its row sum, both times a factor of the row that keeps them representable."""
    weight = F.softplus(scores, threshold=40)
    total = weight.sum(-1, keepdim=True)
    if bool((total > _SAFE_SUM).all()):
        return weight, total
    body = F.softplus(scores.clamp(min=_TAIL), threshold=40).log()
    tail = scores - scores.clamp(max=_TAIL).exp() / 2
    return exp_ratio(torch.where(scores > _TAIL, body, tail))


def softplus_fused(scores):
    """As `softplus_ratio`, in half its time where the scores are ordinary."""
    peak = scores.amax(-1)
    if scores.requires_grad or float(peak.max()) > _HEAD or float(peak.min()) < _TAIL:
        return softplus_ratio(scores)
    weight = scores.mul_(LOG2E).exp2_().log1p_()
    return weight, weight.sum(-1, keepdim=True)


def unit(x, length=1.0):
    """length x / |x| along the last dimension; a zero vector stays zero, with zero gradient."""
    square = (x * x).sum(-1, keepdim=True)
    alive = square > 0
    return x * (torch.where(alive, square, 1.0).rsqrt() * alive * length)


def scaled_cosine(query, key, rows, **_):
    """Features whose product is log d log n cos(q, k)."""
    length = math.log(query.shape[-1]) * rows.visible.clamp(min=1).log()
    return unit(query, length), unit(key)
