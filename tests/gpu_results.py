"""Made-up results of the GPU benchmark, and the way to import `bench` in tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# the root may not stay on the path: the folder kernels/ would pass for a package there
sys.path.insert(0, str(ROOT))
try:
    from bench import (
        gpu,
        gpu_accuracy,
        gpu_cases,
        gpu_inputs,
        gpu_measure,
        gpu_peers,
        gpu_report,
        gpu_run,
        gpu_targets,
        gpu_tests,
        gpu_timing,
        gpu_workers,
    )
finally:
    sys.path.pop(0)

__all__ = [
    "FLASH",
    "ROOT",
    "SHAPE",
    "accuracy_entry",
    "gpu",
    "gpu_accuracy",
    "gpu_cases",
    "gpu_inputs",
    "gpu_measure",
    "gpu_peers",
    "gpu_report",
    "gpu_run",
    "gpu_targets",
    "gpu_tests",
    "gpu_timing",
    "gpu_workers",
    "result_of",
]

FLASH, SHAPE = gpu_cases.FLASH, gpu_cases.Shape(1, 2, 32, 8, True)


def result_of(speeds, lengths=(512, 4096, 8192, 16384), head_dims=(128, 64), **more):
    """A result in which `speeds` are TFLOP/s of each case, or functions of direction and length."""
    plan = gpu_cases.Plan()
    result = gpu_run.empty_result(
        {"budget": 500.0, "tokens": plan.tokens, "width": plan.width, "dry_run": True}
    )
    for case, speed in speeds.items():
        for direction in ("forward", "backward"):
            for head_dim in head_dims:
                for length in lengths:
                    for causal in (True, False):
                        shape = plan.shape(head_dim, length, causal)
                        found = speed(direction, length) if callable(speed) else speed
                        milliseconds = gpu_cases.tflops(shape, direction, found)
                        result["rows"].append({
                            "case": case, "direction": direction, **shape._asdict(),
                            "ms": milliseconds, "low": milliseconds, "high": milliseconds,
                            "host_ms": 0.1, "rounds": 5, "peak_mib": length / 64,
                            "tflops": found,
                        })  # fmt: skip
    return {**result, **more}


def accuracy_entry(case, worst, repeatable=True, dtype="bfloat16"):
    tensor = {"times_plain": worst, "relative_error": 1e-3, "plain_relative_error": 1e-3}
    return {
        "case": case, **SHAPE._asdict(), "dtype": dtype, "tensors": {"dq": tensor},
        "worst": worst, "repeatable": repeatable,
    }  # fmt: skip
