"""Formulas that several variants are built from."""

import math

import torch
import torch.nn.functional as F

# Under this, log softplus(x) = x - e^x / 2 to 1e-14; above it, softplus(x) is well inside float32.
_TAIL = -15.0


def exp_ratio(scores):
    """e^{s - max s} and its row sum."""
    e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return e, e.sum(-1, keepdim=True)


def exp_ratio_inplace(scores):
    """As `exp_ratio`, overwriting the scores."""
    e = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return e, e.sum(-1, keepdim=True)


def softplus_ratio(scores):
    """softplus(s) and its row sum, both times a factor of the row that keeps them representable."""
    if bool((scores.amax(-1) > _TAIL).all()):
        weight = F.softplus(scores, threshold=40)
        return weight, weight.sum(-1, keepdim=True)
    body = F.softplus(scores.clamp(min=_TAIL), threshold=40).log()
    tail = scores - scores.clamp(max=_TAIL).exp() / 2
    return exp_ratio(torch.where(scores > _TAIL, body, tail))


def unit(x):
    """x / |x| along the last dimension; a zero vector stays zero, with zero gradient."""
    square = (x * x).sum(-1, keepdim=True)
    alive = square > 0
    return x * torch.where(alive, square, 1.0).rsqrt() * alive


def scaled_cosine(query, key, rows, **_):
    """Features whose product is log d log n cos(q, k)."""
    scale = math.log(query.shape[-1]) * rows.visible.clamp(min=1).log()
    return unit(query) * scale, unit(key)
