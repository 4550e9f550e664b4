"""The demonstration's picture: maps with and without a sink, sinks over training, and lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnvariants.demo.report import way_label

# Okabe and Ito's colours, which people with the common colour deficiencies can tell apart.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C8C00",
    "#777777",
)
MARKERS = "osD^vPX*<"
STYLES = ("-", "--", ":", "-.")


def save_picture(
    report: dict[str, Any], maps: dict[str, list[list[float]]], path: str | Path
) -> None:
    """Draw the picture of a report and save it as PNG.

    Args:
        report: from `build_report`.
        maps: attention weights `[length, length]` by variant, of one sequence and seed.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 5), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 3, width_ratios=(1.55, 1, 1))
    left, middle, right = parts
    _draw_maps(left, report, maps)
    _draw_training(middle.subplots(), report["sinks"])
    _draw_lengths(right.subplots(), report["retrieval"])
    figure.savefig(path, dpi=130)


def shown_maps(report: dict[str, Any]) -> list[str]:
    """Two variants: softmax and softpick, or where not run the most and least on token 0."""
    variants = report["sinks"]["variants"]
    share = {name: variant["mean"]["sink_share"] for name, variant in variants.items()}
    most = "softmax" if "softmax" in share else max(share, key=share.__getitem__)
    least = "softpick" if "softpick" in share else min(share, key=share.__getitem__)
    return [most] if most == least else [most, least]


def _draw_maps(figure: Any, report: dict[str, Any], maps: dict[str, list[list[float]]]) -> None:
    names = [name for name in shown_maps(report) if name in maps]
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        image = axis.imshow(maps[name], cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        mean = report["sinks"]["variants"][name]["mean"]
        axis.set_title(
            f"{name}: {mean['sink_share']:.0%} of the weight\non token 0, "
            f"sink rate {mean['sink_rate']:.2f}",
            fontsize=10,
        )
        axis.set_xlabel("key position")
    axes[0].set_ylabel("query position")
    figure.colorbar(image, ax=axes, shrink=0.8, label="attention weight")
    seed = report["seeds"][0]
    figure.suptitle(f"Attention of one held-out sequence (seed {seed})", fontsize=11)


def _draw_training(axis: Any, sinks: dict[str, Any]) -> None:
    for i, (name, variant) in enumerate(sinks["variants"].items()):
        histories = [run["history"] for run in variant["runs"]]
        steps = histories[0]["step"]
        columns = list(zip(*(history["sink_rate"] for history in histories), strict=True))
        # Several variants end at 0 or 1: staggered markers keep the lines apart.
        _line(axis, steps, columns, i, f"{name} {_mean(columns[-1]):.2f}", (i, 4))
    axis.set(
        ylim=(-0.05, 1.05), xlabel="training step", ylabel="sink rate (weight on token 0 > 0.3)"
    )
    axis.set_title(
        "Sink rate over training, Bigram-Backcopy\n(mean and range over seeds)", fontsize=11
    )
    axis.legend(
        title="variant, at the end",
        fontsize=8,
        title_fontsize=8,
        loc="center right",
        bbox_to_anchor=(1, 0.6),
    )
    axis.grid(alpha=0.3)


def _draw_lengths(axis: Any, retrieval: dict[str, Any]) -> None:
    pairs = retrieval["pairs"]
    for i, (name, way) in enumerate(retrieval["ways"].items()):
        columns = list(zip(*(run["accuracy"] for run in way["runs"]), strict=True))
        _line(axis, pairs, columns, i, way_label(name, way), (0, 1))
    axis.axvline(pairs[0], color="0.4", lw=1, ls=":")
    axis.annotate(
        "longest in training",
        (pairs[0], 0.02),
        xytext=(4, 0),
        textcoords="offset points",
        color="0.3",
        fontsize=9,
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(pairs, [str(count) for count in pairs])
    axis.set(ylim=(0, 1.03), xlabel="pairs in context", ylabel="accuracy")
    axis.set_title(
        "Key retrieval beyond the training length\n(mean and range over seeds)", fontsize=11
    )
    axis.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 0.08))
    axis.grid(alpha=0.3)


def _line(axis: Any, x: Any, columns: list, i: int, label: str, markevery: tuple) -> None:
    colour = COLOURS[i % len(COLOURS)]
    axis.plot(
        x,
        [_mean(column) for column in columns],
        color=colour,
        ls=STYLES[i % len(STYLES)],
        marker=MARKERS[i % len(MARKERS)],
        markevery=markevery,
        ms=5,
        lw=1.8,
        label=label,
    )
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def _mean(values: Any) -> float:
    return sum(values) / len(values)
