"""Patched models in existing engines: two processes, and offloading, against one process.

The checks of two processes run in one launch of parallel_worker.py, for its imports take longer
than they do; the tests read what it wrote.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import attnvariants
from attnvariants import patch, unpatch
from attnvariants.hf import parallel
from attnvariants.hf.parallel import prepare_tp, tp_plan

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
worker = pytest.importorskip("parallel_worker")
transformers.logging.set_verbosity_error()

LIMIT = 120
LEARNED = [f"model.layers.{i}.self_attn.attn_variant.{name}" for i in (0, 1) for name in ("b", "s")]
ENGINES = ("ddp", "fsdp2", "native_fsdp", "tensor")


def run(model):
    with torch.no_grad():
        return model(worker.TOKENS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved models, which the workers load and save again."""
    folder = tmp_path_factory.mktemp("parallel")
    for variant in worker.VARIANTS:
        worker.build(variant=variant).save_pretrained(folder / variant)
    worker.build("Olmo2").save_pretrained(folder / "Olmo2")
    for name, (heads, kv_heads) in worker.INDIVISIBLE.items():
        worker.build(heads=heads, kv_heads=kv_heads, s=0.5).save_pretrained(folder / name)
    worker.build(variant=None).save_pretrained(folder / "missing")
    shutil.copy(folder / "ssmax" / "config.json", folder / "missing")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What both processes measured, by check."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(Path(worker.__file__))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in (0, 1)]
    processes = []
    for rank, log in enumerate(logs):
        arguments = [*command, str(rank), port, str(folder)]
        with log.open("w") as out:
            processes.append(subprocess.Popen(arguments, stdout=out, stderr=out, env=environment))
    try:
        codes = [process.wait(LIMIT) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["timed out"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        pytest.fail(f"{codes}\n" + "\n".join(log.read_text()[-4000:] for log in logs))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def of(found, check):
    """The results of a check in both processes; skips what this transformers does not have."""
    results = [process[check] for process in found]
    for result in results:
        assert "error" not in result, result["error"]
        if "skip" in result:
            pytest.skip(result["skip"])
    return results


def assert_equal(result, learned):
    assert result["all"]
    assert result["names"] == learned
    assert result["logits"] <= 1e-5
    assert result["grads"] <= 1e-5
    assert result["learned"] <= 1e-6


@pytest.mark.parametrize("variant", worker.VARIANTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(found, engine, variant):
    for result in of(found, engine):
        assert_equal(result[variant], LEARNED if variant == "ssmax" else [])
        assert result[variant].get("info", {}) == {}


def test_fsdp1_equals_one_process(found):
    for result in of(found, "fsdp1"):
        assert_equal(result["ssmax"], LEARNED)


@pytest.mark.parametrize("heads", worker.UNEVEN)
def test_fsdp2_shards_heads_unevenly(found, heads):
    for result in of(found, "fsdp2"):
        assert_equal(result[heads], [name for name in LEARNED if name.endswith(".s")])


@pytest.mark.parametrize("variant", worker.VARIANTS)
def test_tensor_parallel_generates_and_reports_all_heads(found, variant):
    for result in of(found, "tensor"):
        assert result[variant]["generated"]
        assert result[variant]["learned values"] == ([8, 8] if variant == "ssmax" else [0, 0])


def test_tensor_parallel_keeps_whole_what_every_process_needs(found):
    for result in of(found, "gathered_heads"):
        assert result["rules"] == {}
        assert_equal(result["Olmo2"], LEARNED)
        assert result["Olmo2"]["info"] == {}


def test_tensor_parallel_initialises_what_a_checkpoint_lacks(found):
    for result in of(found, "missing_values"):
        if "refused" in result:
            assert "transformers cannot set them under tensor parallelism" in result["refused"]
        else:
            assert result["logits"] <= 1e-5


def test_rules_of_tensor_parallelism():
    model = worker.build()
    styles = set(model.tp_plan.values()) | {"local_params", "local_rowwise"}
    rules = tp_plan(model)
    assert set(rules.values()) <= styles
    holder = "model.layers.*.self_attn.attn_variant"
    assert {f"{holder}.s", f"{holder}.b"} <= set(rules) <= {f"{holder}.s", f"{holder}.b", holder}
    assert tp_plan(worker.build(variant="softpick")) == {}
    assert tp_plan(model, {"model.layers.*.self_attn.q_proj": "colwise_rep"}) == {}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "wrong"),
    [(4, 2, 4, "2 key/value heads,"), (4, 2, 3, "4 heads and 2 key/value heads,"), (4, 4, 4, None)],
)
def test_heads_and_the_size_of_tensor_parallelism(heads, kv_heads, size, wrong):
    model = worker.build(variant="softpick", heads=heads, kv_heads=kv_heads)
    plan = dict(model.tp_plan)
    arguments = {"tp_plan": "auto", "tp_size": size}
    if wrong is None:
        prepare_tp(model, arguments)
    else:
        with pytest.raises(ValueError, match=wrong):
            prepare_tp(model, arguments)
    assert model.tp_plan == plan


def test_a_plan_in_place_of_the_models_own(monkeypatch):
    monkeypatch.setattr(parallel, "_merges", lambda: False)
    given = {"model.layers.*.self_attn.q_proj": "colwise"}
    model = worker.build()
    with pytest.raises(ValueError, match=r"rules of its variants; add .*attn_variant\.s"):
        prepare_tp(model, {"tp_plan": given, "tp_size": 2})
    prepare_tp(model, {"tp_plan": {**given, **tp_plan(model, given)}, "tp_size": 2})


@pytest.mark.parametrize("name", worker.INDIVISIBLE)
def test_heads_that_two_processes_cannot_share(found, name):
    heads, kv_heads = worker.INDIVISIBLE[name]
    for result in of(found, "indivisible"):
        assert "LlamaAttention (model.layers.0.self_attn)" in result[name]
        assert f"{kv_heads} key/value heads" in result[name]
        assert (f"{heads} heads" in result[name]) == (heads % 2 > 0)
        assert "tensor-parallel size 2" in result[name]


SAVED = ("ddp-softpick", "fsdp1-ssmax", "fsdp2-ssmax", "fsdp2-softpick", "native_fsdp-ssmax",
         "native_fsdp-softpick", "tensor-ssmax", "tensor-softpick", "tensor-Olmo2")  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_checkpoint_of_two_processes_loads_in_one(found, folder, name):
    check, kind = name.split("-")
    of(found, "gathered_heads" if kind == "Olmo2" else check)
    model, info = attnvariants.from_pretrained(
        transformers.AutoModelForCausalLM, folder / name, output_loading_info=True
    )
    assert not any(info.values())
    source = worker.build("Olmo2") if kind == "Olmo2" else worker.build(variant=kind)
    expected, state = source.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert torch.equal(run(model.eval()), run(source))
    assert model.config.attn_variants == source.config.attn_variants


def test_torch_distributed_checkpoint(found, folder):
    import torch.distributed.checkpoint as dcp

    for result in of(found, "checkpoint"):
        assert result["full"]
        assert result["logits"] <= 1e-5
    model = worker.build(s=9.0, b=8.0)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    model.load_state_dict(state["model"])
    assert torch.equal(run(model), run(worker.build()))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("ddp", "wrapped in DistributedDataParallel already; patch the model before"),
        ("fsdp1", "wrapped in FullyShardedDataParallel already; patch the model before"),
        ("fsdp2", "is a DTensor); patch it before fully_shard"),
        ("tensor", "load it with attnvariants.from_pretrained"),
    ],
)
def test_patching_a_wrapped_model_is_refused(found, check, message):
    for result in of(found, check):
        assert message in result["patched after"]
        assert "was changed" not in result["patched after"]


def test_unpatching_a_wrapped_model(found):
    for result in of(found, "ddp"):
        assert "patched as a part of another model" in result["unpatched after"]
    for check in ("fsdp2", "tensor"):
        assert all(result["unpatched"] <= 1e-5 for result in of(found, check))


def test_a_compiled_model_follows_its_original():
    model = worker.build(variant=None)
    compiled = torch.compile(model, backend="eager")
    run(compiled)
    with pytest.raises(ValueError, match="patch the model that was compiled"):
        patch(compiled, "softpick")
    patch(model, "softpick")
    assert torch.equal(run(compiled), run(worker.build(variant="softpick")))
    unpatch(model)
    assert torch.equal(run(compiled), run(worker.build(variant=None)))


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, partial(torch.compile, backend="eager")])
def test_unpatching_layers_that_were_wrapped(wrap):
    model = worker.build()
    model.model.layers[0] = wrap(model.model.layers[0])
    torch.testing.assert_close(run(model), run(worker.build()))
    unpatch(model)
    assert not any("attn_variant" in name for name, _ in model.named_modules())
    torch.testing.assert_close(run(model), run(worker.build(variant=None)))


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, torch.device("cpu"))


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, torch.device("cpu"))


def to_both(model, folder):
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb"), "cpu")
    places.update(dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk"))
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize("variant", worker.VARIANTS)
@pytest.mark.parametrize("offload", [to_cpu, to_disk, to_both])
def test_offloaded_models(tmp_path, offload, variant):
    model = worker.build(variant=None)
    handle = patch(
        model, variant, **{k: torch.tensor(v) for k, v in worker.VARIANTS[variant].items()}
    )
    offload(model, tmp_path / "parts")
    source = worker.build(variant=variant)
    assert torch.equal(run(model), run(source))
    assert all(value.is_meta for name, value in handle.parameters.items() if ".1." in name)
    assert handle.report.parameters == sum(value.numel() for value in handle.parameters.values())
    handle.verify()
    if offload is to_both:
        model.save_pretrained(tmp_path / "saved")
        again = attnvariants.from_pretrained(
            transformers.AutoModelForCausalLM, tmp_path / "saved", device_map={"": "cpu"}
        )
        assert torch.equal(run(again.eval()), run(source))
    handle.unpatch()
    assert torch.equal(run(model), run(worker.build(variant=None)))


@pytest.mark.parametrize("offload", [to_cpu, to_disk, to_both])
def test_patching_an_offloaded_model(tmp_path, offload):
    model = offload(worker.build(variant=None), tmp_path)
    expected, config = run(model), model.config.to_dict()
    with pytest.raises(ValueError, match="patch the model before dispatching it"):
        patch(model, "ssmax")
    assert model.config.to_dict() == config
    assert torch.equal(run(model), expected)
    patch(model, "softpick")
    assert torch.equal(run(model), run(worker.build(variant="softpick")))


@pytest.mark.parametrize("offload", [None, "disk"])
def test_loading_with_a_device_map(tmp_path, offload):
    source = worker.build()
    source.save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.layers": offload or "cpu", "model.norm": "cpu"}
    places.update({"model.rotary_emb": "cpu", "lm_head": "cpu"})
    model = attnvariants.from_pretrained(
        transformers.AutoModelForCausalLM,
        tmp_path / "saved",
        device_map=places,
        offload_folder=tmp_path / "parts",
    )
    assert torch.equal(run(model.eval()), run(source))
