"""One validated attention call, as the engines see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants import checks, scalars
from attnvariants.context import exported, readable
from attnvariants.dropout import Dropout
from attnvariants.geometry import Geometry, Packed
from attnvariants.registry import Rows, Variant


class RowStats(NamedTuple):
    """Statistics of each row of weights, `[batch, heads, q_len]`, without a gradient.

    Attributes:
        visible: n, the number of keys the row sees (int64).
        mass: the sum of its weights.
        largest: its largest weight; 0 for a row that sees nothing.
        lse: log sum exp of its scores; -inf for a row that sees nothing.
    """

    visible: Tensor
    mass: Tensor
    largest: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Problem:
    """All of a call but query, key and value: what turns their product into weights.

    `keep` and `bias` are 4-D with sizes that broadcast to [batch, heads, q_len, kv_len]; `slopes`
    is [batch or 1, heads]. Learned options are tensors of shape [heads, 1, 1] or [1, 1, 1].

    Of packed sequences the call is [1, heads, tokens, ...], `packed` holds the boundaries,
    `geometry` is that of the longest sequences (its offset means nothing: each is aligned bottom
    right by itself), and `slopes` is [sequences or 1, heads]. Only engine "triton" takes them.

    `position` is where the first query stands among the keys, a number or an int64 scalar, for
    variants that read positions; None is where `geometry` has it. The two differ where the keys
    have a tail of empty slots that `keep` hides, as those of a static cache.
    """

    variant: Variant
    options: Mapping[str, Any]
    geometry: Geometry
    scale: float
    softcap: float
    tokens_q: int
    device: torch.device
    keep: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    dropout: Dropout | None = None
    packed: Packed | None = None
    position: int | Tensor | None = None
    # what is found out once and on demand; copies of a problem share it
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def visible(self) -> Tensor:
        """Number of keys each row sees, [batch or 1, heads or 1, q_len], int64."""
        if "visible" not in self.memo:
            geometry, packed = self.geometry, self.packed
            if packed is None:
                self.memo["visible"] = geometry.seen(self.keep, self.device)
            else:
                counts = packed.counts(self.tokens_q, geometry.left, geometry.right)
                self.memo["visible"] = counts.view(1, 1, -1)
        return self.memo["visible"]

    @property
    def any_blind(self) -> bool:
        """Whether some row sees no key; reads the mask, if there is one."""
        if "any_blind" not in self.memo:
            if self.keep is None:
                self.memo["any_blind"] = self.geometry.any_blind
            else:
                self.memo["any_blind"] = bool((self.visible == 0).any())
        return self.memo["any_blind"]

    @property
    def cu_q(self) -> Tensor | None:
        """Boundaries of packed sequences in the queries, int32."""
        return None if self.packed is None else self.packed.cu_q

    @property
    def cu_k(self) -> Tensor | None:
        """Boundaries of packed sequences in the keys, int32."""
        return None if self.packed is None else self.packed.cu_k

    @property
    def max_q(self) -> int | None:
        """Queries of the longest packed sequence."""
        return None if self.packed is None else self.packed.max_q

    @property
    def max_k(self) -> int | None:
        """Keys of the longest packed sequence."""
        return None if self.packed is None else self.packed.max_k

    def hidden_edge(self, rows: slice, cols: slice, device: torch.device) -> Tensor:
        """Which of these keys these rows do not see by geometry alone, bool `[rows, cols]`.

        Remembered: a few small masks serve all blocks of a call.
        """
        place = rows.stop - rows.start, cols.stop - cols.start, rows.start - cols.start
        if place not in self.memo:
            self.memo[place] = ~self.geometry.keep(rows, cols, device)
        return self.memo[place]

    @property
    def hidden(self) -> float:
        """The score of a key that is not there."""
        return self.variant.hidden_score(self.options)

    @property
    def learned(self) -> dict[str, Tensor]:
        """The options given as tensors."""
        return {name: value for name, value in self.options.items() if isinstance(value, Tensor)}

    def rows(self, batch: slice, heads: slice, rows: slice, dtype: torch.dtype) -> Rows:
        """What the variant may know about these rows."""
        visible = pick(pick(self.visible, 0, batch), 1, heads)[..., rows]
        return self._rows(visible.to(dtype).unsqueeze(-1))

    def all_rows(self, dtype: torch.dtype) -> Rows:
        """What the variant may know about all rows of the call."""
        return self._rows(self.visible.to(dtype).unsqueeze(-1))

    def _rows(self, visible: Tensor) -> Rows:
        geometry = self.geometry
        rows = Rows(visible, geometry.q_len, geometry.kv_len, geometry.offset, self.packed)
        if self.position is None:
            return rows
        return rows._replace(kv_len=self.position + geometry.q_len, offset=self.position)


def build(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: Variant,
    options: Mapping[str, Any],
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    offset: int | None = None,
    seed: int | None = None,
    packed: Packed | None = None,
    position: int | Tensor | None = None,
) -> Problem:
    """Validate a call.

    `offset` is the alignment of `Geometry`, bottom-right if None; `seed` that of the dropout, drawn
    if None; `position` as in `Problem`. Of packed sequences the three are [1, heads, tokens, ...].

    Raises:
        ValueError: an argument is out of the contract, or means nothing for the variant.
    """
    checks.check_qkv(query, key, value)
    batch, heads, q_len, head_dim = query.shape
    kv_len, device, dtype = key.shape[2], query.device, compute_dtype(query)

    left, right = scalars.check_window(window_size)
    right = 0 if scalars.check_flag("causal", causal) else right
    if packed is not None:
        geometry = Geometry(packed.max_q, packed.max_k, 0, left, right)
    else:
        geometry = Geometry(
            q_len, kv_len, kv_len - q_len if offset is None else offset, left, right
        )
    keep, total = _visibility(attn_mask, bias, (batch, heads, q_len, kv_len), device, dtype)
    slopes = None
    if alibi_slopes is not None:
        several = batch if packed is None else packed.cu_q.shape[0] - 1
        slopes = checks.check_slopes(alibi_slopes, several, heads, device).to(dtype)
    if position is not None:
        position = scalars.check_position(position, device)
        if not geometry.unlimited or slopes is not None or packed is not None:
            raise ValueError(
                "position goes with attn_mask alone: causal, window_size and alibi_slopes align "
                "the last query with the last key; put them into the mask, or cut the keys."
            )
    cap = 0.0 if softcap is None else scalars.check_number("softcap", softcap, low=0.0)
    if scale is None:
        scale = head_dim**-0.5 if variant.scale is None else variant.scale
    scale = scalars.check_number("scale", scale)
    p = scalars.check_number("dropout_p", dropout_p, 0.0, 1.0)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}.")

    given = {"bias": total is not None, "alibi_slopes": slopes is not None, "softcap": bool(cap)}
    for feature, reason in variant.refuses.items():
        if given.get(feature):
            unread = feature == "bias" and bias is None and not readable(query)
            hint = "; where values cannot be read, pass attn_mask as bool" if unread else ""
            raise ValueError(f"{variant.name} takes no {feature}: {reason}{hint}.")
    resolved = {
        name: _per_head(variant, name, value, heads, device).to(dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in variant.resolve(options).items()
    }
    dropout = None
    if p:
        drawn = _draw_seed(generator) if seed is None else seed
        dropout = Dropout(p, drawn, heads, q_len, kv_len)

    problem = Problem(
        variant=variant,
        options=resolved,
        geometry=geometry,
        scale=scale,
        softcap=cap,
        tokens_q=q_len,
        device=device,
        keep=keep,
        bias=total,
        slopes=slopes,
        dropout=dropout,
        packed=packed,
        position=position,
    )
    if variant.check is not None:
        variant.check(problem.all_rows(dtype), problem.options, scale)
    return problem


def prepare(query: Tensor, key: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Query and key as the variant prepares them."""
    variant, dtype = problem.variant, compute_dtype(query)
    if variant.prepare is None:
        return query, key
    rows = problem.all_rows(dtype)
    return variant.prepare(query.to(dtype), key.to(dtype), rows, **problem.options)


def _visibility(
    attn_mask: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Visibility (bool or None) and additive bias (or None) of the two arguments together."""
    keep: Tensor | None = None
    total: Tensor | None = None
    for name, tensor in (("attn_mask", attn_mask), ("bias", bias)):
        if tensor is None:
            continue
        tensor = checks.broadcastable(name, tensor, shape, device)
        if not tensor.requires_grad and not exported():
            tensor = checks.collapse(tensor)
        visible: Tensor | None
        finite: Tensor | None
        if tensor.dtype == torch.bool and name == "attn_mask":
            visible, finite = tensor, None
        elif tensor.is_floating_point():
            checks.check_floating(name, tensor)
            visible, finite = checks.split_mask(tensor)
            # a mask of zeros and -inf adds nothing, whatever the variant makes of a bias
            learned = name == "bias" or tensor.requires_grad
            if not learned and readable(finite) and not finite.any():
                finite = None
        else:
            wanted = "bool (True = visible) or floating point" if name == "attn_mask" else "float"
            hint = "" if name == "bias" or tensor.is_complex() else ": .bool() shows all but zeros"
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}; convert it{hint}.")
        if visible is not None:
            keep = visible if keep is None else keep & visible
        if finite is not None:
            # a sum of two in half precision would be rounded to it
            finite = finite.to(dtype)
            total = finite if total is None else total + finite
    return keep, total


def _per_head(
    variant: Variant, name: str, value: Tensor, heads: int, device: torch.device
) -> Tensor:
    if value.numel() not in (1, heads):
        raise ValueError(
            f"{variant.name}'s {name} must have shape [] or [{heads}], one for each query head, "
            f"got {list(value.shape)}."
        )
    if value.device != device:
        raise ValueError(
            f"{variant.name}'s {name} must be on query's device {device}, got {value.device}; "
            "move it."
        )
    return value.view(-1, 1, 1)


def _draw_seed(generator: torch.Generator | None) -> int | Tensor:
    """A seed of 62 bits; a tensor, not yet known, while compiling."""
    on = torch.device("cpu") if generator is None else generator.device
    seed = torch.randint(2**62, (), generator=generator, device=on)
    return int(seed) if readable(seed) else seed


def pick(tensor: Tensor, dim: int, part: slice) -> Tensor:
    """`tensor` narrowed to `part` along `dim`, unless it broadcasts there."""
    if tensor.shape[dim] == 1:
        return tensor
    return tensor.narrow(dim, part.start, part.stop - part.start)


def block_of(tensor: Tensor, batch: slice, heads: slice, rows: slice, cols: slice) -> Tensor:
    """The block of a tensor that broadcasts to [batch, heads, q_len, kv_len]."""
    for dim, part in enumerate((batch, heads, rows, cols)):
        tensor = pick(tensor, dim, part)
    return tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def with_positive_scale(query: Tensor, problem: Problem) -> tuple[Tensor, Problem]:
    """The same scores as a positive multiple of products, which is all that fused kernels know."""
    if problem.scale < 0:
        return -query, replace(problem, scale=-problem.scale)
    if problem.scale == 0:
        return query * 0, replace(problem, scale=1.0)
    return query, problem
