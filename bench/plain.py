"""The plain dense formulas, as the papers print them: what the engines are measured against."""

import math

import torch
import torch.nn.functional as F


def scores_of(q, k, scale=None):
    return (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.transpose(-1, -2))


def future(s):
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)


def visible_keys(s):
    return torch.arange(1, s.shape[-1] + 1, dtype=s.dtype, device=s.device).view(-1, 1)


def softmax_of(s):
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def softmax(q, k, v):
    s = scores_of(q, k)
    return softmax_of(s.masked_fill(future(s), -math.inf)) @ v


def ssmax(q, k, v):
    s = scores_of(q, k)
    return softmax_of((visible_keys(s).log() * s).masked_fill(future(s), -math.inf)) @ v


def softpick(q, k, v):
    s = scores_of(q, k)
    s = s.masked_fill(future(s), -math.inf)
    m = s.amax(-1, keepdim=True).clamp(min=0)
    e = (torch.exp(s - m) - torch.exp(-m)).masked_fill(future(s), 0)
    return e.relu() / (e.abs().sum(-1, keepdim=True) + 1e-6) @ v


def lssa(q, k, v):
    s = scores_of(F.normalize(q, dim=-1), F.normalize(k, dim=-1), 1.0)
    w = F.softplus(math.log(q.shape[-1]) * visible_keys(s).log() * s) * ~future(s)
    return w / w.sum(-1, keepdim=True) @ v


def sa_softmax(q, k, v):
    s = scores_of(q, k)
    p = softmax_of(s.masked_fill(future(s), -math.inf))
    return s * p @ v


def relu(q, k, v):
    s = scores_of(q, k)
    return s.relu() * ~future(s) / visible_keys(s) @ v


def sparsemax(q, k, v):
    from entmax import sparsemax as entmax_sparsemax

    s = scores_of(q, k)
    return entmax_sparsemax(s.masked_fill(future(s), -1e30), dim=-1) @ v


# variant, its options, the plain formula, whether the variant needs one pass over the keys
ROWS = {
    "softmax": ({}, softmax, True),
    "ssmax": ({}, ssmax, True),
    "softpick": ({}, softpick, True),
    "lssa": ({}, lssa, True),
    "sa_softmax": ({"form": "x"}, sa_softmax, True),
    "relu": ({}, relu, True),
    "sparsemax": ({}, sparsemax, False),
}
