"""One job of `bench.gpu`, run in a worker: time a case at a shape, compile it, or check it."""

from __future__ import annotations

import functools
import platform
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

from attnvariants import __version__, attention
from bench import gpu_accuracy, gpu_cases, gpu_inputs, gpu_peers, gpu_timing

_REASON = 400


@dataclass(frozen=True)
class Job:
    """What a worker is asked: "machine", "warm", "time" or "accuracy"."""

    kind: str
    device: str
    case: gpu_cases.Case | None = None
    shape: gpu_cases.Shape | None = None
    dtype: str = "bfloat16"
    seconds: float = 0.12
    backward: bool = True

    @property
    def impl(self):
        """Our engine on the job's device."""
        return "triton" if self.device == "cuda" else "chunked"

    def labels(self):
        """The fields of the job that its result repeats."""
        return {"case": self.case.name, **self.shape._asdict()}


def failure(error):
    """What went wrong, as `{"kind", "reason"}`."""
    kind = "failed"
    if isinstance(error, gpu_peers.NotThisShape):
        kind = "not applicable"
    elif isinstance(error, ImportError):
        kind = "not installed"
    elif isinstance(error, torch.OutOfMemoryError):
        kind = "out of memory"
    elif isinstance(error, ValueError) and "cannot run" in str(error):
        kind = "refused"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return {"kind": kind, "reason": reason[:_REASON]}


def call_of(job):
    """`call(q, k, v)` of the job's case, and whether it takes tokens before heads."""
    case, shape = job.case, job.shape
    if not case.variant:
        peer = gpu_peers.PEERS[case.name]
        return peer.make(shape, job.device), peer.tokens_first
    call = functools.partial(
        attention, variant=case.variant, causal=shape.causal, impl=job.impl, **case.options
    )
    return call, False


def prepared(job):
    """The call, its leaves and a gradient of its output."""
    call, tokens_first = call_of(job)
    dtype = getattr(torch, job.dtype)
    *qkv, grad = gpu_inputs.make(job.shape, job.device, dtype, job.case.scores, tokens_first)
    return call, [t.requires_grad_() for t in qkv], grad


def warm(job):
    """Run forward and backward once, so that all kernels are compiled into Triton's cache."""
    call, leaves, grad = prepared(job)
    with torch.no_grad():
        call(*leaves)
    torch.autograd.grad(call(*leaves), leaves, grad)
    return {}


def timed(job):
    """Two rows, forward and backward; the backward is timed alone, after an untimed forward."""
    clock = gpu_timing.clock(job.device)
    rows = []
    try:
        call, leaves, grad = prepared(job)
    except Exception as error:
        return [{**job.labels(), "direction": "forward", "error": failure(error)}]

    def forward(_=None):
        with torch.no_grad():
            return call(*leaves)

    def both():
        return torch.autograd.grad(call(*leaves), leaves, grad)

    def backward(out):
        return torch.autograd.grad(out, leaves, grad)

    stages = (
        ("forward", forward, lambda: None, forward),
        ("backward", both, lambda: call(*leaves), backward),
    )
    for direction, whole, setup, run in stages[: 1 + job.backward]:
        row = {**job.labels(), "direction": direction}
        rows.append(row)
        try:
            # the first run may compile, so the second one tells the memory
            whole()
            peak = clock.peak_mib(whole)
            guess = clock.times(setup, run, 1)
            spent = guess.ms * (1.5 if direction == "backward" else 1.0) + 1.0
            least = 3 if job.shape.length > 32768 else 5
            times = clock.times(setup, run, gpu_timing.rounds_for(spent, job.seconds, least))
        except Exception as error:
            row["error"] = failure(error)
            break
        row.update(times._asdict(), peak_mib=peak)
        row["tflops"] = gpu_cases.tflops(job.shape, direction, times.ms)
    return rows


def machine(job):
    """What the figures were measured on."""
    info = {
        "gpu": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "attnvariants": __version__,
    }
    try:
        import triton

        info["triton"] = triton.__version__
    except ImportError:
        info["triton"] = None
    if job.device == "cuda":
        seen = torch.cuda.get_device_properties(0)
        info.update(
            gpu=seen.name,
            capability=f"sm_{seen.major}{seen.minor}",
            multiprocessors=seen.multi_processor_count,
            memory_gib=round(seen.total_memory / 2**30, 1),
            l2_mib=round(seen.L2_cache_size / 2**20, 1),
            cudnn=torch.backends.cudnn.version(),
            driver=_driver(),
        )
    return info


def _driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().split("\n")[0] or None


_KINDS = {"machine": machine, "warm": warm, "time": timed, "accuracy": gpu_accuracy.checked}


def answer(job):
    """The job's result, or its failure; says whether the process can serve another.

    Returns:
        `{"result": ..., "error": {"kind", "reason"} or None, "broken": bool}`.
    """
    reply: dict[str, Any] = {"result": None, "error": None, "broken": False}
    try:
        reply["result"] = _KINDS[job.kind](job)
    except Exception as error:
        reply["error"] = failure(error)
    if job.device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            # after an illegal access every later call of the process fails
            reply["broken"] = True
            reply["error"] = reply["error"] or failure(error)
    return reply
