"""`run_demo`: the whole demonstration, from trainings to table, JSON and picture."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnvariants.demo.models import RetrievalRecipe, SinkRecipe
from attnvariants.demo.report import build_report, print_report
from attnvariants.demo.runner import Listener, Run, default_jobs, run_all
from attnvariants.registry import get_variant

FOLDER = "attnvariants-demo"
VARIANTS = (
    "softmax",
    "ssmax",
    "sparsemax",
    "sa_softmax",
    "lssar",
    "lssa",
    "cosformer",
    "relu",
    "softpick",
)
QUICK_VARIANTS = ("softmax", "softpick")
RECIPES = (SinkRecipe(), RetrievalRecipe())
QUICK_RECIPES = (
    SinkRecipe(steps=300, held_out=512, checks=12),
    RetrievalRecipe(steps=200, weight_decay=0.45, contexts=24),
)


def run_demo(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] | None = None,
    quick: bool = False,
    out: str | os.PathLike[str] | None = FOLDER,
    jobs: int | None = None,
    console: Any = None,
) -> dict[str, Any]:
    """Train tiny patched GPT-2 models on the CPU, and compare what their attention does.

    Two experiments, each for every seed. Sinks: the same model is trained from scratch on
    Bigram-Backcopy (arXiv:2410.13835) with each variant. Lengths: key retrieval at up to 32 times
    the training length with softmax, with SSMax, and with SSMax patched into the trained softmax
    model without any training (arXiv:2501.19399). Prints tables and writes `report.json` and
    `picture.png`.

    Args:
        seeds: of data and initial weights.
        variants: names for the sink experiment; default all nine that the package ships.
        quick: fewer steps and variants.
        out: folder to write into, made if missing; None for the default one.
        jobs: trainings at once, one thread each; default the usable cores, at most 4.
        console: a `rich.console.Console`; default one on the standard output.

    Returns:
        The report, as in the JSON file.

    Raises:
        ValueError: an argument is out of the contract, `out` cannot be written, or a package that
            the demonstration needs is missing.
    """
    chosen = _check_variants(variants, QUICK_VARIANTS if quick else VARIANTS)
    seeds = _check_seeds(seeds)
    if jobs is not None and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise ValueError(f"jobs must be a whole number of at least 1, got {jobs!r}.")
    _require("transformers", "rich", "matplotlib")
    folder = _make_folder(FOLDER if out is None else out)
    if console is None:
        from rich.console import Console

        console = Console()

    sinks, retrieval = QUICK_RECIPES if quick else RECIPES
    # The longest runs first, so that no core is left with one of them at the end.
    runs = [Run("softmax", seed, retrieval, swaps=("ssmax",)) for seed in seeds]
    runs += [Run("ssmax", seed, retrieval) for seed in seeds]
    runs += [Run(variant, seed, sinks) for variant in chosen for seed in seeds]
    jobs = _usable_jobs(jobs, chosen, len(runs))

    started = time.perf_counter()
    with _shown(runs, jobs, console) as listener:
        results = run_all(runs, jobs, listener)
    seconds = time.perf_counter() - started
    report = build_report(runs, results, quick=quick, jobs=jobs, seconds=seconds)

    from attnvariants.demo.plots import save_picture

    text = json.dumps(report, indent=1)
    report = json.loads(text)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    maps = {
        run.variant: result["map"]
        for run, result in zip(runs, results, strict=True)
        if run.experiment == "sinks" and run.seed == report["seeds"][0]
    }
    save_picture(report, maps, folder / "picture.png")
    console.print()
    print_report(report, console)
    console.print(
        f"\n{len(runs)} trainings in {seconds:.0f} s with {jobs} at once; wrote "
        f"{folder / 'report.json'} and {folder / 'picture.png'}.",
        highlight=False,
        soft_wrap=True,
    )
    return report


def _check_variants(variants: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    if variants is None:
        return list(default)
    if isinstance(variants, str):
        raise ValueError(f"variants must be several names, got the string {variants!r}.")
    names = list(dict.fromkeys(get_variant(name).name for name in variants))
    if not names:
        raise ValueError("variants must hold at least one name, got none.")
    return names


def _check_seeds(seeds: Sequence[int]) -> list[int]:
    checked = list(dict.fromkeys(seeds))
    wrong = [s for s in checked if not isinstance(s, int) or isinstance(s, bool) or s < 0]
    if wrong or not checked:
        raise ValueError(f"seeds must be one or more whole numbers from 0 on, got {seeds!r}.")
    return checked


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the demonstration needs {', '.join(missing)}; pip install 'attnvariants[cli]'."
        )


def _make_folder(out: str | os.PathLike[str]) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written, got {str(folder)!r}: {error.strerror}."
        ) from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"out must be a folder that can be written, got {str(folder)!r}.")
    return folder


def _usable_jobs(jobs: int | None, variants: Sequence[str], runs: int) -> int:
    # A fresh process does not know what this one registered.
    shipped = all(importlib.util.find_spec(f"attnvariants.variants.{name}") for name in variants)
    if not shipped:
        return 1
    return min(jobs or default_jobs(runs), runs)


@contextmanager
def _shown(runs: Sequence[Run], jobs: int, console: Any) -> Iterator[Listener]:
    """Progress: a bar over all and one for each run in progress, and a line for each run done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    bars: dict[int, Any] = {}

    def listener(index: int, news: int | dict[str, Any]) -> None:
        run = runs[index]
        if isinstance(news, dict):
            if index in bars:
                progress.remove_task(bars.pop(index))
            progress.advance(total)
            progress.console.print(f"{run.label}: {_outcome(run, news)}", highlight=False)
            return
        if index not in bars:
            bars[index] = progress.add_task(run.label, total=run.recipe.steps)
        progress.update(bars[index], completed=news)

    console.print(f"{len(runs)} trainings, {jobs} at once, on the CPU.", highlight=False)
    with progress:
        total = progress.add_task("all trainings", total=len(runs))
        yield listener


def _outcome(run: Run, result: dict[str, Any]) -> str:
    if run.experiment == "sinks":
        metrics = result["metrics"]
        figures = (
            f"sink rate {metrics['sink_rate']:.2f}, copy accuracy {metrics['copy_accuracy']:.2f}"
        )
    else:
        figures = ", ".join(
            f"{'' if test['trained'] else test['variant'] + ' patched in '}"
            f"{test['accuracy'][0]:.2f} -> {test['accuracy'][-1]:.2f}"
            for test in result["tests"]
        )
    return f"{figures} ({result['seconds']:.1f} s)"
