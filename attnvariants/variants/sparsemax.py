"""Sparsemax: the projection of the scores onto the simplex, with exact zeros.

    w_j = relu(s_j - tau),    tau such that sum_j w_j = 1

Rows sum to one and most weights are exactly 0.
Source: Martins and Astudillo, 2016, arXiv:1602.02068.
"""

import torch

from attnvariants.registry import Variant

# Above this share of candidates, sweeping the dense rows is cheaper than gathering them.
_DENSE_SHARE = 0.2


@torch.no_grad()
def threshold(z):
    """tau of each row of z, whose maximum is 0: Newton's method from -1 upwards, which is exact.

    The support only shrinks, so it is found when its size stays. Keys at or below -1 are never in
    it; where few are above, they are gathered once and the dense rows are not read again.
    """
    flat = z.reshape(-1, z.shape[-1])
    tau = flat.new_full(flat.shape[:1], -1.0)
    row, column = (flat > -1).nonzero(as_tuple=True)
    if row.numel() > _DENSE_SHARE * flat.numel():
        candidates = flat.clamp(min=-1)

        def spread(rows):
            return rows.unsqueeze(-1)

        def fold(part):
            return part.sum(-1)
    else:
        candidates = flat[row, column]

        def spread(rows):
            return rows[row]

        def fold(part):
            return torch.zeros_like(tau).index_add_(0, row, part)

    size = torch.full_like(tau, torch.inf)
    while True:
        inside = (candidates > spread(tau)).to(z.dtype)
        found = fold(inside)
        # rounding can let a key at tau leave and come back; only rows that shrink may move
        shrunk = found < size
        if not bool(shrunk.any()):
            return tau.view(*z.shape[:-1], 1)
        tau = torch.where(shrunk, (fold(candidates * inside) - 1) / found, tau)
        size = torch.where(shrunk, found, size)


def ratio(scores, rows):
    z = scores - scores.amax(-1, keepdim=True).detach()
    inside = (z > threshold(z)).to(z.dtype)
    # One Newton step at the solution: the same tau, and its exact gradient. Keys at -inf, whose
    # product with 0 would be NaN, are outside wherever -1 is.
    total = (z.clamp(min=-1) * inside).sum(-1, keepdim=True)
    return (z - (total - 1) / inside.sum(-1, keepdim=True)).relu(), None


def fused(scores, rows):
    if scores.requires_grad:
        return ratio(scores, rows)
    z = scores.sub_(scores.amax(-1, keepdim=True))
    return z.sub_(threshold(z)).relu_(), None


VARIANT = Variant(doc=__doc__, ratio=ratio, fused=fused, row_sum="one")
