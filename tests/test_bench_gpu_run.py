"""A run of the GPU benchmark with made-up workers: losses, budget, JSON, the tests beside it."""

import json
import math
import operator
import os
import subprocess
import sys
import time
import types

import pytest
from gpu_results import (
    FLASH,
    ROOT,
    accuracy_entry,
    gpu,
    gpu_cases,
    gpu_run,
    gpu_tests,
    gpu_workers,
)


class FakeWorker:
    """Answers at once; cases named in `lose` are lost, those in `fail` give an error."""

    asked, closed = [], 0

    def __init__(self, lose=(), fail=(), after=lambda job: None):
        self.lose, self.fail, self.after = lose, fail, after

    def ask(self, job, seconds, at_most):
        FakeWorker.asked.append(job)
        self.after(job)
        name = job.case.name if job.case else ""
        if name in self.lose:
            raise gpu_workers.WorkerLost("crashed", "the process ended with exit code -9")
        reply = {"result": None, "error": None, "broken": False}
        if name in self.fail:
            return {**reply, "error": {"kind": "failed", "reason": "no"}, "broken": True}
        if job.kind == "machine":
            reply["result"] = {"gpu": "fake"}
        elif job.kind == "accuracy":
            reply["result"] = accuracy_entry(name, math.nan, dtype=job.dtype) | job.labels()
        elif job.kind == "time":
            directions = ("forward", "backward")[: 1 + job.backward]
            reply["result"] = [
                {**job.labels(), "direction": d, "ms": 1.0, "tflops": 1.0, "peak_mib": None}
                for d in directions
            ]
        return reply

    def close(self, kill=False):
        FakeWorker.closed += 1


def fake_run(tmp_path, seconds=600.0, names=("softmax", "relu", "sparsemax"), **worker):
    FakeWorker.asked, FakeWorker.closed = [], 0
    cases = {n: case for n, case in gpu_cases.known().items() if n in (FLASH, *names)}
    result = gpu_run.empty_result({"budget": seconds, "tokens": 128, "width": 32})
    return gpu_run.Run(
        gpu_cases.DRY, cases, "cpu", tmp_path / "gpu.json", result,
        lambda: FakeWorker(**worker), time.monotonic() + seconds, lambda *_: None,
    )  # fmt: skip


def test_json_grows_and_holds_everything(tmp_path):
    rows_on_disk = []

    def look(job):
        if job.kind == "time":
            rows_on_disk.append(len(json.loads(run.path.read_text())["rows"]))

    run = fake_run(tmp_path, after=look)
    worker = run.make_worker()
    run.machine(worker)
    run.prepare(2, 60)
    run.time(worker, 0.1)
    assert rows_on_disk[:3] == [0, 2, 4]
    found = json.loads(run.path.read_text())
    assert set(found) == set(gpu_run.empty_result({}))
    assert found["machine"]["gpu"] == "fake"
    assert len(found["accuracy"]) == 3 * 2 * 2
    assert found["accuracy"][0]["case"] == "softmax"
    # NaN has no place in JSON
    assert found["accuracy"][0]["worst"] is None
    pairs = gpu_cases.timing_order(gpu_cases.DRY, run.cases)
    assert len(found["rows"]) == 2 * len(pairs)
    assert not found["not_reached"]


def test_what_keeps_failing_is_left_out(tmp_path):
    run = fake_run(tmp_path, lose=("relu",), fail=("softmax",))
    worker = run.make_worker()
    run.time(worker, 0.1)
    asked = [job.case.name for job in FakeWorker.asked]
    assert asked.count("relu") == 2 * 2
    assert asked.count("softmax") == 3 * 2
    assert set(run.result["left_out"]) == {
        f"{name} forward, head_dim {d}" for name in ("relu", "softmax") for d in (16, 8)
    }
    errors = [row["error"] for row in run.result["rows"] if row["case"] == "relu"]
    assert errors[0] == {"kind": "crashed", "reason": "the process ended with exit code -9"}
    assert FakeWorker.closed == 6


def test_the_budget_ends_the_run_cleanly(tmp_path):
    def spend(job):
        if len(FakeWorker.asked) == 3:
            run.deadline = 0.0

    run = fake_run(tmp_path, after=spend)
    run.time(run.make_worker(), 0.1)
    pairs = gpu_cases.timing_order(gpu_cases.DRY, run.cases)
    assert len(FakeWorker.asked) == 3
    assert len(run.result["rows"]) == 6
    assert len(run.result["not_reached"]) == len(pairs) - 3
    run.prepare(2, 60)
    assert len(FakeWorker.asked) == 3
    assert {job["kind"] for job in run.result["not_reached"]} == {"time", "accuracy"}


def test_a_device_that_does_not_answer_ends_the_run(tmp_path):
    run = fake_run(tmp_path)
    worker = types.SimpleNamespace(ask=lambda *_: {
        "result": None, "error": {"kind": "failed", "reason": "no CUDA"}, "broken": False
    })  # fmt: skip
    with pytest.raises(SystemExit, match="no CUDA"):
        run.machine(worker)


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_workers_survive_hangs_and_deaths(importable):
    worker = gpu_workers.Worker(operator.neg)
    assert [worker.ask(n, 30) for n in (3, 4)] == [-3, -4]
    worker.close()
    for function, job, kind in ((os._exit, 7, "crashed"), (time.sleep, 60, "timeout")):
        worker = gpu_workers.Worker(function)
        with pytest.raises(gpu_workers.WorkerLost, match=r"code 7|within 4 s") as lost:
            worker.ask(job, 30, 30 if kind == "crashed" else 4)
        assert lost.value.kind == kind
        worker.close()


def test_reads_pytest_with_and_without_xdist():
    alone = (
        "tests/gpu/test_gpu.py::test_a[x-1] PASSED   [ 10%]\n"
        "tests/gpu/test_gpu.py::test_b FAILED [ 20%]\ntests/gpu/test_gpu.py::test_c SKIPPED (no)\n"
        "SKIPPED [1] tests/gpu/test_gpu.py:82: impl='triton' cannot run this call\n"
        "FAILED tests/gpu/test_gpu.py::test_b - AssertionError: out: 2.10 times\n"
    )
    spread = (
        "tests/gpu/test_gpu.py::test_a[x-1] \n"
        "[gw1] [ 10%] PASSED tests/gpu/test_gpu.py::test_a[x-1] \n"
        "[gw0] [ 20%] FAILED tests/gpu/test_gpu.py::test_b \n"
        "[gw0] [ 30%] SKIPPED tests/gpu/test_gpu.py::test_c \n"
    )
    found = gpu_tests.read(alone)
    assert found["passed"] == 1
    assert found["failed"] == ["tests/gpu/test_gpu.py::test_b: AssertionError: out: 2.10 times"]
    assert found["skip_reasons"] == {"impl='triton' cannot run this call": 1}
    other = gpu_tests.read(spread)
    assert (other["passed"], other["skipped"]) == (1, ["tests/gpu/test_gpu.py::test_c"])
    assert other["failed"] == ["tests/gpu/test_gpu.py::test_b"]


def test_tests_are_stopped_in_time():
    code = "import time; print('tests/a.py::test_a PASSED', flush=True); time.sleep(900)"
    started = time.monotonic()
    found = gpu_tests.run(2.0, 1, [sys.executable, "-c", code])
    assert time.monotonic() - started < 600
    assert (found["passed"], found["ended"]) == (1, "stopped after 2 s")


def test_dry_run_and_report(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--json", str(path)]
    small = ["--dry-run", "--cases", "softpick", "sparsemax peaked", "--lengths", "32",
             "--head-dims", "8", "--workers", "1", "--seconds", "0.01"]  # fmt: skip
    measured = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True)
    assert measured.returncode == 0, measured.stderr
    result = json.loads(path.read_text())
    assert {row["case"] for row in result["rows"]} == {FLASH, "softpick", "sparsemax peaked"}
    assert all("ms" in row for row in result["rows"])
    assert {entry["dtype"] for entry in result["accuracy"]} == {"bfloat16", "float16"}
    assert all(entry["worst"] <= 2 and entry["repeatable"] for entry in result["accuracy"])
    assert path.with_suffix(".png").is_file()
    assert gpu.main([*command[3:], "--report"]) is None
