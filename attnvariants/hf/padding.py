"""The inputs of a self-test with some of their tokens hidden by a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf.inputs import columns_of, is_sequence, parameters, text_config

# What may hold tokens or their embeddings, and the mask that hides them; a decoder's own first.
MASKS = {
    "decoder_input_ids": "decoder_attention_mask",
    "decoder_inputs_embeds": "decoder_attention_mask",
    "input_ids": "attention_mask",
    "inputs_embeds": "attention_mask",
}
# Where tokens are hidden; GIVEN is what the mask of the caller's inputs hides.
LEFT, RIGHT, MIDDLE, GIVEN = "left", "right", "middle", "given"
_PLACES = {LEFT: "begin with", RIGHT: "end with", MIDDLE: "have in the middle"}


@dataclass(frozen=True)
class Short:
    """Inputs without the tokens that padding hides, and where their outputs stand in the whole."""

    inputs: dict[str, Any]
    rows: slice
    columns: slice


@dataclass(frozen=True)
class Batch:
    """Inputs of a forward, with some tokens hidden by a mask or none.

    Attributes:
        inputs: arguments of the forward.
        what: in words, for reports.
        seen: `[batch, tokens]` bool, False where no output means anything; None for all.
        other: the inputs with other tokens where hidden; None without any.
        short: the inputs without the hidden tokens; or why they cannot be cut off.
        mask: the mask that hides them, of an encoder if its tokens are hidden.
    """

    inputs: dict[str, Any]
    what: str = "the inputs"
    seen: Tensor | None = None
    other: dict[str, Any] | None = None
    short: Short | str = "no token is hidden"
    mask: Tensor | None = None


def padded_batches(
    root: nn.Module,
    inputs: dict[str, Any],
    changed: str,
    special: set[int],
    allowed: Tensor | None,
) -> dict[tuple[str, str], Batch | str]:
    """By side and argument, the inputs with tokens hidden there; or why there are none.

    Args:
        root: the model.
        inputs: arguments of its forward.
        changed: the argument that outputs are for, token by token.
        special: ids of tokens that are not plain text.
        allowed: tokens to put in place of hidden ones.
    """
    found: dict[tuple[str, str], Batch | str] = {}
    for name in (name for name in MASKS if isinstance(inputs.get(name), Tensor)):
        hiding = _Hiding(root, inputs, name, changed, special, allowed)
        for side in (LEFT, RIGHT, MIDDLE, GIVEN):
            found[side, name] = hiding.batch(side)
    return found


class _Hiding:
    """Hides tokens of one argument."""

    def __init__(
        self,
        root: nn.Module,
        inputs: dict[str, Any],
        name: str,
        changed: str,
        special: set[int],
        allowed: Tensor | None,
    ):
        self.root, self.inputs, self.name, self.changed = root, inputs, name, changed
        self.tokens: Tensor = inputs[name]
        self.size = self.tokens.shape[0], self.tokens.shape[1]
        self.special, self.allowed = special, allowed
        self.accepts = parameters(root)
        self.mask_name = MASKS[name]
        self.mask = inputs.get(self.mask_name)
        fill = getattr(text_config(root.config), "pad_token_id", None)
        self.fill = fill if isinstance(fill, int) and fill >= 0 else 0
        # whether every argument has an entry for each row, so that one can be taken alone
        self.by_row = self.size[0] > 1 and all(
            not isinstance(value, Tensor) or not value.dim() or value.shape[0] == self.size[0]
            for value in inputs.values()
        )

    def batch(self, side: str) -> Batch | str:
        """The inputs with tokens hidden at a side; or why there are none."""
        if self.mask_name not in self.accepts:
            return f"its forward takes no {self.mask_name}"
        mask = self.mask
        if mask is None:
            mask = torch.ones(self.size, dtype=torch.long, device=self.tokens.device)
        if not isinstance(mask, Tensor) or mask.shape != self.size:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            return f"the given {self.mask_name} is {shape} and not [batch, tokens]"
        hidden = mask == 0
        if side == GIVEN:
            if not bool(hidden.any()):
                return f"the given {self.mask_name} hides nothing"
            return self._hidden(mask, self.inputs, *self._given_place(hidden), "the given padding")
        rows = slice(self.size[0] - 1, None) if self.by_row else slice(None)
        free = free_tokens(self.tokens, self.special) & ~hidden
        columns = _columns(free[rows].all(0).tolist(), side)
        if columns is None:
            return (
                f"its inputs {_PLACES[side]} tokens of {self.name} that are hidden already or "
                "stand for more than text"
            )
        mask = mask.clone()
        mask[rows, columns] = 0
        inputs = {**self.inputs, self.mask_name: mask}
        if not self.tokens.is_floating_point():
            inputs[self.name] = self.tokens.clone()
            inputs[self.name][rows, columns] = self.fill
        # a model that makes positions of images, grids or a decoder knows them best
        own = hasattr(self.root, "get_rope_index") or self.name.startswith("decoder_")
        if "position_ids" in self.accepts and "position_ids" not in inputs and not own:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        whose = " of the encoder" if self.name != self.changed else ""
        return self._hidden(mask, inputs, rows, columns, f"{side}-padded rows{whose}")

    def _given_place(self, hidden: Tensor) -> tuple[slice, slice | None]:
        """Rows and columns that the given mask hides, where they can be cut off."""
        rows = slice(None)
        if self.by_row:
            row = int(hidden.any(-1).int().argmax())
            rows = slice(row, row + 1)
        one = hidden[rows]
        if not bool((one == one[:1]).all()):
            return rows, None
        count, length = int(one[0].sum()), self.size[1]
        if count < length and bool(one[0, :count].all()):
            return rows, slice(0, count)
        if count < length and bool(one[0, length - count :].all()):
            return rows, slice(length - count, length)
        return rows, None

    def _hidden(
        self, mask: Tensor, inputs: dict[str, Any], rows: slice, columns: slice | None, what: str
    ) -> Batch:
        hidden = mask == 0
        tokens = inputs[self.name]
        able = hidden
        if not tokens.is_floating_point():
            # an image's token stays one, hidden or not
            able = hidden & (free_tokens(tokens, self.special) | (tokens == self.fill))
        other = {**inputs, self.name: other_tokens(tokens, able, self.allowed)}
        seen = ~hidden
        if self.name != self.changed:
            shape = self.inputs[self.changed].shape[:2]
            seen = torch.ones(shape, dtype=torch.bool, device=hidden.device)
        short = self._short(inputs, rows, columns)
        return Batch(inputs, what, seen, other if bool(able.any()) else None, short, mask)

    def _short(self, inputs: dict[str, Any], rows: slice, columns: slice | None) -> Short | str:
        length = self.size[1]
        if columns is None or (columns.start > 0 and columns.stop < length):
            return "the hidden tokens are not at an end of the rows, so they cannot be cut off"
        kept = slice(columns.stop, length) if columns.start == 0 else slice(0, columns.start)
        cut = {
            key: columns_of(value, self.size, kept)
            if self._belongs(key) and is_sequence(key, value, self.size)
            else value
            for key, value in inputs.items()
        }
        if rows != slice(None):
            cut = {
                key: value[rows] if isinstance(value, Tensor) and value.dim() else value
                for key, value in cut.items()
            }
        return Short(cut, rows, kept if self.name == self.changed else slice(None))

    def _belongs(self, key: str) -> bool:
        """Whether an argument goes with these tokens, of a decoder's and an encoder's."""
        if not self.changed.startswith("decoder_"):
            return True
        return key.startswith(("decoder_", "labels")) == self.name.startswith("decoder_")


def free_tokens(tokens: Tensor, special: set[int]) -> Tensor:
    """Which tokens are text and nothing else, `[batch, tokens]`: not images, padding, the end."""
    if tokens.is_floating_point():
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return ~torch.isin(tokens, torch.tensor(sorted(special), device=tokens.device))


def other_tokens(tokens: Tensor, where: Tensor, allowed: Tensor | None) -> Tensor:
    """Tokens, or embeddings, that differ from the given ones at some places."""
    if tokens.is_floating_point():
        return torch.where(where.unsqueeze(-1), -tokens, tokens)
    first, second = (0, 1) if allowed is None else allowed[:2].tolist()
    return torch.where(where, torch.where(tokens == first, second, first).to(tokens.dtype), tokens)


def _columns(free: list[bool], side: str) -> slice | None:
    """The columns to hide: a third of them, or as many as are free there; None without any."""
    length = len(free)
    most = max(length // (6 if side == MIDDLE else 3), 1)
    if side == MIDDLE:
        begin = (length - most) // 2
        inside = begin > 0 and begin + most < length and all(free[begin : begin + most])
        return slice(begin, begin + most) if inside else None
    order = free if side == LEFT else free[::-1]
    count = next((place for place, able in enumerate(order[:most]) if not able), most)
    count = min(count, length - 1)
    if not count:
        return None
    return slice(0, count) if side == LEFT else slice(length - count, length)
