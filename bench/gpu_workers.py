"""Worker processes that may hang or die without taking the run along."""

from __future__ import annotations

import math
import multiprocessing
import queue
import threading
import time

# Seconds more that a fresh process may take, to import torch and to find its device.
START_SECONDS = 60


class WorkerLost(Exception):
    """The process hung or died; `kind` is "timeout" or "crashed"."""

    def __init__(self, kind, reason):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def _serve(function, pipe):
    while (job := pipe.recv()) is not None:
        pipe.send(function(job[0]))


class Worker:
    """One process that answers `function(job)`, started at the first question and after a loss."""

    def __init__(self, function):
        self._function = function
        self._process = self._pipe = None
        self._fresh = True

    def start(self):
        """Start the process now, to have it ready."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._function, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._fresh = True

    def ask(self, job, seconds, at_most=math.inf):
        """The answer to a job; a fresh process is given longer, but never over `at_most`.

        Raises:
            WorkerLost: it took longer than `seconds`, or the process died; the next question
                goes to a new process.
        """
        if self._process is None:
            self.start()
        limit = min(at_most, seconds + (START_SECONDS if self._fresh else 0))
        try:
            self._pipe.send((job,))
            if not self._pipe.poll(limit):
                self.close(kill=True)
                raise WorkerLost("timeout", f"no answer within {limit:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            process = self._process
            self.close(kill=True)
            code = process.exitcode
            raise WorkerLost("crashed", f"the process ended with exit code {code}") from error
        self._fresh = False
        return answer

    def close(self, kill=False):
        """End the process, at once if asked to."""
        process, self._process = self._process, None
        if process is None:
            return
        if not kill:
            try:
                self._pipe.send(None)
            except OSError:
                kill = True
        if not kill:
            process.join(5)
        if process.is_alive():
            process.kill()
            process.join(15)
        self._pipe.close()


def run_pool(make_worker, jobs, count, seconds, deadline, on_answer):
    """Put the jobs to `count` workers side by side.

    Args:
        make_worker: makes one worker, with `ask` and `close`.
        jobs: in the order of their importance.
        count: number of workers.
        seconds: limit of one job.
        deadline: `time.monotonic()` after which no job is begun, nor waited for.
        on_answer: called one at a time with (job, answer or WorkerLost).

    Returns:
        The jobs that were not reached.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    lock = threading.Lock()
    missed = []

    def work():
        worker = make_worker()
        try:
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    with lock:
                        missed.append(job)
                    continue
                answer = ask(worker, job, min(seconds, left), left)
                with lock:
                    on_answer(job, answer)
        finally:
            worker.close(kill=True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(count, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return missed


def ask(worker, job, seconds, at_most=math.inf):
    """`worker.ask`, a loss returned; a process that says it is broken is replaced."""
    try:
        answer = worker.ask(job, seconds, at_most)
    except WorkerLost as lost:
        return lost
    if answer["broken"]:
        worker.close(kill=True)
    return answer
