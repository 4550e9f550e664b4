"""Every architecture of the installed transformers, each tiny and in a process of its own."""

from __future__ import annotations

import difflib
import json
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from attnvariants._version import __version__
from attnvariants.hf.architectures.compare import COUNTED, TOLERANCE, VERDICTS, Outcome, drive

__all__ = ["Outcome", "SweepResult", "all_types", "drive", "sweep"]

_SAVE_EVERY = 5.0


@dataclass
class SweepResult:
    """What became of many model types.

    Attributes:
        versions: of the packages that it depends on.
        outcomes: by model type, sorted.
    """

    versions: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def count(self, verdict: str) -> int:
        """Number of types with a verdict."""
        return sum(outcome.verdict == verdict for outcome in self.outcomes.values())

    @property
    def bad(self) -> int:
        """Number of types that are wrong."""
        return self.count("different") + self.count(COUNTED)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        rows = [_row(self.outcomes[name]) for name in sorted(self.outcomes)]
        head = {"versions": self.versions, "tolerance": TOLERANCE}
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> SweepResult:
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read as such.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            outcomes = [Outcome(**row) for row in record["rows"]]
            return cls(record["versions"], {outcome.model_type: outcome for outcome in outcomes})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no results of a sweep: it is JSON, but not what --json writes."
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} holds no results of a sweep: {error}.") from error


def _row(outcome: Outcome) -> dict[str, Any]:
    """An outcome without what is as by default; figures to three digits."""
    defaults = {entry.name: entry.default for entry in fields(Outcome)}
    row = {}
    for name, value in asdict(outcome).items():
        if value != defaults[name]:
            row[name] = float(f"{value:.2e}") if isinstance(value, float) else value
    return row


def versions() -> dict[str, str]:
    """Of the packages that results depend on."""
    import torch
    import transformers

    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "attnvariants": __version__,
    }


def all_types() -> list[str]:
    """All model types of the installed transformers, sorted."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def check_types(types: Iterable[str] | None) -> list[str]:
    """The model types, each once; all that there are for None.

    Raises:
        ValueError: one is unknown.
    """
    known = all_types()
    wanted = known if types is None else list(dict.fromkeys(types))
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = (
                f"did you mean {' or '.join(map(repr, near))}?"
                if near
                else "give it as in a config.json."
            )
            raise ValueError(f"the installed transformers has no model type {name!r}; {hint}")
    return wanted


def sweep(
    types: Iterable[str] | None = None,
    *,
    jobs: int = 1,
    timeout: float = 120.0,
    path: Path | None = None,
    progress: Callable[[int, int, Outcome], None] | None = None,
) -> SweepResult:
    """Patch a tiny random model of each type with softmax and compare it with its own eager.

    Args:
        types: model types as transformers names them; default all.
        jobs: processes at once, of one thread each.
        timeout: seconds for one type.
        path: JSON file to keep the results in. What it holds already, from the same versions, is
            not done again.
        progress: called with the number done, the number in all and the last outcome.

    Raises:
        ValueError: a type is unknown, a number is out of range, or the file cannot be read.
    """
    wanted = check_types(types)
    if jobs < 1 or timeout <= 0:
        raise ValueError(f"jobs and timeout must be positive, got {jobs} and {timeout}.")
    result = SweepResult(versions())
    if path is not None and path.exists():
        before = SweepResult.load(path)
        if before.versions == result.versions:
            result.outcomes = {n: o for n, o in before.outcomes.items() if n in wanted}
    left = [name for name in wanted if name not in result.outcomes]
    saved = time.monotonic()

    def done(outcome: Outcome) -> None:
        nonlocal saved
        # as a file gives it back, so that tables of both agree
        result.outcomes[outcome.model_type] = Outcome(**_row(outcome))
        if path is not None and time.monotonic() - saved > _SAVE_EVERY:
            result.save(path)
            saved = time.monotonic()
        if progress is not None:
            progress(len(result.outcomes), len(wanted), outcome)

    try:
        _run(left, min(jobs, max(len(left), 1)), timeout, done)
    finally:
        result.outcomes = dict(sorted(result.outcomes.items()))
        if path is not None:
            result.save(path)
    return result


class _Worker:
    """A process that answers model types on its input with outcomes on its output."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "attnvariants.hf.architectures.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.name = ""
        self.since = 0.0

    def give(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def answer(self) -> Outcome:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            return Outcome(self.name, note=f"its process ended with code {code}")
        return Outcome(**json.loads(line))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def _run(types: list[str], jobs: int, timeout: float, done: Callable[[Outcome], None]) -> None:
    """Let workers answer all types; one that is too slow or dies is replaced."""
    waiting = types[::-1]
    workers: list[_Worker] = []
    with selectors.DefaultSelector() as selector:

        def start() -> None:
            worker = _Worker()
            workers.append(worker)
            assert worker.process.stdout is not None
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            worker.give(waiting.pop())

        def stop(worker: _Worker) -> None:
            selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
            workers.remove(worker)
            worker.stop()

        try:
            while waiting or workers:
                while waiting and len(workers) < jobs:
                    start()
                for key, _ in selector.select(timeout=0.5):
                    worker = key.data
                    outcome = worker.answer()
                    done(outcome)
                    if waiting and worker.process.poll() is None:
                        worker.give(waiting.pop())
                    else:
                        stop(worker)
                for worker in list(workers):
                    if time.monotonic() - worker.since > timeout:
                        stop(worker)
                        done(Outcome(worker.name, note=f"it took more than {timeout:g} seconds"))
        finally:
            for worker in list(workers):
                stop(worker)


def summary(result: SweepResult) -> str:
    """The counts of a sweep, in one sentence."""
    parts = [f"{result.count(name)} {name}" for name in VERDICTS if result.count(name)]
    return f"{len(result.outcomes)} model types: {', '.join(parts)}."
