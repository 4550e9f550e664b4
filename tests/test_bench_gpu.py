"""The GPU benchmark without a GPU: order, clocks, accuracy, peers, targets and tables."""

import math
import os
import sys
import time
import types

import pytest
import torch
from gpu_results import (
    FLASH,
    SHAPE,
    accuracy_entry,
    gpu_accuracy,
    gpu_cases,
    gpu_inputs,
    gpu_measure,
    gpu_peers,
    gpu_report,
    gpu_targets,
    gpu_tests,
    gpu_timing,
    result_of,
)
from rich.console import Console

import attnvariants
from attnvariants import attention


def line_of(lines, target, case):
    (found,) = [line for line in lines if target in line["target"] and line["case"] == case]
    return found


def shown(result):
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    gpu_report.show(result, console)
    return console.export_text()


def test_speed_counts_a_dense_attention():
    full = gpu_cases.Shape(2, 16, 8192, 128, False)
    assert gpu_cases.tflops(full, "forward", 1.0) == pytest.approx(4 * 2 * 16 * 8192**2 * 128 / 1e9)
    causal = full._replace(causal=True)
    assert gpu_cases.tflops(causal, "forward", 1.0) * 2 == gpu_cases.tflops(full, "forward", 1.0)
    assert gpu_cases.tflops(causal, "backward", 2.5) == gpu_cases.tflops(causal, "forward", 1.0)


def test_order_begins_with_what_matters_and_holds_everything():
    plan, cases = gpu_cases.Plan(), gpu_cases.known()
    order = gpu_cases.timing_order(plan, cases)
    assert order[0] == (cases[FLASH], gpu_cases.Shape(2, 16, 8192, 128, True))
    assert len(order) == len({(case.name, shape) for case, shape in order})
    shapes = {shape for case, shape in order if case.name == "softpick"}
    assert {(s.head_dim, s.length) for s in shapes} == {
        (d, n) for d in (128, 64) for n in (512, 1024, 2048, 4096, 8192, 16384)
    }
    assert all(s.batch * s.length == 16384 and s.heads * s.head_dim == 2048 for s in shapes)
    long = {case.name for case, shape in order if shape.length == 131072}
    assert {"sparsemax peaked", "sparsemax", "cosformer", FLASH} <= long
    assert "softmax" not in long
    assert {case.variant for case in gpu_cases.OURS} == set(attnvariants.list_variants())
    assert set(gpu_peers.PEERS) == {case.name for case in cases.values() if not case.variant}


def test_rounds_and_quintiles():
    assert gpu_timing.rounds_for(10.0, 0.12) == 12
    assert gpu_timing.rounds_for(1e4, 0.12) == 5
    assert gpu_timing.rounds_for(0.0, 0.12) == 30
    times = gpu_timing.summary([5.0, 1.0, 2.0, 4.0, 3.0], [0.5])
    assert times == gpu_timing.Times(3.0, 2.0, 5.0, 0.5, 5)


def test_wall_clock_leaves_the_setup_out():
    clock = gpu_timing.WallClock()
    times = clock.times(lambda: time.sleep(0.02), lambda _: None, 3)
    assert times.ms < 10
    assert times.rounds == 3


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda as far as the benchmark uses it; every call is noted."""
    notes = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            notes.append("record")

        def elapsed_time(self, end):
            return 2.0

    properties = types.SimpleNamespace(
        name="fake", major=9, minor=0, multi_processor_count=132, total_memory=2**30,
        L2_cache_size=2**20,
    )  # fmt: skip
    fakes = {
        "get_device_properties": lambda index: properties,
        "Event": Event,
        "_sleep": lambda cycles: notes.append("sleep"),
        "synchronize": lambda: notes.append("synchronize"),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: notes.append("reset"),
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 3 * 2**20,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **o: real(*sizes, **{**o, "device": "cpu"}))
    return notes


def test_cuda_clock_flushes_and_queues_before_it_times(fake_cuda):
    clock = gpu_timing.clock("cuda")
    assert clock._flush.nbytes == 2 * 2**20
    clock._flush.fill_(1)

    def setup():
        fake_cuda.append("setup")
        return 7

    times = clock.times(setup, lambda state: fake_cuda.append(state), 2)
    assert fake_cuda == ["setup", "sleep", "record", 7, "record"] * 2 + ["synchronize"]
    assert (clock._flush == 0).all()
    assert (times.ms, times.rounds) == (2.0, 2)
    assert clock.peak_mib(lambda: None) == 2.0


def test_machine_and_a_device_that_broke(fake_cuda, monkeypatch):
    job = gpu_measure.Job("machine", "cuda")
    reply = gpu_measure.answer(job)
    assert reply["error"] is None
    assert reply["result"]["gpu"] == "fake"
    assert reply["result"]["capability"] == "sm_90"

    def illegal():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    reply = gpu_measure.answer(job)
    assert reply["broken"]
    assert "illegal memory access" in reply["error"]["reason"]


@pytest.mark.parametrize("variant", attnvariants.list_variants())
@pytest.mark.parametrize("causal", [True, False])
def test_plain_is_the_formula(variant, causal):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 9, 6, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 9, 6, dtype=torch.float64) for _ in range(2))
    learned = gpu_accuracy.learned_of(variant, 4, "cpu")
    got = gpu_accuracy.plain(q, k, v, variant, causal=causal, **learned)
    want = attention(q, k, v, variant, causal=causal, impl="reference", **learned)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_times_plain_is_the_worse_of_maximum_and_rms():
    true = torch.zeros(4, dtype=torch.float64)
    low, got = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([3.0, 0.0, 0.0, 0.0])
    assert gpu_accuracy.times_plain(got, low, true) == pytest.approx(3.0)
    assert gpu_accuracy.times_plain(low, got, true) == pytest.approx(1 / 1.5)
    assert gpu_accuracy.times_plain(low * torch.nan, low, true) == math.inf
    assert gpu_accuracy.times_plain(low, low * torch.inf, true) == 0.0


def test_empty_tiles_and_peaked_scores():
    weights = torch.zeros(1, 1, 8, 8)
    weights[..., 5, 1] = 1.0
    assert gpu_inputs.empty_tiles(weights, 4) == pytest.approx(2 / 3)
    shape = gpu_cases.Shape(1, 1, 1024, 32, True)
    share = {}
    for scores in ("gaussian", "peaked"):
        q, k, v, grad = gpu_inputs.make(shape, "cpu", torch.float32, scores)
        _, w = attention(q, k, v, "sparsemax", causal=True, return_weights=True)
        share[scores] = gpu_inputs.empty_tiles(w)
        assert grad.shape == v.shape
    assert share["peaked"] > share["gaussian"] + 0.02


def test_peers_get_their_layout(monkeypatch):
    seen = []

    def fake(q, k, v, **options):
        seen.append((tuple(q.shape), options))
        return q + k + v, "lse"

    modules = {
        "flash_attn": {"flash_attn_func": fake},
        "flash_softpick_attn": {"parallel_softpick_attn": fake},
        "adasplash": {"adasplash_v1": lambda *t, **o: fake(*t, **o)[0],
                      "adasplash_v2": lambda *t, **o: fake(*t, **o)[0]},
    }  # fmt: skip
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    cases = gpu_cases.known()
    for name, tokens_first in (
        ("flash-attn 2", True),
        ("softpick original", True),
        ("adasplash-1 sparsemax", False),
        ("adasplash-2 entmax 1.5", False),
    ):
        rows = gpu_measure.timed(gpu_measure.Job("time", "cpu", cases[name], SHAPE, seconds=0.0))
        assert all("ms" in row for row in rows), rows
        assert seen[-1][0] == ((1, 32, 2, 8) if tokens_first else (1, 2, 32, 8))
    assert seen[0][1] == {"causal": True}
    full = gpu_measure.Job("time", "cpu", cases["FLA"], SHAPE._replace(causal=False))
    assert gpu_measure.timed(full)[0]["error"]["kind"] == "not applicable"
    absent = gpu_measure.Job("time", "cpu", cases["triton-sigmoid"], SHAPE)
    assert gpu_measure.timed(absent)[0]["error"]["kind"] == "not installed"


def test_kinds_of_failure():
    kind = {
        "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
        "refused": ValueError("impl='triton' cannot run this call: (1) head_dim 320 is over 256."),
        "failed": RuntimeError("PassManager::run failed\n at line 3"),
    }
    for name, error in kind.items():
        assert gpu_measure.failure(error)["kind"] == name
    assert "\n" not in gpu_measure.failure(kind["failed"])["reason"]


def test_a_failing_backward_keeps_the_forward(monkeypatch):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return q + k + v

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(gpu_peers.PEERS, FLASH, gpu_peers.Peer(lambda *_: Broken.apply))
    job = gpu_measure.Job("time", "cpu", gpu_cases.known()[FLASH], SHAPE, seconds=0.0)
    forward, backward = gpu_measure.timed(job)
    assert forward["ms"] > 0
    assert backward["error"]["kind"] == "out of memory"


def test_targets_are_judged_at_their_worst_place():
    result = result_of({
        FLASH: 400.0,
        gpu_cases.CUDNN: 600.0,
        "softmax": lambda direction, length: 500.0 if length != 16384 else 470.0,
        "softpick": 500.0,
        "relu": 560.0,
        "lssar": 330.0,
        "softpick original": 100.0,
        "sparsemax peaked": lambda direction, length: 380.0 if length <= 8192 else 900.0,
        "cosformer": 2000.0,
    })  # fmt: skip
    lines = gpu_targets.evaluate(result)
    flash = line_of(lines, "one-pass forward, over SDPA flash", "softmax")
    assert flash["status"] == "missed"
    assert flash["measured"] == pytest.approx(470 / 400)
    assert "16,384 tokens" in flash["where"]
    assert line_of(lines, "one-pass forward, over SDPA flash", "softpick")["status"] == "met"
    assert line_of(lines, "one-pass forward, over SDPA cuDNN", "softmax")["status"] == "met"
    assert (
        line_of(lines, "one-pass, over SDPA flash", "sa_softmax minmax0")["status"]
        == "not measured"
    )
    two_sweep = line_of(lines, "one-pass, over SDPA flash", "lssar")
    assert (two_sweep["needed"], two_sweep["status"]) == (0.8, "met")
    assert line_of(lines, "pointwise forward, over softmax", "relu")["status"] == "missed"
    assert line_of(lines, "backward, over softpick original", "softpick")["status"] == "met"
    assert line_of(lines, "at 8k", "sparsemax peaked")["status"] == "missed"
    assert line_of(lines, "beyond 8k", "sparsemax peaked")["status"] == "met"
    assert line_of(lines, "causal forward at 8k", "cosformer")["status"] == "met"
    assert line_of(lines, "backward, over SDPA flash", "lssa")["status"] == "not measured"


def test_memory_must_be_linear():
    result = result_of({"cosformer": 900.0}, lengths=(16384, 65536, 131072))
    assert line_of(gpu_targets.evaluate(result), "memory", "cosformer")["status"] == "met"
    for row in result["rows"]:
        row["peak_mib"] = row["length"] ** 2
    assert line_of(gpu_targets.evaluate(result), "memory", "cosformer")["status"] == "missed"


def test_accuracy_is_judged():
    entries = [
        accuracy_entry("softmax", 0.9),
        accuracy_entry("softmax", 2.1, dtype="float16"),
        accuracy_entry("softpick", 1.2, repeatable=False),
        accuracy_entry("relu", None),
        {"case": "lssa", **SHAPE._asdict(), "dtype": "float16",
         "error": {"kind": "failed", "reason": "[no]"}},
    ]  # fmt: skip
    result = result_of({}, accuracy=entries)
    lines = gpu_targets.evaluate(result)
    error = "error of out and gradients"
    assert line_of(lines, error, "softmax")["status"] == "missed"
    assert line_of(lines, error, "softmax")["where"] == "float16, causal"
    assert line_of(lines, error, "relu")["status"] == "missed"
    assert line_of(lines, error, "lssa")["status"] == "not measured"
    assert line_of(lines, "repeatable", "softpick")["status"] == "missed"
    text = shown({**result, "targets": lines})
    assert "2.10" in text
    assert "failed: [no]" in text


def test_tables_give_speed_and_ratio_and_what_failed(tmp_path):
    result = result_of({FLASH: 400.0, "softmax": 520.0, "relu": 600.0})
    failed = {"case": "lssa", **SHAPE._asdict(), "direction": "forward",
              "error": {"kind": "failed", "reason": "PTXAS [error]"}}  # fmt: skip
    result["rows"] += [failed, {**failed, "length": 64}]
    result["left_out"]["FLA"] = "not installed: No module named 'fla'"
    result["not_reached"].append({"kind": "time", "case": "relu", **SHAPE._asdict()})
    result["tests"] = gpu_tests.read("") | {"ended": "exit code 1", "failed": ["test_x: why"]}
    result["targets"] = gpu_targets.evaluate(result)
    text = shown(result)
    for words in (
        "forward, causal, head_dim 128", "520 (1.30)", "lssa: failed: PTXAS [error]",
        "and 1 more", "FLA left out", "time causal d8 32 (1 cases)", "not measured: backward",
        "failed: test_x: why", "16,384",
    ):  # fmt: skip
        assert words in text, words
    gpu_report.plot(result, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    gpu_report.plot(result_of({}), tmp_path / "empty.png")
