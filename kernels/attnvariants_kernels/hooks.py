"""The contract between the streaming template and a variant: six functions and a few facts."""

from __future__ import annotations

from typing import Any, NamedTuple

from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.functions import LOG2E, LOWEST


class Case(NamedTuple):
    """What a variant may choose its hooks by.

    How much hooks save, and whether they read n, may depend on the options and the dtype alone:
    torch asks for it before sizes are known.

    Attributes:
        dtype: of query, key and value: "float16", "bfloat16" or "float32".
        head_dim: of the query that `prepare` returns.
        kv_len: number of keys, of the longest sequence if packed.
        scale: the call's score multiplier, > 0.
        shaped: whether a bias or ALiBi adds to the scores.
    """

    dtype: str
    head_dim: int
    kv_len: int
    scale: float
    shaped: bool


class Hooks(NamedTuple):
    """A variant for the streaming kernels: `@jit` functions and compile-time facts.

    A tile of scores comes as `x`, float32, and a multiplier `unit` > 0 such that s = unit x: the
    scale of the call folds into the FMA of an exponential. Hidden keys come with x = `hidden`.
    `keep` is a bool tile in tiles that hide something and None in all others; the template itself
    zeroes weights and score gradients where hidden, so only sums over a tile need care. `cols` are
    the key positions, `n` the number of visible keys of each row, at least 1 (1.0 unless
    `needs_n`), `theta` the variant's runtime numbers. `stats` and `saved` are tuples of rows.

    In `start`, `sweep`, `fold` and `finish` a row value has shape [BLOCK_M], tiles are
    [BLOCK_M, BLOCK_N]; in `grad` and `delta` row values broadcast over the tile, whose rows may
    lie along either axis.

    Attributes:
        start: `start(BLOCK_M) -> stats`, before the first sweep.
        sweep: `sweep(stats, x, unit, keep, cols, n, theta, index) -> stats`: statistics sweep
            `index` over the keys; `no_sweep` where `sweeps` is 0.
        fold: `fold(stats, x, unit, keep, cols, n, theta) -> (stats, weights, rescale)`: the output
            sweep; `rescale` multiplies what was accumulated before, if `rescales`.
        finish: `finish(stats, unit, n, theta) -> (factor, saved)`: the output is the accumulated
            sum times `factor`; `saved` goes to the backward.
        grad: `grad(x, unit, cols, dp, saved, delta, n, theta) -> (weights, ds)`: the normalised
            weights, and the gradient of s from dp = d_out . v and `delta` = (d_out . out, sum of
            `delta`).
        delta: `delta(x, unit, cols, dp, saved, delta0, n, theta) -> tile`, summed over the keys by
            one more sweep, if `delta_sweep`; `no_delta` otherwise.
        hidden: x of a key that is not there.
        saves: length of `saved`.
        sweeps: number of statistics sweeps.
        rescales: whether `fold` returns a rescale.
        needs_n: whether `n` is read.
        needs_delta: whether `grad` reads `delta`.
        delta_sweep: whether `delta` is summed.
        hides: weights and ds come out as 0 where x = `hidden`, so that the template need not see
            to it.
        proportional: weights grow with x, so float16 needs x = s.
        wide: ds can leave float16's range where its products do not: they are taken in TF32, whose
            digits are as many.
        listed: the stats begin with each row's maximum and threshold, which
            `attnvariants_kernels.threshold` finds beforehand and saves, and only the tiles that it
            lists are visited; `start` gives the rest of the stats. `saved` begins with those two
            and has a last plane that `finish` leaves out.
        cost: how many more registers than softmax the variant needs, 0 to 3: it chooses the blocks,
            see `attnvariants_kernels.tuning`, and nothing else.
    """

    start: Any
    sweep: Any
    fold: Any
    finish: Any
    grad: Any
    delta: Any
    hidden: float = float("-inf")
    saves: int = 1
    sweeps: int = 0
    rescales: bool = True
    needs_n: bool = False
    needs_delta: bool = True
    delta_sweep: bool = False
    hides: bool = False
    proportional: bool = False
    wide: bool = False
    listed: bool = False
    cost: int = 0

    @property
    def cache_key(self) -> str:
        """What Triton's disk cache knows the hooks by: their source, and not their names alone."""
        return "-".join(getattr(one, "cache_key", str(one)) for one in self)


@jit
def no_sweep(stats, x, unit, keep, cols, n, theta, index):
    """The `sweep` of variants without statistics sweeps."""
    return stats


@jit
def no_delta(x, unit, cols, dp, saved, delta0, n, theta):
    """The `delta` of variants without a delta sweep."""
    return x


@jit
def peak_and_sum(BLOCK_M: tl.constexpr):
    """Stats (running maximum of the scores in units of log 2, running sum)."""
    return tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)


@jit
def no_stats(BLOCK_M: tl.constexpr):
    """Stats of variants that keep none."""
    return (tl.zeros([BLOCK_M], tl.float32),)


@jit
def log_sum(stats):
    """(1 / sum, log2 of the whole sum) of `peak_and_sum`; (0, huge) for rows without weight."""
    m, l = stats
    some = l > 0
    l = tl.where(some, l, 1.0)
    return tl.where(some, 1.0 / l, 0.0), tl.where(some, m + tl.log2(l), -LOWEST)


@jit
def fold_exp(stats, x, unit, keep, cols, n, theta):
    """e^{s - m}, m the running maximum."""
    m, l = stats
    c = unit * LOG2E
    peak = tl.maximum(m, tl.max(x, 1) * c)
    e = tl.exp2(x * c - peak[:, None])
    rescale = tl.exp2(m - peak)
    return (peak, l * rescale + tl.sum(e, 1)), e, rescale


@jit
def finish_exp(stats, unit, n, theta):
    """1 / sum; saves log2 of the sum."""
    factor, lse = log_sum(stats)
    return factor, (lse,)


@jit
def grad_exp(x, unit, cols, dp, saved, delta, n, theta):
    """w = e^{s - lse}, ds = w (dp - delta)."""
    w = tl.exp2(x * (unit * LOG2E) - saved[0])
    return w, w * (dp - delta[0])


SOFTMAX = Hooks(
    start=peak_and_sum,
    sweep=no_sweep,
    fold=fold_exp,
    finish=finish_exp,
    grad=grad_exp,
    delta=no_delta,
    hides=True,
)
