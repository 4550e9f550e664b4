"""The contract between the streaming template and a variant: six functions and a few facts."""

from __future__ import annotations

from typing import Any, NamedTuple

from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.functions import LOG2E, LOWEST, product

# Of |s| log2 e, where half a unit of float32 is 4: float16 holds the factor 2^4.
_HUGE = tl.constexpr(2.0**26)


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
        scaled: weights, of `fold` or of `grad`, may be far from 1 in all of a row: see
            `attnvariants_kernels.tiles.add_product`. Score gradients always may.
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
    scaled: bool = False
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
    """Stats (running maximum of x, running sum)."""
    return tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)


@jit
def no_stats(BLOCK_M: tl.constexpr):
    """Stats of variants that keep none."""
    return (tl.zeros([BLOCK_M], tl.float32),)


@jit
def power_of_two(x, peak, unit):
    """2^((x - peak) unit log2 e), x <= peak.

    The difference comes first: it is exact where x is near its maximum, however large both are.
    """
    return tl.exp2((x - peak) * (unit * LOG2E))


@jit
def power_of_two_fast(x, peak, unit):
    """The same in one FMA an element, whose pivot is a rounded product.

    That is a factor of the row, which its sum takes off. Only where it could leave float16's range,
    and neighbours of a float32 are far more apart than weights can be, the product is made exact by
    a multiplier that is a power of two.
    """
    rate = peak * 0.0 + unit * LOG2E
    huge = tl.abs(peak) * rate > _HUGE
    whole = (rate.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    rate = tl.where(huge, tl.minimum(whole, 1.0), rate)
    return tl.exp2(x * rate - peak * rate)


@jit
def inverse(total):
    """1 / total, 0 where that is 0."""
    return tl.where(total > 0, 1.0 / total, 0.0)


@jit
def pivot_and_share(stats):
    """(pivot, 1 / sum) of (peak, sum): (0, 0) for rows without weight."""
    return tl.where(stats[1] > 0, stats[0], 0.0), inverse(stats[1])


@jit
def log_sum(pivot, total):
    """pivot + log2 total; huge where that is 0."""
    some = total > 0
    return tl.where(some, pivot + tl.log2(tl.where(some, total, 1.0)), -LOWEST)


@jit
def _fold(stats, x, unit, POWER: tl.constexpr):
    m, l = stats
    peak = tl.maximum(m, tl.max(x, 1))
    e = POWER(x, peak[:, None], unit)
    rescale = power_of_two(m, peak, unit)
    return (peak, l * rescale + tl.sum(e, 1)), e, rescale


@jit
def fold_exp(stats, x, unit, keep, cols, n, theta):
    """e^{s - m}, m the running maximum."""
    return _fold(stats, x, unit, power_of_two)


@jit
def fold_exp_fast(stats, x, unit, keep, cols, n, theta):
    """The same by `power_of_two_fast`."""
    return _fold(stats, x, unit, power_of_two_fast)


@jit
def finish_exp(stats, unit, n, theta):
    """1 / sum; saves the maximum and 1 / sum."""
    return inverse(stats[1]), pivot_and_share(stats)


@jit
def normalised(x, unit, saved):
    """e^{s - m} / sum of what `finish_exp` saved."""
    # the backward's own product may round to more than the forward's maximum
    return tl.exp2(tl.minimum((x - saved[0]) * (unit * LOG2E), 0.0)) * saved[1]


@jit
def finish_exp_fast(stats, unit, n, theta):
    """1 / sum; saves log2 of the whole sum."""
    lse = log_sum(product(stats[0], unit * LOG2E), stats[1])
    # as many rows as `finish_exp` saves
    return inverse(stats[1]), (lse, lse)


@jit
def normalised_fast(x, unit, saved):
    """e^{s - m} / sum of what `finish_exp_fast` saved, in one row value.

    Where float32 numbers near s are further apart than the logarithm of the sum, from 1e6 or so on,
    the sum is lost: several keys of exactly the largest score get a weight of 1 each.
    """
    return tl.exp2(product(x, unit * LOG2E) - saved[0])


@jit
def grad_exp_fast(x, unit, cols, dp, saved, delta, n, theta):
    """As `grad_exp`."""
    w = tl.minimum(normalised_fast(x, unit, saved), 1.0)
    return w, w * (dp - delta[0])


@jit
def grad_exp(x, unit, cols, dp, saved, delta, n, theta):
    """w = e^{s - m} / sum, ds = w (dp - delta)."""
    w = normalised(x, unit, saved)
    return w, w * (dp - delta[0])


def far(case: Case) -> bool:
    """Whether scores may be far from 0 in a whole row, and as exact as their differences.

    Then an exponent is a difference first: float32's digits, or a bias as large as a mask's, would
    not survive the multiplication by log2 e.
    """
    return case.dtype == "float32" or case.shaped


_SOFTMAX = Hooks(
    start=peak_and_sum,
    sweep=no_sweep,
    fold=fold_exp,
    finish=finish_exp,
    grad=grad_exp,
    delta=no_delta,
    saves=2,
    hides=True,
)
_SOFTMAX_FAST = _SOFTMAX._replace(fold=fold_exp_fast, finish=finish_exp_fast, grad=grad_exp_fast)


def softmax(options: Any, case: Case) -> Hooks:
    """The hooks of softmax, as a variant's `hooks`."""
    return _SOFTMAX if far(case) else _SOFTMAX_FAST
