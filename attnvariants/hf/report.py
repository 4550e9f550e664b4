"""What `patch` did to a model, as rows and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from attnvariants.hf import softmax_hook
from attnvariants.hf.dispatch import PREVIOUS
from attnvariants.hf.find import Target, attention_modules
from attnvariants.hf.holder import CHILD, DISPATCH, HOOK
from attnvariants.hf.idle import is_idle
from attnvariants.hf.names import implementation_of
from attnvariants.hf.penalties import PENALTIES

HEAD = ("module", "class", "layer", "variant", "engine", "parameters", "options")


@dataclass(frozen=True)
class Row:
    """One attention module.

    Attributes:
        name: qualified name in the model.
        cls: name of its class.
        layer: layer index.
        variant: what it computes now; None where the previous operator stays.
        impl: engine of the variant, or the backend if that is not "dispatch", or name of the
            previous operator.
        parameters: number of learned values that the variant added.
        options: options of the variant that differ between patches, learned ones by name.
        reason: why the module cannot be patched; empty if it can.
        penalties: numbers in the additive masks of its calls so far that were read as "hidden",
            the highest and the lowest of each mask, apart from a dtype's minimum.
        idle: the variant that it carries and does not compute, because the model's attention
            implementation was set to `impl` after patching; empty if there is none.
    """

    name: str
    cls: str
    layer: int
    variant: str | None
    impl: str
    parameters: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    penalties: tuple[float, ...] = ()
    idle: str = ""


@dataclass(frozen=True)
class Report:
    """All attention modules of a model; iterable, and a table when printed."""

    model: str
    rows: tuple[Row, ...]

    @property
    def patched(self) -> tuple[Row, ...]:
        """The rows that compute a variant."""
        return tuple(row for row in self.rows if row.variant is not None)

    @property
    def idle(self) -> tuple[Row, ...]:
        """The rows that carry a variant and do not compute it."""
        return tuple(row for row in self.rows if row.idle)

    @property
    def refused(self) -> tuple[Row, ...]:
        """The rows that cannot be patched, with the reason."""
        return tuple(row for row in self.rows if row.reason)

    @property
    def parameters(self) -> int:
        """Number of learned values added."""
        return sum(row.parameters for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [HEAD]
        for row in self.rows:
            options = ", ".join(f"{name}={value}" for name, value in row.options.items())
            if row.penalties:
                numbers = ", ".join(f"{number:g}" for number in row.penalties)
                options += f"{'; ' if options else ''}hides keys at {numbers} in its mask"
            cells = row.name, row.cls, row.layer, row.variant or "-", row.impl, row.parameters
            last = f"refused: {row.reason}" if row.reason else options
            if row.idle:
                last = f"{row.idle!r} is not used: the implementation was set after patching"
            lines.append((*map(str, cells), last))
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD) - 1)]
        text = [
            "  ".join([cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)])
            for line in lines
        ]
        total = (
            f"{self.model}: {len(self.patched)} of {len(self.rows)} attention modules patched, "
            f"{self.parameters} learned values added"
        )
        if self.idle:
            total += (
                f"; {len(self.idle)} carry a variant that does not run, because "
                f"{self.idle[0].impl!r} was set as the attention implementation after patching"
            )
        return "\n".join([total, *(line.rstrip() for line in text)])


def report_of(model: nn.Module) -> Report:
    """The report of a model as it is now."""
    return Report(type(model).__name__, tuple(map(_row, attention_modules(model))))


def _row(target: Target) -> Row:
    cls = type(target.module).__name__
    holder = getattr(target.module, CHILD, None)
    if holder is None:
        previous = getattr(target.module, PREVIOUS, None)
        operator = implementation_of(target.config) or "-"
        if previous is not None:
            operator = previous[0].__name__
        reason = target.reason
        if reason and not target.dispatches and not softmax_hook.refusal(target):
            reason += f"; backend={HOOK!r} can replace its softmax"
        return Row(target.name, cls, target.layer, None, operator, reason=reason)
    spec = holder(None)
    # A shard of tensor parallelism holds fewer than the module has in all.
    count = sum(map(len, holder.initial.values()))
    if is_idle(target.module, target.config):
        operator = implementation_of(target.config)
        return Row(target.name, cls, target.layer, None, operator, count, idle=spec.variant)
    return Row(
        name=target.name,
        cls=cls,
        layer=target.layer,
        variant=spec.variant,
        impl=spec.impl if holder.backend == DISPATCH else holder.backend,
        parameters=count,
        options={
            name: "learned" if isinstance(value, Tensor) else value
            for name, value in spec.options.items()
        },
        penalties=tuple(sorted(getattr(target.module, PENALTIES, ()), reverse=True)),
    )
