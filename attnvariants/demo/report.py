"""The demonstration's results as one JSON-able mapping, and as tables on a terminal."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from attnvariants.demo.findings import claims_of, findings_of
from attnvariants.demo.measure import METRICS
from attnvariants.demo.runner import Run

SCHEMA = 1
HEADINGS = {
    "loss": "loss",
    "excess_loss": "excess\nloss",
    "copy_accuracy": "copy\nacc.",
    "sink_rate": "sink\nrate",
    "sink_rate_without_query_0": "no\nquery\n0",
    "sink_share": "sink\nshare",
    "row_mass": "row\nmass",
    "sparsity": "exact\nzeros",
    "entropy": "entropy",
}
NOTE = (
    "These are tiny models on made-up tasks, with settings chosen so that the effects show within "
    "minutes; with others, softmax may for example retrieve further. Sizes of effects in large "
    "models do not follow from them."
)


def build_report(
    runs: Sequence[Run],
    results: Sequence[dict[str, Any]],
    *,
    quick: bool,
    jobs: int,
    seconds: float,
) -> dict[str, Any]:
    """Everything measured: per seed, mean and spread, with the recipes and versions.

    The spread is the sample standard deviation over seeds, None for a single seed.
    """
    sinks = [(r, out) for r, out in zip(runs, results, strict=True) if r.experiment == "sinks"]
    lengths = [(r, o) for r, o in zip(runs, results, strict=True) if r.experiment == "retrieval"]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": _versions(),
        "machine": {"platform": platform.platform(), "jobs": jobs, "threads_per_job": 1},
        "seeds": list(dict.fromkeys(run.seed for run in runs)),
        "quick": quick,
        "seconds": seconds,
        "spread": "sample standard deviation over seeds; null for one seed",
        "sinks": _sinks(sinks),
        "retrieval": _retrieval(lengths),
    }
    report["claims"] = claims_of(report)
    report["findings"] = findings_of(report)
    report["note"] = NOTE
    return report


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from attnvariants import __version__

    return {
        "attnvariants": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _sinks(pairs: list[tuple[Run, dict[str, Any]]]) -> dict[str, Any]:
    variants: dict[str, Any] = {}
    for run, result in pairs:
        entry = {"seed": run.seed} | {k: v for k, v in result.items() if k != "map"}
        variants.setdefault(run.variant, {"runs": []})["runs"].append(entry)
    for variant in variants.values():
        values = {name: [run["metrics"][name] for run in variant["runs"]] for name in METRICS}
        variant["mean"] = {name: statistics.fmean(value) for name, value in values.items()}
        variant["spread"] = {name: _spread(value) for name, value in values.items()}
    return {
        "task": "Bigram-Backcopy (arXiv:2410.13835), GPT-2 with one layer and one head",
        "recipe": asdict(pairs[0][0].recipe),
        "metrics": METRICS,
        "variants": variants,
    }


def _retrieval(pairs: list[tuple[Run, dict[str, Any]]]) -> dict[str, Any]:
    recipe: Any = pairs[0][0].recipe
    ways: dict[str, Any] = {}
    for run, result in pairs:
        for test in result["tests"]:
            name = test["variant"] if test["trained"] else f"{test['variant']}_swapped_in"
            way = ways.setdefault(
                name,
                {
                    "variant": test["variant"],
                    "trained_with": run.variant,
                    "runs": [],
                },
            )
            figures = {k: test[k] for k in ("accuracy", "needle_weight", "learned")}
            times = {k: result[k] for k in ("seconds", "core_seconds")}
            way["runs"].append({"seed": run.seed} | figures | times)
    for way in ways.values():
        for figure, summary in (("mean", statistics.fmean), ("spread", _spread)):
            way[figure] = {
                name: [
                    summary(list(column))
                    for column in zip(*(run[name] for run in way["runs"]), strict=True)
                ]
                for name in ("accuracy", "needle_weight")
            }
    return {
        "task": "value of a key among (key, value) pairs, GPT-2 without positions",
        "recipe": asdict(recipe),
        "train_pairs": recipe.train_pairs,
        "factors": list(recipe.factors),
        "pairs": [recipe.train_pairs * factor for factor in recipe.factors],
        "metrics": {
            "accuracy": "share of queries answered with the value of their key",
            "needle_weight": "mean weight of a query on the pair with its key",
        },
        "ways": ways,
    }


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def print_report(report: dict[str, Any], console: Any) -> None:
    """Print the tables, the definitions of their columns, and what follows from the numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def table(title: str, first: str, columns: Sequence[str]) -> Table:
        console.print(f"[bold]{title}[/bold]", highlight=False)
        made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        made.add_column(first, no_wrap=True)
        for column in columns:
            made.add_column(column, justify="right")
        return made

    seeds = report["seeds"]
    over = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    sinks, retrieval = report["sinks"], report["retrieval"]
    main = table(f"Attention sinks on Bigram-Backcopy, {over}", "variant", list(HEADINGS.values()))
    for name, variant in sinks["variants"].items():
        main.add_row(
            name, *(_cell(variant["mean"][m], variant["spread"][m], "\n") for m in HEADINGS)
        )
    console.print(main, "")
    for name, meaning in METRICS.items():
        heading = " ".join(HEADINGS[name].split())
        console.print(f"[bold]{heading}[/bold]: {meaning}", highlight=False)
    console.print()

    columns = [
        f"{pairs}\n({factor}x)"
        for pairs, factor in zip(retrieval["pairs"], retrieval["factors"], strict=True)
    ]
    for figure, meaning in retrieval["metrics"].items():
        far = table(f"Key retrieval, {meaning}, by pairs in context; {over}", "model", columns)
        for name, way in retrieval["ways"].items():
            cells = zip(way["mean"][figure], way["spread"][figure], strict=True)
            far.add_row(way_label(name, way), *(_cell(mean, sd, "\n") for mean, sd in cells))
        console.print(far, "")

    longest = f"accuracy at {retrieval['pairs'][-1]} pairs"
    by_seed = table("By seed", "", [f"seed\n{seed}" for seed in seeds])
    for name, variant in sinks["variants"].items():
        rates = (f"{run['metrics']['sink_rate']:.2f}" for run in variant["runs"])
        by_seed.add_row(f"sink rate: {name}", *rates)
    for name, way in retrieval["ways"].items():
        accuracies = (f"{run['accuracy'][-1]:.2f}" for run in way["runs"])
        by_seed.add_row(f"{longest}: {way_label(name, way)}", *accuracies)
    console.print(by_seed, "")

    console.print("[bold]Found[/bold]")
    for sentence in report["findings"]:
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print("\n[bold]Said, and seen here[/bold]")
    for claim in report["claims"]:
        source = f" ({claim['source']})" if claim["source"] else ""
        seen = f"{claim['holds']} of {claim['seeds']} seeds"
        console.print(f"- {claim['claim']}{source}: {seen}", highlight=False, markup=False)
    console.print(f"\n{report['note']}", style="dim", highlight=False)


def way_label(name: str, way: dict[str, Any]) -> str:
    """What a model of the retrieval experiment is called in tables and pictures."""
    if name == way["variant"]:
        return f"{name}, trained"
    return f"{way['variant']} in {way['trained_with']} model, untrained"


def _cell(mean: float, spread: float | None, between: str = "") -> str:
    if spread is None:
        return f"{mean:.2f}"
    return f"{mean:.2f}{between}[dim]±{f'{spread:.2f}'.removeprefix('0')}[/dim]"
