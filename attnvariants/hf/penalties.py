"""Which entries of a model's additive mask hide a key, and which are a position's bias.

To a softmax a key at -10000 is as good as absent, so that many models hide keys by a number that
is nowhere near the lowest of its dtype: -1e4, -1e9, float16's minimum in a wider dtype, -100 in
windows. To every other variant such a key is there, and counts. ALiBi, on the other hand, gives
-30000 to a key that is visible. What tells the two apart is not how low a number is:

1. At or below half the minimum of its own dtype, or -1e8, no bias reaches: hidden.
2. A mask of a few values, each 50 or more below the largest, holds nothing but penalties. Where
   heads differ in it they must agree on the lowest.
3. Bias and penalties summed: below the visible scores of some head there is a gap, its far side
   at least 50 below the head's largest score and 1.5 times as far as its near side (4 times, if no
   other head can tell), and in all heads whose own bias does not drown it the keys beyond are lower
   by the same number, within a half of it. A penalty is one number for all heads; the slopes of
   ALiBi, whose gaps (between far keys that are kept and near ones) look alike, differ sixteenfold,
   and a bucket of one head's learned bias is that head's alone.

Penalties within the range of every head's own bias, and those that differ by head below a bias,
stay added: nothing tells them from one.

All of it is arithmetic on tensors, so that it holds where values cannot be read, as in a graph
that is being compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from attnvariants.context import readable

AUTO, ADDED = "auto", "added"
# Attribute of a patched module: the numbers in its masks that were read as "hidden".
PENALTIES = "_attn_penalties"

# No sum of position biases is as low, whatever the length.
_LOWEST_BIAS = -1e8
# A key this far below another has no softmax weight worth the name: e^-50 is 2e-22.
_LEAST = 50.0
# A mask of one value throughout compares with nothing; this low it can be no bias of one key.
_ALONE = -1e3
# Different penalties and sums of them that a mask without a bias may hold.
_VALUES = 4
# Gaps below a bias that are looked at, and where nothing can be read that would end the search.
_ROUNDS, _BLIND_ROUNDS = 16, 2
# Distances below a head's largest score are sorted into bins, so many to a factor of 2.
_BINS, _NEAREST = 8, 8.0
_BIN_COUNT = math.ceil(_BINS * math.log2(-2 * _LOWEST_BIAS / _NEAREST))
_FAR = math.floor(_BINS * math.log2(_LEAST / _NEAREST))
# Entries of some heads that are compared at once.
_AT_ONCE = 1 << 24
# Empty bins and one: 1.5 times as far, and 4 times.
_GAP, _WIDE_GAP = 6, 17


class Split(NamedTuple):
    """An additive mask taken apart, as arguments of `attention`.

    Attributes:
        keep: its `attn_mask`, bool, or float where there is something to add: then -inf hides.
        bias: its `bias`, if what is added has a gradient.
        penalties: the highest and the lowest number that was read as "hidden", without those that
            a dtype's minimum hides; empty where values cannot be read.
    """

    keep: Tensor | None
    bias: Tensor | None = None
    penalties: tuple[float, ...] = ()


class _Reading(NamedTuple):
    """What is known of a mask without holding it: `keep` is None if nothing is hidden."""

    keep: Tensor | None
    adds: bool
    penalties: tuple[float, ...]


def check_penalties(penalties: Any) -> None:
    """Whether this says which additive entries hide.

    Raises:
        ValueError: it is neither "auto", "added" nor a negative number.
    """
    number = isinstance(penalties, (int, float)) and not isinstance(penalties, bool)
    if (
        penalties in (AUTO, ADDED)
        if isinstance(penalties, str)
        else number and -math.inf < penalties < 0
    ):
        return
    raise ValueError(
        f"penalties must be {AUTO!r}, {ADDED!r} or the negative number at or below which an "
        f"additive mask hides a key, got {penalties!r}."
    )


# To look into a mask takes time, and all layers of a model may share one.
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


def split(mask: Tensor, rule: str | float = AUTO, blind: bool = True) -> Split:
    """Take an additive mask `[batch, heads, q_len, kv_len]` (sizes may be 1) apart.

    Args:
        rule: which entries hide: "auto", those that this module says; "added", those at or below
            half the minimum of the mask's dtype; a number, those at or below it, too.
        blind: whether penalties may leave a row without a visible key. If not, such rows keep
            them as a bias, which a softmax does not notice.
    """
    reading = _reading(mask, rule, blind)
    if reading.keep is None:
        return Split(None, mask) if mask.requires_grad else Split(mask)
    if not reading.adds:
        return Split(reading.keep, None, reading.penalties)
    if mask.requires_grad:
        return Split(reading.keep, mask.masked_fill(~reading.keep, 0.0), reading.penalties)
    return Split(mask.masked_fill(~reading.keep, -math.inf), None, reading.penalties)


def split_in(module: nn.Module, mask: Tensor, spec: Any) -> Split:
    """The mask of a call of a patched module, which remembers the penalties in it.

    Args:
        spec: what the module computes, see `holder`.
    """
    parts = split(mask, spec.penalties, blind=spec.variant != "softmax")
    if parts.penalties:
        module.__dict__.setdefault(PENALTIES, set()).update(parts.penalties)
    return parts


def _reading(mask: Tensor, rule: str | float, blind: bool) -> _Reading:
    if not readable(mask) or mask.is_inference():
        return _read_now(mask.detach(), rule, blind, mask.requires_grad)
    version, known = _read.get(mask, (None, {}))
    if version != mask._version:
        known = {}
        _read[mask] = mask._version, known
    key = rule, blind
    if key not in known:
        known[key] = _read_now(mask.detach(), rule, blind, mask.requires_grad)
    return known[key]


def _read_now(values: Tensor, rule: str | float, blind: bool, learned: bool) -> _Reading:
    lowest = values <= torch.finfo(values.dtype).min / 2
    hidden = lowest
    if rule == AUTO:
        hidden = hidden_in(values)
    elif not isinstance(rule, str):
        hidden = lowest | (values <= rule)
    if not blind:
        hidden = lowest | (hidden & ~hidden.all(-1, keepdim=True))
    if not readable(values):
        return _Reading(~hidden, True, ())
    if not bool(hidden.any()):
        return _Reading(None, True, ())
    low = values[hidden & ~lowest]
    ends = {float(f"{float(end):.4g}") for end in (low.max(), low.min())} if low.numel() else ()
    adds = learned or bool((~hidden & (values != 0)).any())
    return _Reading(~hidden, adds, tuple(sorted(ends, reverse=True)))


def hidden_in(mask: Tensor) -> Tensor:
    """Where an additive mask `[batch, heads, q_len, kv_len]` hides a key, bool of its shape."""
    can_read = readable(mask)
    values = mask.detach()
    hidden = values <= max(torch.finfo(values.dtype).min / 2, _LOWEST_BIAS)
    values = values.to(torch.float32)
    # NaN and +inf are neither
    free = values.isfinite() & ~hidden
    most, least = _amax(values, free), -_amax(-values, free)
    if can_read and not (float(most - least) >= _LEAST or float(most) <= _ALONE):
        return hidden
    alone = free & (most == least) & (most <= _ALONE)
    pure = _pure(values, free, most)
    hidden = hidden | alone | pure
    if can_read and bool((alone | pure).any()):
        return hidden
    # where the mask is pure nothing is left to be found
    refused: Tensor | None = None
    for _ in range(_ROUNDS if can_read else _BLIND_ROUNDS):
        found, gap, refused = _beyond_gap(values, free & ~hidden, refused)
        if can_read and not bool(gap >= _GAP):
            break
        hidden = hidden | found
    return hidden


def _pure(values: Tensor, free: Tensor, most: Tensor) -> Tensor:
    """The penalties of a mask that holds nothing else (rule 2); nothing if it holds more."""
    low = free & (values <= most - _LEAST)
    only = (low | (values == most) | ~free).all()
    by_head = [tensor.transpose(0, 1).flatten(1) for tensor in (values, low)]
    lowest = -_amax(-by_head[0], by_head[1], 1)
    agree = ((lowest == lowest.min()) | ~by_head[1].any(1)).all()
    rest = low
    for _ in range(_VALUES):
        rest = rest & (values < _amax(values, rest))
    return low & only & agree & ~rest.any()


def _beyond_gap(
    values: Tensor, free: Tensor, refused: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The penalties beyond the widest gap below a bias (rule 3), if that is what they are.

    Args:
        refused: `[heads, bins]` bool, gaps that are none of a penalty.

    Returns:
        Where they are, the width of the gap in bins, and the gaps now known to be none.
    """
    shape = values.shape
    # [heads, positions]
    values, free = (tensor.transpose(0, 1).flatten(1) for tensor in (values, free))
    heads = len(values)
    taken = _by_head(_taken, values, free)
    index = torch.arange(_BIN_COUNT, device=values.device)
    lower = taken[:, None] & (index < index[:, None])
    before = torch.where(lower, index, -1).amax(-1)
    candidate = taken & (before >= 0) & (index >= _FAR)
    if refused is not None:
        candidate = candidate & ~refused
    else:
        refused = torch.zeros_like(candidate)
    width = torch.where(candidate, index - before, 0)
    best = width.flatten().argmax()
    head, edge = best // _BIN_COUNT, best % _BIN_COUNT
    there = free.index_select(0, head[None])
    beyond = there & (_bins(values.index_select(0, head[None]), there) >= edge)
    drop, spread, has = _by_head(
        lambda values, free: _compared(values, free & there & ~beyond, free & beyond), values, free
    ).unbind(1)
    own = drop.index_select(0, head[None])
    has = has.bool()
    tells = has & (spread <= own)
    agree = ((drop - own).abs() <= own / 2) | ~tells
    gap = width.flatten().index_select(0, best[None])
    enough = (gap >= (_WIDE_GAP if heads == 1 else _GAP)) & (tells.sum() >= min(heads, 2))
    accepted = agree.all() & enough
    refused = refused | (
        ~accepted & (index == edge) & (torch.arange(heads, device=values.device)[:, None] == head)
    )
    found = free & beyond & accepted
    return found.unflatten(1, (shape[0], *shape[2:])).transpose(0, 1), gap, refused


def _by_head(function: Callable[..., Tensor], values: Tensor, free: Tensor) -> Tensor:
    """A function of some heads at once, `[heads, positions]`, so that large masks fit in memory."""
    heads = len(values)
    if readable(values):
        heads = max(1, _AT_ONCE // max(values.shape[1], 1))
    parts = zip(values.split(heads), free.split(heads), strict=True)
    return torch.cat([function(*part) for part in parts])


def _bins(values: Tensor, free: Tensor) -> Tensor:
    """In which bin of distances below its head's largest score each entry is."""
    distance = (_amax(values, free, 1)[:, None] - values).masked_fill(~free, 0.0)
    bins = (distance.clamp(min=_NEAREST) / _NEAREST).log2().mul(_BINS).long()
    return bins.clamp(max=_BIN_COUNT - 1)


def _taken(values: Tensor, free: Tensor) -> Tensor:
    """Which bins hold entries, bool `[heads, bins]`."""
    counts = torch.zeros(len(values), _BIN_COUNT, device=values.device)
    return counts.scatter_reduce(1, _bins(values, free), free.float(), "amax").bool()


def _compared(values: Tensor, near: Tensor, beyond: Tensor) -> Tensor:
    """`[heads, 3]`: from the mean of the visible down to the highest of the others, the range of
    the visible, and whether there are both."""
    mean = torch.where(near, values, 0.0).double().sum(1) / near.sum(1).clamp(min=1)
    drop = mean.float() - _amax(values, beyond, 1)
    spread = _amax(values, near, 1) + _amax(-values, near, 1)
    return torch.stack([drop, spread, (near.any(1) & beyond.any(1)).float()], 1)


def _amax(values: Tensor, where: Tensor, dim: int | None = None) -> Tensor:
    values = values.masked_fill(~where, -math.inf)
    return values.amax() if dim is None else values.amax(dim)
