"""Run trainings side by side in worker processes, one thread each, or one after another here."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from attnvariants.demo.models import RetrievalRecipe, SinkRecipe
from attnvariants.demo.train import Progress, train_retrieval, train_sinks

MOST_JOBS = 4
REPORT_EVERY = 0.2


@dataclass(frozen=True)
class Run:
    """One training: what, with which variant and seed; `swaps` as for `train_retrieval`."""

    variant: str
    seed: int
    recipe: SinkRecipe | RetrievalRecipe
    swaps: tuple[str, ...] = ()

    @property
    def experiment(self) -> str:
        """`sinks` or `retrieval`."""
        return "sinks" if isinstance(self.recipe, SinkRecipe) else "retrieval"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.experiment}, {self.variant}, seed {self.seed}"

    def execute(self, progress: Progress | None = None) -> dict[str, Any]:
        """Train and measure, in this process; adds the wall time as `seconds`."""
        started = time.perf_counter()
        if isinstance(self.recipe, SinkRecipe):
            result = train_sinks(self.variant, self.seed, self.recipe, progress)
        else:
            result = train_retrieval(self.variant, self.seed, self.recipe, progress, self.swaps)
        return result | {"seconds": time.perf_counter() - started}


# Called with the index of a run and: the steps done, or at its end the result.
Listener = Callable[[int, "int | dict[str, Any]"], None]


def default_jobs(runs: int) -> int:
    """As many as there are usable cores, at most `MOST_JOBS` and not more than runs."""
    import multiprocessing

    if multiprocessing.current_process().daemon:
        return 1
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count() or 1
    return max(1, min(cores, MOST_JOBS, runs))


def run_all(runs: Sequence[Run], jobs: int, listener: Listener) -> list[dict[str, Any]]:
    """The results of all runs, in their order.

    With `jobs` > 1 they are shared out to that many spawned processes; where those cannot be
    started, or die, the runs that are left are done in this process. No process outlives the call.

    Raises:
        ValueError: as the run that failed.
        RuntimeError: a run failed in a worker for another reason; the text is its traceback.
    """
    results: dict[int, dict[str, Any]] = {}
    waiting = deque(range(len(runs)))

    def finish(index: int, result: dict[str, Any]) -> None:
        results[index] = result
        listener(index, result)

    if jobs > 1:
        _run_in_workers(runs, min(jobs, len(runs)), waiting, listener, finish)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        while waiting:
            index = waiting.popleft()
            finish(index, runs[index].execute(partial(listener, index)))
    finally:
        torch.set_num_threads(threads)
    return [results[index] for index in range(len(runs))]


def _run_in_workers(
    runs: Sequence[Run],
    jobs: int,
    waiting: deque[int],
    listener: Listener,
    finish: Callable[[int, dict[str, Any]], None],
) -> None:
    """Work off `waiting`; what no worker could do is in it at the end."""
    import multiprocessing
    from multiprocessing.connection import wait

    context = multiprocessing.get_context("spawn")
    workers: dict[Any, Any] = {}
    busy: dict[Any, int] = {}
    idle: list[Any] = []

    def drop(connection: Any) -> None:
        process = workers.pop(connection)
        process.terminate()
        process.join()
        connection.close()
        if connection in idle:
            idle.remove(connection)
        if connection in busy:
            waiting.appendleft(busy.pop(connection))

    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            try:
                process.start()
            except OSError:
                ours.close()
                break
            finally:
                theirs.close()
            workers[ours] = process
        while workers and (waiting or busy):
            ready: list[Any] = wait(list(workers))
            for connection in ready:
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    drop(connection)
                    continue
                if kind == "step":
                    listener(busy[connection], value)
                    continue
                if kind == "invalid":
                    raise ValueError(value)
                if kind == "failed":
                    raise RuntimeError(value)
                if kind == "done":
                    finish(busy.pop(connection), value)
                idle.append(connection)
            while idle and waiting:
                connection = idle.pop()
                busy[connection] = waiting.popleft()
                try:
                    connection.send(runs[busy[connection]])
                except OSError:
                    drop(connection)
    finally:
        for connection, process in workers.items():
            connection.close()
            process.terminate()
        for process in workers.values():
            process.join()


def _serve(connection: Any) -> None:
    """A worker: trains what it is sent until the other end is closed."""
    # The parent alone answers Ctrl-C, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        connection.send(("ready", None))
        while True:
            run = connection.recv()
            connection.send(_attempt(run, connection))
    except (EOFError, OSError):
        return


def _attempt(run: Run, connection: Any) -> tuple[str, Any]:
    told = 0.0

    def progress(done: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > REPORT_EVERY:
            told = now
            connection.send(("step", done))

    try:
        return "done", run.execute(progress)
    except OSError:
        raise
    except ValueError as error:
        return "invalid", str(error)
    except Exception:
        return "failed", traceback.format_exc()
