"""Tensors for `bench.gpu`: Gaussian scores, and peaked ones such as trained heads have."""

from __future__ import annotations

import torch

# Rows of the peaked scores: half look at a recent key, most others at one of a few keys that many
# rows share, a tenth nowhere in particular. A causal sparsemax then leaves 42 % of its 64 x 64
# tiles empty at 4,096 tokens and head_dim 128, and 57 % at 8,192 (34 and 48 % at 64): no more than
# AdaSplash-2 (arXiv:2604.15180) reports of trained models, 51 and 58 % with entmax 1.5.
LOCAL, SHARED = 0.5, 0.4
PEAK = 7.0


def seeded(device, seed):
    return torch.Generator(device=device).manual_seed(seed)


def peaked_queries(query, key, generator):
    """Add to most queries a multiple of the key they look at, whose score then is near `PEAK`.

    All other scores stay Gaussian of standard deviation near 1, so that some of them join the
    support of a sparse row, the more the longer the row.
    """
    batch, heads, length, dim = key.shape
    shape = batch, heads, length
    device = key.device

    def uniform():
        return torch.rand(shape, generator=generator, device=device)

    place = torch.arange(length, device=device).expand(shape)
    recent = (place - (64 * uniform().square()).long()).clamp(min=0)
    # every 1,024th key, the first one, a sink, among them
    shared = (uniform() * (place // 1024 + 1)).long() * 1024
    kind = uniform()
    target = torch.where(kind < LOCAL, recent, shared)
    strength = torch.where(kind < LOCAL + SHARED, PEAK / dim**0.5, 0.0).to(key.dtype)
    looked_at = key.gather(2, target.unsqueeze(-1).expand_as(key))
    return query + strength.unsqueeze(-1) * looked_at


def make(shape, device, dtype, scores="gaussian", tokens_first=False, seed=0):
    """q, k, v and a gradient of the output, contiguous in the layout asked for."""
    generator = seeded(device, seed)
    size = shape.batch, shape.heads, shape.length, shape.head_dim
    q, k, v, grad = (
        torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(4)
    )
    if scores == "peaked":
        q = peaked_queries(q, k, generator)
    tensors = (q, k, v, grad)
    if tokens_first:
        tensors = tuple(t.transpose(1, 2).contiguous() for t in tensors)
    return tensors


def empty_tiles(weights, size=64):
    """Share of the size x size tiles at or below the diagonal in which every weight is 0."""
    length = weights.shape[-1] // size * size
    tiles = weights[..., :length, :length].unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    busy = (tiles != 0).any(-1).any(-2)
    past = torch.ones(busy.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    return 1.0 - float(busy[..., past].double().mean())
