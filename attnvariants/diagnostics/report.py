"""What `diagnose` found: figures per layer and head, as rows, JSON, tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from attnvariants.diagnostics.activations import ActivationMetrics
from attnvariants.diagnostics.definitions import DEFINITIONS
from attnvariants.diagnostics.metrics import AttentionMetrics

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {
    "sink_rate": "sink\nrate",
    "sink_rate_without_query_0": "w/o\nq. 0",
    "sink_rate_proportional": "prop.\nrate",
    "sink_share": "sink\nshare",
    "sink_weight": "sink\nweight",
    "row_mass": "row\nmass",
    "dead_rows": "dead\nrows",
    "entropy": "en-\ntropy",
    "sparsity": "spar-\nsity",
    "dead_head": "dead\nheads",
}
# Not in the pictures: what dead_head already says, but for its threshold.
_NOT_PLOTTED = ("dead_tokens",)
_UNBOUNDED = ("sink_weight", "row_mass", "entropy")


@dataclass(frozen=True)
class LayerReport:
    """One attention module, or one of its calls if the model calls it more than once a pass.

    Attributes:
        name: its qualified name; the second call of a pass has " #2" behind it.
        variant: what its weights were.
        metrics: the figures of its heads.
    """

    name: str
    variant: str
    metrics: AttentionMetrics


@dataclass(frozen=True)
class Report:
    """The figures of a model.

    Attributes:
        model: name of the model's class.
        layers: attention, in the order of the calls.
        hidden: hidden states by name, in the order the model returns them; that of decoders is
            the embedding, then each layer's output, the last one after the final norm.
        kurtosis_pooled: of all hidden states together; None without hidden states.
        loss: mean next-token cross-entropy; None where the model generates no text.
        sequences, tokens: how many were measured, without padding.
        sink_threshold: weight on token 0 beyond which a sequence has a sink.
        skipped: attention modules that could not be measured, with the reason.
    """

    model: str
    layers: tuple[LayerReport, ...]
    hidden: Mapping[str, ActivationMetrics]
    kurtosis_pooled: float | None
    loss: float | None
    sequences: int
    tokens: int
    sink_threshold: float
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants of the layers, each once."""
        return tuple(dict.fromkeys(layer.variant for layer in self.layers))

    def rows(self) -> list[dict[str, Any]]:
        """One flat record for each head of each layer."""
        rows = []
        for layer in self.layers:
            figures = layer.metrics.figures()
            for head in range(layer.metrics.heads):
                row = {"layer": layer.name, "head": head, "variant": layer.variant}
                rows.append({**row, **{name: float(x[head]) for name, x in figures.items()}})
        return rows

    def summary(self) -> dict[str, float]:
        """One number for each figure: means over all heads, and what `DEFINITIONS` says."""
        figures = [layer.metrics.figures() for layer in self.layers]
        summary = {
            name: float(torch.cat([figure[name] for figure in figures]).mean())
            for name in figures[0]
            if name != "dead_head"
        }
        summary["dead_heads"] = int(sum(float(figure["dead_head"].sum()) for figure in figures))
        states = list(self.hidden.values())
        if states and self.kurtosis_pooled is not None:
            summary["kurtosis"] = sum(state.kurtosis for state in states) / len(states)
            summary["kurtosis_pooled"] = self.kurtosis_pooled
            for name in ("max_abs", "largest", "massive", "first_token_ratio"):
                summary[name] = max(getattr(state, name) for state in states)
        if self.loss is not None:
            summary["loss"] = self.loss
        return summary

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able, with the definitions."""
        summary = self.summary()
        layers = [
            {
                "name": layer.name,
                "variant": layer.variant,
                "heads": {n: x.tolist() for n, x in layer.metrics.figures().items()},
            }
            for layer in self.layers
        ]
        return {
            "model": self.model,
            "variants": list(self.variants),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "sink_threshold": self.sink_threshold,
            "summary": summary,
            "layers": layers,
            "hidden_states": [
                {"name": name, **metrics.figures()} for name, metrics in self.hidden.items()
            ],
            "skipped": dict(self.skipped),
            "definitions": DEFINITIONS,
        }

    def table(self, title: str | None = None) -> Table:
        """A rich table: a row for each layer, with means over its heads, and the model's."""
        short, pattern = _short_names([layer.name for layer in self.layers])
        label = f"{self.model}, {', '.join(self.variants)}" if title is None else title
        table = _table(f"{label}: attention, means over heads of {pattern}")
        table.add_column("layer", overflow="fold")
        names = [name for name in _HEADINGS if name in self.layers[0].metrics.figures()]
        for name in names:
            table.add_column(_HEADINGS[name], justify="right", no_wrap=True)
        for label, layer in zip(short, self.layers, strict=True):
            figures = layer.metrics.figures()
            cells = [
                f"{int(figures[n].sum())}" if n == "dead_head" else _number(figures[n].mean())
                for n in names
            ]
            table.add_row(label, *cells)
        summary = self.summary()
        summary["dead_head"] = summary["dead_heads"]
        table.add_section()
        table.add_row("all", *(_number(summary[n]) for n in names))
        return table

    def hidden_table(self, title: str | None = None) -> Table:
        """A rich table of the hidden states."""
        short, pattern = _short_names(list(self.hidden))
        table = _table(f"{self.model if title is None else title}: {pattern}")
        table.add_column("state", overflow="fold")
        headings = {
            "kurtosis": "kurtosis",
            "kurtosis_pooled": "kurtosis\npooled",
            "max_abs": "max\nabs",
            "largest": "largest",
            "massive": "massive",
            "first_token_ratio": "first\ntoken",
        }
        for heading in headings.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for label, metrics in zip(short, self.hidden.values(), strict=True):
            figures = metrics.figures()
            table.add_row(label, *(_number(figures[name]) for name in headings))
        return table

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a picture to `path`: for each figure a heat map, layers by heads.

        Raises:
            OSError: the path cannot be written.
            ValueError: matplotlib knows no format of that ending.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = [name for name in self.layers[0].metrics.figures() if name not in _NOT_PLOTTED]
        heads = max(layer.metrics.heads for layer in self.layers)
        columns = 4
        height = 2.2 + 0.12 * len(self.layers)
        lines = -(-len(names) // columns)
        figure, axes = pyplot.subplots(
            lines, columns, figsize=(15, lines * height), squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes.flat, names, strict=False):
            grid = torch.full((len(self.layers), heads), torch.nan)
            for index, layer in enumerate(self.layers):
                grid[index, : layer.metrics.heads] = layer.metrics.figures()[name]
            limits = {} if name in _UNBOUNDED else {"vmin": 0.0, "vmax": 1.0}
            image = axis.imshow(grid.numpy(), aspect="auto", interpolation="nearest", **limits)
            axis.set(title=name.replace("_", " "), xlabel="head", ylabel="layer")
            for side in (axis.xaxis, axis.yaxis):
                side.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axis)
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        figure.suptitle(f"{self.model}, {', '.join(self.variants)}: {self.sequences} sequences")
        try:
            figure.savefig(path, dpi=110)
        finally:
            pyplot.close(figure)


def compare(reports: Mapping[str, Report]) -> Table:
    """A rich table of the summaries of several reports side by side."""
    summaries = {label: report.summary() for label, report in reports.items()}
    names = dict.fromkeys(name for summary in summaries.values() for name in summary)
    table = _table("model: means over all heads")
    table.add_column("figure")
    for label in summaries:
        table.add_column(label, justify="right")
    for name in names:
        cells = [_number(s[name]) if name in s else "-" for s in summaries.values()]
        table.add_row(name, *cells)
    return table


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        collapse_padding=True,
        pad_edge=False,
    )


def _number(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    value = float(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    return f"{value:.1e}"


def _short_names(names: list[str]) -> tuple[list[str], str]:
    """Names without the dotted parts that all of them share, and the pattern they share."""
    if len(names) < 2:
        return names, names[0] if names else ""
    parts = [name.split(".") for name in names]
    least = min(len(part) for part in parts)
    start = 0
    while start < least - 1 and len({part[start] for part in parts}) == 1:
        start += 1
    end = 0
    while end < least - 1 - start and len({part[-1 - end] for part in parts}) == 1:
        end += 1
    short = [".".join(part[start : len(part) - end]) for part in parts]
    first = parts[0]
    return short, ".".join([*first[:start], "*", *first[len(first) - end :]])
