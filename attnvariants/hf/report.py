"""What `patch` did to a model, as rows and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One attention module.

    Attributes:
        name: qualified name in the model.
        cls: name of its class.
        layer: layer index.
        variant: what it computes now; None where the previous operator stays.
        impl: engine of the variant, or name of the previous operator.
        parameters: number of learned values that the variant added.
        options: options of the variant that differ between patches, learned ones by name.
        reason: why the module cannot be patched; empty if it can.
    """

    name: str
    cls: str
    layer: int
    variant: str | None
    impl: str
    parameters: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """All attention modules of a model; iterable, and a table when printed."""

    model: str
    rows: tuple[Row, ...]

    @property
    def patched(self) -> tuple[Row, ...]:
        """The rows that carry a variant."""
        return tuple(row for row in self.rows if row.variant is not None)

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
        head = ("module", "class", "layer", "variant", "engine", "parameters", "options")
        lines = [head]
        for row in self.rows:
            options = ", ".join(f"{name}={value}" for name, value in row.options.items())
            cells = row.name, row.cls, row.layer, row.variant or "-", row.impl, row.parameters
            lines.append((*map(str, cells), row.reason and f"refused: {row.reason}" or options))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
        text = [
            "  ".join([cell.ljust(width) for cell, width in zip(line, widths, strict=False)])
            + "  "
            + line[-1]
            for line in lines
        ]
        total = (
            f"{self.model}: {len(self.patched)} of {len(self.rows)} attention modules patched, "
            f"{self.parameters} learned values added"
        )
        return "\n".join([total, *(line.rstrip() for line in text)])
