"""A variant of one's own: its formula gives two engines, six small hooks the fused kernels.

Without a GPU the kernels are interpreted, which needs TRITON_INTERPRET=1 from the start:

    TRITON_INTERPRET=1 python examples/add_a_variant.py
"""

import torch

from attnvariants import Option, Variant, attention, register
from attnvariants.testing import conformance
from attnvariants_kernels import functions as fn
from attnvariants_kernels._triton import INTERPRETED, jit, tl
from attnvariants_kernels.hooks import Hooks, no_delta, no_sweep

SOFTMAX_N = """Softmax with room for n more keys of score 0: heads can stay silent.

    w_j = e^{s_j} / (n + sum_k e^{s_k})

Rows sum to less than one.
"""


def ratio(scores, rows, *, n):
    """Numerator and denominator; hidden keys come in as -inf, so they add e^-inf = 0."""
    peak = scores.amax(-1, keepdim=True).detach().clamp(min=0)
    e = (scores - peak).exp()
    return e, e.sum(-1, keepdim=True) + n * (-peak).exp()


@jit
def start(BLOCK_M: tl.constexpr):
    """A running maximum of at least 0, and a running sum."""
    return tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)


@jit
def fold(stats, x, unit, keep, cols, n, theta):
    """One tile of keys: new statistics, weights, and what rescales the weights so far."""
    m, l = stats
    c = unit * fn.LOG2E
    peak = tl.maximum(m, tl.max(x, 1) * c)
    e = tl.exp2(x * c - peak[:, None])
    rescale = tl.exp2(m - peak)
    return (peak, l * rescale + tl.sum(e, 1)), e, rescale


@jit
def finish(stats, unit, n, theta):
    """What the sum of weights times values is multiplied by, and what the backward needs."""
    m, l = stats
    total = l + theta[0] * tl.exp2(-m)
    return 1.0 / total, (m + tl.log2(total),)


@jit
def grad(x, unit, cols, dp, saved, delta, n, theta):
    """The weights again, and the gradient of the scores."""
    w = tl.exp2(x * (unit * fn.LOG2E) - saved[0])
    return w, w * (dp - delta[0])


VARIANT = register(
    "softmax_n",
    Variant(
        doc=SOFTMAX_N,
        ratio=ratio,
        options={"n": Option(1.0, "number of silent keys", above=0.0)},
        row_sum="at most one",
        # the two hooks that it has no use for are ready made
        hooks=Hooks(start, no_sweep, fold, finish, grad, no_delta, hides=True),
        theta=lambda options, case: (float(options["n"]),),
    ),
)

if __name__ == "__main__":
    query, key, value = (torch.randn(1, 4, 32, 16, dtype=torch.float64) for _ in range(3))
    dense = attention(query, key, value, "softmax_n", causal=True, impl="reference")
    blocks, stats = attention(query, key, value, "softmax_n", causal=True, return_stats=True)
    print("engines agree to", float((dense - blocks).abs().max()))
    print("rows sum to at most", float(stats.mass.max()))
    print("chunked:", conformance("softmax_n", impl="chunked", tolerance=2e-5))
    if INTERPRETED or torch.cuda.is_available():
        device = "cpu" if INTERPRETED else "cuda"
        tolerance = 1e-5 if INTERPRETED else 1e-4
        print("triton:", conformance("softmax_n", device=device, tolerance=tolerance))
    else:
        print("triton: needs a GPU, or TRITON_INTERPRET=1 in the environment")
