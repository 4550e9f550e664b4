"""The plain dense formulas, as one writes them first: what the engines are measured against."""

import math

import torch
import torch.nn.functional as F


def scores_of(q, k, scale, hidden):
    s = scale * (q @ k.transpose(-1, -2))
    future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return s.masked_fill(future, hidden)


def softmax(q, k, v):
    s = scores_of(q, k, q.shape[-1] ** -0.5, -math.inf)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ v


def ssmax(q, k, v):
    n = torch.arange(1, q.shape[-2] + 1, device=q.device).view(-1, 1)
    return softmax(q * n.log(), k, v)


def softpick(q, k, v):
    s = scores_of(q, k, q.shape[-1] ** -0.5, -math.inf)
    m = s.amax(-1, keepdim=True).clamp(min=0)
    e = (torch.exp(s - m) - torch.exp(-m)).masked_fill(s == -math.inf, 0)
    return e.relu() / (e.abs().sum(-1, keepdim=True) + 1e-6) @ v


def lssa(q, k, v):
    n = torch.arange(1, q.shape[-2] + 1, device=q.device).view(-1, 1)
    q, k = F.normalize(q, dim=-1) * n.log(), F.normalize(k, dim=-1)
    w = F.softplus(scores_of(q, k, math.log(q.shape[-1]), -math.inf))
    return w / w.sum(-1, keepdim=True) @ v


def sa_softmax(q, k, v):
    s = scores_of(q, k, q.shape[-1] ** -0.5, -1e30)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return s * (e / e.sum(-1, keepdim=True)) @ v


def relu(q, k, v):
    n = torch.arange(1, q.shape[-2] + 1, device=q.device).view(-1, 1)
    return scores_of(q, k, q.shape[-1] ** -0.5, 0.0).relu() / n @ v


def sparsemax(q, k, v):
    from entmax import sparsemax as entmax_sparsemax

    return entmax_sparsemax(scores_of(q, k, q.shape[-1] ** -0.5, -1e30), dim=-1) @ v


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
