"""`python -m bench.gpu`: time, memory and accuracy of the fused kernels on a GPU, beside others.

bfloat16, batch x length = 16,384 tokens, heads x head_dim = 2,048. CUDA events around each run,
the L2 flushed before by writing twice its size, medians over rounds after a warm-up; the backward
is timed alone, each time after an untimed forward. TFLOP/s count a dense attention,
4 b h s^2 d, half of it if causal, 2.5 times for the backward. Peak memory is above the inputs.
Beside our variants run SDPA's flash and cuDNN backends, FlexAttention where it can express the
variant, and whatever is installed of flash-attn, FLA, adasplash, triton-sigmoid and the original
softpick kernel. Whatever fails is recorded with its reason, and the run goes on in a new process.

The JSON is written after every figure, so that a run that was cut short still has a report:
`python -m bench.gpu --report`. `--dry-run` rehearses it all with tiny sizes on a CPU. Runs from a
checkout too, installed or not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("attnvariants_kernels") is None:
    sys.path.append(str(ROOT / "kernels"))

from bench import (  # noqa: E402
    gpu_cases,
    gpu_measure,
    gpu_report,
    gpu_run,
    gpu_targets,
    gpu_tests,
    gpu_workers,
)

BUDGET, BUDGET_WITH_TESTS = 500.0, 555.0
# Shares of the time that the tests and the compilation may take.
TESTS_SHARE, PREPARE_SHARE = 0.45, 0.45
METHOD = (
    "CUDA events, L2 flushed, median of rounds; backward alone after an untimed forward; "
    "peak_mib above the inputs, for the backward of forward and backward together"
)


def commit():
    """The commit measured, with "+" if the tree differs from it, or None outside of git."""

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "-s", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def arguments_of(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.split("\n\n")[0],
        epilog="Targets and method are in the module's docstring and in bench/gpu_targets.py.",
    )  # fmt: skip
    add = parser.add_argument
    add("--budget", type=float, help="seconds for everything (500; 555 with tests)")
    add("--with-tests", action="store_true", help="run pytest -m gpu first, within the budget")
    add("--dry-run", action="store_true", help="tiny sizes on a CPU, chunked engine")
    add("--report", action="store_true", help="tables and plot of the JSON; measure nothing")
    add("--cases", nargs="*", choices=list(gpu_cases.known()), help="only these")
    add("--lengths", nargs="*", type=int, help="only these lengths, the most important first")
    add("--head-dims", nargs="*", type=int, help="only these")
    add("--workers", type=int, help="processes that compile and check side by side")
    add("--seconds", type=float, default=0.12, help="of rounds, for each figure")
    add("--commit", help="commit to record where git cannot tell")
    add("--json", type=Path, help="bench/results/gpu.json; the plot goes beside it")
    return parser.parse_args(argv)


def plan_of(arguments):
    plan = gpu_cases.DRY if arguments.dry_run else gpu_cases.Plan()
    changes = {}
    if arguments.lengths:
        short = tuple(n for n in arguments.lengths if n <= plan.tokens)
        changes["lengths"] = short or plan.lengths[:1]
        changes["long"] = tuple(n for n in arguments.lengths if n > plan.tokens)
    if arguments.head_dims:
        changes["head_dims"] = tuple(arguments.head_dims)
    return replace(plan, **changes)


def path_of(arguments):
    if arguments.json:
        return arguments.json
    if arguments.dry_run:
        return Path(tempfile.gettempdir()) / "attnvariants-gpu-dry-run.json"
    return ROOT / "bench/results/gpu.json"


def report(result, path, console):
    """Judge the targets, print the tables and draw the plot."""
    result["targets"] = gpu_targets.evaluate(result)
    gpu_report.show(result, console)
    picture = path.with_suffix(".png")
    try:
        gpu_report.plot(result, picture)
    except Exception as error:
        # a missing font or library must not cost the figures
        console.print(f"no plot: {type(error).__name__}: {error}", style="yellow", markup=False)
        picture = None
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    console.print(machine, highlight=False, markup=False)
    console.print(f"written to {path}" + (f" and {picture}" if picture else ""), markup=False)


def measure(run, arguments, console, started, budget):
    """All stages, each within its share of the time."""
    workers = arguments.workers or max(1, min(14, multiprocessing.cpu_count() - 1))
    with_tests = arguments.with_tests
    timer = run.make_worker()
    try:
        if with_tests:
            console.print(f"pytest -m gpu, for at most {TESTS_SHARE * budget:.0f} s")
            run.result["tests"] = gpu_tests.run(TESTS_SHARE * budget, workers)
            console.print(gpu_report.tests_line(run.result["tests"]), markup=False)
            run.save()
        run.machine(timer)
        console.print(f"{time.monotonic() - started:.0f} s: accuracy, and compiling")
        run.prepare(workers, PREPARE_SHARE * run.left())
        console.print(f"{time.monotonic() - started:.0f} s: timing")
        run.time(timer, arguments.seconds)
    finally:
        timer.close()
    run.result["seconds"]["all"] = round(time.monotonic() - started, 1)


def main(argv=None):
    started = time.monotonic()
    arguments = arguments_of(argv)
    # inductor would start as many compilers in each of our processes
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    console = Console(width=None if sys.stdout.isatty() else 150)
    path = path_of(arguments)
    if arguments.report:
        result = json.loads(path.read_text())
        report(result, path, console)
        return
    usual = BUDGET_WITH_TESTS if arguments.with_tests else BUDGET
    budget = usual if arguments.budget is None else arguments.budget
    plan = plan_of(arguments)
    cases = gpu_cases.known()
    if arguments.cases:
        wanted = {gpu_cases.FLASH, *arguments.cases}
        cases = {name: case for name, case in cases.items() if name in wanted}
    result = gpu_run.empty_result(
        {
            "budget": budget, "dtype": "bfloat16", "tokens": plan.tokens, "width": plan.width,
            "lengths": plan.lengths, "long": plan.long, "head_dims": plan.head_dims,
            "accuracy_shape": plan.accuracy, "seconds_each": arguments.seconds, "method": METHOD,
            "dry_run": arguments.dry_run,
        }
    )  # fmt: skip
    result["machine"] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": arguments.commit or commit(),
    }
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        run = gpu_run.Run(
            plan, cases, "cpu" if arguments.dry_run else "cuda", path, result,
            lambda: gpu_workers.Worker(gpu_measure.answer), started + budget,
            lambda what, share: progress.update(task, description=what, completed=share),
        )  # fmt: skip
        measure(run, arguments, console, started, budget)
    report(result, path, console)
    run.save()


if __name__ == "__main__":
    main()
