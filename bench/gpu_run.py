"""A run of `bench.gpu`: its stages, what it gives up, and the JSON that grows with it."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import replace

from bench import gpu_cases, gpu_measure, gpu_workers

# A case of one head_dim is left out after so many losses in a row, by what happened.
_PATIENCE = {"not installed": 1, "crashed": 2, "timeout": 2, "failed": 3, "refused": 4}
# Seconds that one job may take.
LIMITS = {"warm": 120.0, "accuracy": 120.0, "time": 60.0}
# Seconds kept for the tables and the plot.
RESERVE = 15.0


def finite(value):
    """The value with what JSON cannot hold, NaN and infinity, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def empty_result(config):
    """The JSON before anything was measured."""
    return {
        "schema": 1, "machine": {}, "config": config, "tests": None, "seconds": {},
        "rows": [], "accuracy": [], "left_out": {}, "warm_failures": [], "not_reached": [],
        "targets": [],
    }  # fmt: skip


class Run:
    """Stages of one run; every stage leaves what it found in `result` and on the disk.

    Args:
        plan: a `gpu_cases.Plan`.
        cases: cases by name.
        device: "cuda", or "cpu" for a rehearsal.
        path: where the JSON goes.
        result: from `empty_result`.
        make_worker: makes a worker that answers `gpu_measure.answer`.
        deadline: `time.monotonic()` at which the run must have ended.
        tick: called with a description and the share of the stage that is done.
    """

    def __init__(self, plan, cases, device, path, result, make_worker, deadline, tick):
        self.plan, self.cases, self.device = plan, cases, device
        self.path, self.result = path, result
        self.make_worker, self.deadline, self.tick = make_worker, deadline, tick
        self._losses = Counter()

    def left(self):
        """Seconds until the tables must be made."""
        return self.deadline - RESERVE - time.monotonic()

    def save(self):
        """Write the JSON, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(finite(self.result), indent=1) + "\n")
        part.replace(self.path)

    def job(self, kind, case, shape, **more):
        """A job of this run's device."""
        return gpu_measure.Job(kind, self.device, case, shape, **more)

    def error_of(self, answer):
        """The error of an answer or a loss, or None."""
        if isinstance(answer, gpu_workers.WorkerLost):
            return {"kind": answer.kind, "reason": answer.reason}
        return answer["error"]

    def count(self, job, direction, error):
        """Note a success or a failure; what goes on failing is left out."""
        key = job.case.name, job.shape.head_dim, direction
        patience = _PATIENCE.get(error["kind"]) if error else None
        self._losses[key] = self._losses[key] + 1 if patience else 0
        if patience and self._losses[key] >= patience:
            self.result["left_out"].setdefault(
                self._label(job, direction), f"{error['kind']}: {error['reason']}"
            )

    @staticmethod
    def _label(job, direction):
        return f"{job.case.name} {direction}, head_dim {job.shape.head_dim}"

    def given_up(self, job, direction):
        """Whether a case is left out, altogether or with this head_dim and direction."""
        out = self.result["left_out"]
        return job.case.name in out or self._label(job, direction) in out

    def miss(self, job):
        """Note that there was no time for a job."""
        self.result["not_reached"].append(
            {"kind": job.kind, "case": job.case.name, **job.shape._asdict()}
        )

    def machine(self, worker):
        """Name the machine; its failure ends the run, since nothing else could work."""
        answer = gpu_workers.ask(worker, gpu_measure.Job("machine", self.device), 60)
        error = self.error_of(answer)
        if error:
            raise SystemExit(f"the device does not answer ({error['kind']}: {error['reason']}).")
        self.result["machine"].update(answer["result"])
        self.save()

    def side_by_side(self, jobs, workers, seconds, on_answer):
        """Put untimed jobs to many workers for at most `seconds`; the jobs not reached."""
        total, done = max(1, len(jobs)), 0

        def answered(job, answer):
            nonlocal done
            done += 1
            self.tick(f"{job.kind} {job.case.name}", done / total)
            on_answer(job, self.error_of(answer), answer)

        deadline = time.monotonic() + max(0.0, min(seconds, self.left()))
        make = self.make_worker
        limit = max(LIMITS[job.kind] for job in jobs) if jobs else 0
        return gpu_workers.run_pool(make, jobs, workers, limit, deadline, answered)

    def prepare(self, workers, seconds):
        """Accuracy of every case, and every kernel compiled, both side by side."""
        started = time.monotonic()
        batch, heads, length = self.plan.accuracy
        dtypes = [(d, m) for d in self.plan.accuracy_dtypes for m in (True, False)]
        accuracy = [
            self.job(
                "accuracy", case,
                gpu_cases.Shape(batch, heads, length, self.plan.head_dims[0], causal), dtype=dtype,
            )
            for dtype, causal in dtypes
            for case in self.cases.values()
            if case.variant
        ]  # fmt: skip
        warm = [self.job("warm", *pair) for pair in gpu_cases.warm_order(self.plan, self.cases)]
        half = len(accuracy) // max(1, len(self.plan.accuracy_dtypes))
        jobs = [*accuracy[:half], *warm, *accuracy[half:]]
        missed = self.side_by_side(jobs, workers, seconds, self._prepared)
        self.result["accuracy"].sort(key=self._accuracy_order)
        for job in missed:
            if job.kind == "accuracy":
                self.miss(job)
        self.result["seconds"]["prepare"] = round(time.monotonic() - started, 1)
        self.save()

    def _prepared(self, job, error, answer):
        if job.kind == "accuracy":
            entry = {**job.labels(), "dtype": job.dtype}
            self.result["accuracy"].append(
                answer["result"] if error is None else {**entry, "error": error}
            )
        elif error and error["kind"] == "not installed":
            self.result["left_out"][job.case.name] = f"{error['kind']}: {error['reason']}"
        elif error and error["kind"] != "not applicable":
            self.result["warm_failures"].append({**job.labels(), "error": error})
        self.save()

    def _accuracy_order(self, entry):
        order = list(self.cases)
        dtypes = self.plan.accuracy_dtypes
        return dtypes.index(entry["dtype"]), not entry["causal"], order.index(entry["case"])

    def time(self, worker, seconds_each):
        """Time every case at every shape, the most important first, until the time is up."""
        started = time.monotonic()
        pairs = gpu_cases.timing_order(self.plan, self.cases)
        for index, (case, shape) in enumerate(pairs):
            job = self.job("time", case, shape, seconds=seconds_each)
            if self.given_up(job, "forward"):
                continue
            if self.left() <= 1:
                self.miss(job)
                continue
            if self.given_up(job, "backward"):
                job = replace(job, backward=False)
            mask = "causal" if shape.causal else "full"
            what = f"{case.name}, {mask}, head_dim {shape.head_dim}, {shape.length:,} tokens"
            self.tick(what, index / len(pairs))
            left = self.left()
            answer = gpu_workers.ask(worker, job, min(LIMITS["time"], left), left)
            self._timed(job, self.error_of(answer), answer)
        self.result["seconds"]["time"] = round(time.monotonic() - started, 1)
        self.save()

    def _timed(self, job, error, answer):
        if error and error["kind"] == "timeout" and self.left() <= 1:
            # it was not too slow; the run was over
            self.miss(job)
            return
        rows = None if isinstance(answer, gpu_workers.WorkerLost) else answer["result"]
        for row in rows or [{**job.labels(), "direction": "forward", "error": error}]:
            worst = row.get("error")
            if worst is None or worst["kind"] not in ("not applicable", "not installed"):
                self.result["rows"].append(row)
            self.count(job, row["direction"], worst)
        self.save()
