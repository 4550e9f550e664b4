"""What the mask functions of transformers mean, where that is certain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnvariants.context import readable
from attnvariants.hf.names import masking


@dataclass(frozen=True)
class Pattern:
    """What a mask function of transformers says about positions.

    Attributes:
        left: how far before itself a query sees; None is without limit.
        right: how far after itself; 0 is causal.
        documents: `[batch, tokens]` int, nobody sees another's document; None is one document.
    """

    left: int | None = None
    right: int | None = None
    documents: Tensor | None = None

    def within(self, other: Pattern) -> Pattern:
        """What both allow."""
        return Pattern(
            _least(self.left, other.left),
            _least(self.right, other.right),
            self.documents if other.documents is None else other.documents,
        )


def boundaries(documents: Tensor) -> Tensor | None:
    """Where documents begin and end in `[batch, tokens]` of them put one after another, int32.

    None if one of them is not in one piece.
    """
    change = documents.diff(dim=-1)
    if bool((change < 0).any()):
        return None
    first = change.new_ones(documents.shape[0], 1)
    starts = torch.cat([first, change], -1).flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=documents.numel()).to(torch.int32)


def pattern_of(function: Callable[..., Any]) -> Pattern | None:
    """What a mask function means; None if that is not certain."""
    helpers = masking()
    if function is helpers.causal:
        return Pattern(right=0)
    if function is helpers.bidirectional:
        return Pattern()
    if torch.compiler.is_compiling():
        # closures cannot be looked into there
        return None
    kind = _kinds().get(getattr(function, "__code__", None))
    if kind is None:
        return None
    held = dict(
        zip(
            function.__code__.co_freevars,
            (cell.cell_contents for cell in function.__closure__ or ()),
            strict=True,
        )
    )
    return kind(**held)


def _all_of(mask_functions: tuple[Callable[..., Any], ...]) -> Pattern | None:
    whole = Pattern()
    positions = None
    for function in mask_functions:
        part = pattern_of(function)
        if part is None:
            return None
        if isinstance(part, _Remapped):
            positions = part.positions
        whole = whole.within(part)
    if positions is None:
        return whole
    # positions of a document that count up by one differ as the tokens' own do
    documents = whole.documents
    if documents is None or documents.shape != positions.shape:
        return None
    if not readable(positions) or not readable(documents):
        return None
    steps = (positions.diff(dim=-1) == 1) | (documents.diff(dim=-1) != 0)
    return whole if bool(steps.all()) else None


@dataclass(frozen=True)
class _Remapped(Pattern):
    """A pattern of positions that the caller gives."""

    positions: Any = None


def _remapped(mask_function: Callable[..., Any], position_ids: Tensor) -> Pattern | None:
    inner = pattern_of(mask_function)
    if inner is None or inner.documents is not None:
        return None
    return _Remapped(inner.left, inner.right, None, position_ids)


def _packed(packed_sequence_mask: Tensor) -> Pattern:
    return Pattern(documents=packed_sequence_mask)


def _past_window(sliding_window: int) -> Pattern | None:
    return Pattern(left=sliding_window - 1) if isinstance(sliding_window, int) else None


def _both_sides(sliding_window: int) -> Pattern | None:
    whole = isinstance(sliding_window, int)
    return Pattern(left=sliding_window, right=sliding_window) if whole else None


@functools.cache
def _kinds() -> dict[Any, Callable[..., Pattern | None]]:
    """By its code, what each closure that transformers makes means.

    A version of transformers that lacks one, or whose window is another, has it left out.
    """
    helpers = masking()
    dummy = torch.zeros(1, 7, dtype=torch.int64)
    makers: list[tuple[Any, tuple[Any, ...], Callable[..., Pattern | None]]] = [
        (helpers.both, (helpers.causal,), _all_of),
        (helpers.packed, (dummy,), _packed),
        (
            helpers.remapped,
            (helpers.causal, dummy),
            _remapped,
        ),
        (helpers.window, (3,), _past_window),
        (helpers.window_both_sides, (3,), _both_sides),
    ]
    rows, cols = torch.arange(7)[:, None], torch.arange(7)
    kinds = {}
    for maker, arguments, kind in makers:
        if maker is None:
            continue
        function = maker(*arguments)
        if isinstance(arguments[0], int):
            meant = kind(*arguments)
            distance = cols - rows
            expected = distance >= -meant.left  # type: ignore[union-attr, operator]
            if meant.right is not None:  # type: ignore[union-attr]
                expected &= distance <= meant.right  # type: ignore[union-attr]
            if not torch.equal(function(0, 0, rows, cols), expected):
                continue
        kinds[function.__code__] = kind
    return kinds


def _least(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
