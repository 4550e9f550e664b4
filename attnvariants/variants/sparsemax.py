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

    Only keys above -1 can be in the support, so they are gathered once where they are few.
    """
    shape = z.shape[:-1]
    flat = z.reshape(-1, z.shape[-1])
    candidate = flat > -1
    row, column = candidate.nonzero(as_tuple=True)
    if row.numel() > _DENSE_SHARE * flat.numel():
        return _newton(flat, lambda part: part.sum(-1)).view(*shape, 1)
    size = flat.shape[0]

    def fold(part):
        return part.new_zeros(size).index_add_(0, row, part)

    return _newton(flat[row, column], fold, row).view(*shape, 1)


def _newton(z, fold, row=None):
    tau, support = None, None
    while True:
        if tau is None:
            inside = z > -1
        else:
            inside = z > (tau.unsqueeze(-1) if row is None else tau[row])
        count = fold(inside.to(z.dtype))
        if support is not None and torch.equal(count, support):
            return tau
        support = count
        tau = (fold(torch.where(inside, z, 0.0)) - 1) / count


def ratio(scores, rows):
    z = scores - scores.amax(-1, keepdim=True).detach()
    inside = z > threshold(z)
    # One Newton step at the solution: the same tau, and its exact gradient.
    tau = (torch.where(inside, z, 0.0).sum(-1, keepdim=True) - 1) / inside.sum(-1, keepdim=True)
    return torch.where(inside, z - tau, 0.0).clamp(min=0), None


def inplace(scores, rows):
    z = scores.sub_(scores.amax(-1, keepdim=True))
    return z.sub_(threshold(z)).relu_(), None


VARIANT = Variant(doc=__doc__, ratio=ratio, inplace=inplace, row_sum="one")
