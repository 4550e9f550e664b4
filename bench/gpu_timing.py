"""Clocks of `bench.gpu`: CUDA events with a flushed L2, and a wall clock for rehearsals."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

# Cycles that the device sleeps before a timed region, so that the launches are queued by then.
_SLEEP = 1_500_000


class Times(NamedTuple):
    """Milliseconds of a call: median and quintiles of the rounds, and of issuing it."""

    ms: float
    low: float
    high: float
    host_ms: float
    rounds: int


def summary(times, host):
    ordered = sorted(times)
    at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.2, 0.8)]
    return Times(statistics.median(ordered), *at, statistics.median(host), len(ordered))


def rounds_for(milliseconds, seconds, least=5, most=30):
    """As many rounds as fit into the seconds, within bounds."""
    return max(least, min(most, int(1000 * seconds / max(milliseconds, 1e-3))))


class WallClock:
    """Milliseconds by the wall; nothing to flush and no memory to read."""

    def times(self, setup, run, rounds):
        """`Times` of `run(setup())`, the setup not counted."""
        taken = []
        for _ in range(rounds):
            state = setup()
            start = time.perf_counter()
            run(state)
            taken.append(1000 * (time.perf_counter() - start))
        return summary(taken, taken)

    def peak_mib(self, run):
        """Run it; a CPU does not tell its peak."""
        run()


class CudaClock:
    """CUDA events around each run, after writing twice the L2."""

    def __init__(self):
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(size, 2**20) // 4, dtype=torch.int32, device="cuda")

    def times(self, setup, run, rounds):
        """`Times` of `run(setup())`, the setup not counted."""
        events, host = [], []
        for _ in range(rounds):
            state = setup()
            self._flush.zero_()
            torch.cuda._sleep(_SLEEP)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            before = time.perf_counter()
            run(state)
            host.append(1000 * (time.perf_counter() - before))
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return summary([start.elapsed_time(end) for start, end in events], host)

    def peak_mib(self, run):
        """MiB above what is allocated before, at the worst moment of a run."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def clock(device):
    return CudaClock() if device == "cuda" else WallClock()
