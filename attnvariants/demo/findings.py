"""What the demonstration's numbers say, in sentences made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SINK = 0.5
NO_SINK = 0.05
SOLVED = 0.95

PAPER_SINKS = "arXiv:2410.13835"
PAPER_SOFTPICK = "arXiv:2504.20966"
PAPER_SSMAX = "arXiv:2501.19399"


def claims_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is said about the variants, and in how many of the seeds it was so."""
    claims: list[dict[str, Any]] = []

    def count(claim: str, source: str | None, holds: Sequence[bool]) -> None:
        claims.append({"claim": claim, "source": source, "holds": sum(holds), "seeds": len(holds)})

    variants = report["sinks"]["variants"]
    if "softmax" in variants:
        rates = _per_seed(variants["softmax"], "sink_rate")
        count(
            f"softmax grows a sink on the first token (sink rate at least {SINK:g})",
            PAPER_SINKS,
            [rate >= SINK for rate in rates],
        )
    if "softpick" in variants:
        rates = _per_seed(variants["softpick"], "sink_rate")
        copying = _per_seed(variants["softpick"], "copy_accuracy")
        count(
            f"softpick learns the task without one (sink rate at most {NO_SINK:g}, copy accuracy "
            f"at least {SOLVED:g})",
            PAPER_SOFTPICK,
            [r <= NO_SINK and copy >= SOLVED for r, copy in zip(rates, copying, strict=True)],
        )
    ways = report["retrieval"]["ways"]
    base = _longest(ways["softmax"])
    far = f"at {report['retrieval']['factors'][-1]}x the training length"
    for name, claim, source in (
        ("ssmax", f"SSMax retrieves more than softmax {far}", PAPER_SSMAX),
        ("ssmax_swapped_in", "so does SSMax patched into the softmax model, untrained", None),
    ):
        values = _longest(ways[name])
        count(claim, source, [new > old for new, old in zip(values, base, strict=True)])
    return claims


def findings_of(report: dict[str, Any]) -> list[str]:
    """Sentences about the numbers of the report."""
    return [*_sink_findings(report["sinks"]["variants"]), *_length_findings(report["retrieval"])]


def _sink_findings(variants: dict[str, Any]) -> list[str]:
    seeds = len(next(iter(variants.values()))["runs"])
    every, any_seed = ("every seed", "any seed") if seeds > 1 else ("the one seed", "the one seed")
    rates = {name: _per_seed(variant, "sink_rate") for name, variant in variants.items()}
    sinks = [name for name, rate in rates.items() if min(rate) >= SINK]
    none = [name for name, rate in rates.items() if max(rate) <= NO_SINK]
    between = [name for name in rates if name not in sinks and name not in none]

    def listed(names: Sequence[str]) -> str:
        return ", ".join(f"{name} ({_range(rates[name])})" for name in names)

    found = []
    for names, text in (
        (sinks, f"A sink on token 0 in {every}, sink rate at least {SINK:g}"),
        (none, f"No sink in {any_seed}, sink rate at most {NO_SINK:g}"),
        (between, "In between, or different from seed to seed"),
    ):
        if names:
            found.append(f"{text}: {listed(names)}.")
    for name, variant in variants.items():
        mean = variant["mean"]
        without = mean["sink_rate_without_query_0"]
        if abs(mean["sink_rate"] - without) > 0.1:
            found.append(
                f"{name}'s sink rate depends on query 0, which sees nothing but token 0: "
                f"{mean['sink_rate']:.2f} with it, {without:.2f} without."
            )
        if name in none and mean["sink_share"] > 0.25:
            found.append(
                f"{name} has no sink by its raw weights, but {mean['sink_share']:.2f} of the "
                f"weight that it gives (row mass {mean['row_mass']:.2f}) goes to token 0."
            )
    found.append(_quality(variants))
    return found


def _quality(variants: dict[str, Any]) -> str:
    """Whether the variants learned the task, which a missing sink alone does not show."""
    copying = {name: _per_seed(variant, "copy_accuracy") for name, variant in variants.items()}
    excess = [x for variant in variants.values() for x in _per_seed(variant, "excess_loss")]
    failed = [name for name, values in copying.items() if min(values) < SOLVED]
    losses = f"losses are {_range(excess, 3)} nats above that of the process behind the data"
    if not failed:
        lowest = min(min(values) for values in copying.values())
        return f"Every model learned to copy (copy accuracy at least {lowest:.2f}); {losses}."
    listed = ", ".join(f"{name} ({_range(copying[name])})" for name in failed)
    return f"Copy accuracy stayed below {SOLVED:g} in some seed for {listed}; {losses}."


def _length_findings(retrieval: dict[str, Any]) -> list[str]:
    ways, pairs = retrieval["ways"], retrieval["pairs"]

    def accuracy(name: str, place: int) -> str:
        return _mean_and_range([run["accuracy"][place] for run in ways[name]["runs"]])

    found = []
    for place, text in (
        (0, f"With {pairs[0]} pairs, the longest context of the training,"),
        (-1, f"With {pairs[-1]} pairs, {retrieval['factors'][-1]} times that,"),
    ):
        found.append(
            f"{text} softmax retrieves {accuracy('softmax', place)}; the same model with SSMax "
            f"patched in and no training {accuracy('ssmax_swapped_in', place)}; SSMax trained "
            f"from scratch {accuracy('ssmax', place)}."
        )
    names = {"softmax": "softmax", "ssmax_swapped_in": "SSMax patched in", "ssmax": "SSMax trained"}
    weights = (
        f"{label} from {ways[name]['mean']['needle_weight'][0]:.2f} to "
        f"{ways[name]['mean']['needle_weight'][-1]:.2f}"
        for name, label in names.items()
    )
    found.append(f"The mean weight on the right pair goes, over these lengths, {_join(weights)}.")
    return found


def _per_seed(variant: dict[str, Any], metric: str) -> list[float]:
    return [run["metrics"][metric] for run in variant["runs"]]


def _longest(way: dict[str, Any]) -> list[float]:
    return [run["accuracy"][-1] for run in way["runs"]]


def _range(values: Sequence[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _mean_and_range(values: Sequence[float]) -> str:
    mean, between = f"{sum(values) / len(values):.2f}", _range(values)
    return mean if mean == between else f"{mean} ({between})"


def _join(parts: Any) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
