"""A variant of one's own, from its formula alone: both engines, gradients, masks, patching."""

import torch

from attnvariants import Option, Variant, attention, register

SOFTMAX1 = """Softmax off by one, with a learned sink logit.

    w_j = e^{s_j} / (e^c + sum_k e^{s_k})

A head can stay silent: rows sum to less than one.
"""


def ratio(scores, rows, *, c):
    """Numerator and denominator; hidden keys come in as -inf, so they add e^-inf = 0."""
    peak = scores.amax(-1, keepdim=True).detach().clamp(min=0)
    e = (scores - peak).exp()
    return e, e.sum(-1, keepdim=True) + (c - peak).exp()


register(
    "softmax1",
    Variant(
        doc=SOFTMAX1,
        ratio=ratio,
        options={"c": Option(0.0, "logit of the sink, one per head", learned=True)},
        default_learned=("c",),
        row_sum="at most one",
    ),
)

query, key, value = (torch.randn(1, 4, 32, 16, dtype=torch.float64) for _ in range(3))
c = torch.zeros(4, dtype=torch.float64, requires_grad=True)
dense = attention(query, key, value, "softmax1", causal=True, c=c, impl="reference")
blocks, stats = attention(query, key, value, "softmax1", causal=True, c=c, return_stats=True)
print("engines agree to", float((dense - blocks).detach().abs().max()))
print("rows sum to at most", float(stats.mass.max()))
blocks.sum().backward()
print("gradient of the sink logits:", [round(g, 3) for g in c.grad.tolist()])
