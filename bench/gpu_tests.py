"""Run `pytest -m gpu` beside the benchmark and keep what it said."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SUMMARY_SECONDS = 15
# "tests/gpu/test_gpu.py::test_x[a] PASSED [ 3%]", or with xdist "[gw1] [ 3%] PASSED tests/..."
_ALONE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.M)
_XDIST = re.compile(
    r"^\[gw\d+\] \[\s*\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (\S+::.+?)\s*$", re.M
)
_REASON = re.compile(r"^(?:FAILED|ERROR) (\S+::.+?) - (.+)$", re.M)
_SKIP = re.compile(r"^SKIPPED \[(\d+)\] \S+: (.+)$", re.M)


def command(workers, seconds):
    """pytest on the GPU tests, side by side and with a limit each where the plugins are there."""
    words = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-o", "addopts="]
    words += ["--import-mode=importlib", "--strict-markers", "-v", "-rfEs", "--tb=line"]
    words += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(workers), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        words += ["--timeout", f"{seconds:.0f}"]
    return words


def read(output):
    """Outcomes by test, from what pytest -v printed so far."""
    outcomes = dict(_ALONE.findall(output))
    outcomes.update({name: outcome for outcome, name in _XDIST.findall(output)})
    reasons = dict(_REASON.findall(output))
    bad = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    return {
        "passed": sum(outcome in ("PASSED", "XPASS") for outcome in outcomes.values()),
        "failed": [f"{name}: {reasons.get(name, '')[:300]}".rstrip(": ") for name in bad],
        "skipped": sorted(n for n, outcome in outcomes.items() if outcome == "SKIPPED"),
        "skip_reasons": {reason[:300]: int(count) for count, reason in _SKIP.findall(output)},
    }


def run(seconds, workers, words=None):
    """The tests' summary; they are stopped after `seconds`, what ran until then counts."""
    started = time.monotonic()
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    words = command(workers, min(90.0, seconds / 2)) if words is None else words
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(seconds, 1))
            ended = f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
            _stop(process)
        log.seek(0)
        output = log.read().decode(errors="replace")
    summary = {**read(output), "ended": ended, "seconds": round(time.monotonic() - started, 1)}
    if not summary["passed"]:
        summary["output"] = output[-3000:]
    return summary


def _stop(process):
    """Interrupt pytest, which then prints its summary, and end what is left of it."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SUMMARY_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
