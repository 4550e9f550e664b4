"""One of two processes that test_hf_parallel.py starts: runs checks, writes JSON.

python parallel_worker.py RANK PORT FOLDER
"""

import faulthandler
import functools
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tiny import SMALL
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import attnvariants
from attnvariants import patch, unpatch
from attnvariants.hf.parallel import tp_plan
from attnvariants.hf.report import report_of

TOKENS = torch.randint(3, 99, (2, 18), generator=torch.Generator().manual_seed(1))
VARIANTS = {"ssmax": {"s": [0.3, 0.5, 0.7, 0.9], "b": 0.1}, "softpick": {}}
UNEVEN = {"one head": (1, 1), "three heads": (3, 3)}
# (heads, kv heads) that two processes cannot share.
INDIVISIBLE = {"heads": (3, 3), "kv heads": (4, 1)}


def build(family="Llama", variant="ssmax", heads=4, kv_heads=2, **options):
    """A tiny patched model whose every head has a value of its own."""
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": 8 * heads,
    }
    config = getattr(transformers, f"{family}Config")(**SMALL | sizes, pad_token_id=0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if variant:
        options = options or VARIANTS[variant]
        patch(
            model, variant, **{k: torch.tensor(v).broadcast_to(heads) for k, v in options.items()}
        )
    return model


def loss_of(logits, tokens):
    """Mean over rows that do not depend on each other, as data parallelism needs."""
    return logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).mean().neg()


@functools.cache
def expected(*arguments, **options):
    """Logits and gradients of one process on the whole batch."""
    model = build(*arguments, **options)
    logits = model(TOKENS).logits
    loss_of(logits, TOKENS).backward()
    return logits.detach(), {name: value.grad for name, value in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(run, parameters, rows, *arguments, **options):
    """Largest differences of logits and gradients from one process."""
    logits, grads = expected(*arguments, **options)
    out = run(TOKENS[rows]).logits
    loss_of(out, TOKENS[rows]).backward()
    apart = {}
    for name, value in parameters(run):
        name = name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
        grad = whole(value.grad)
        if grad.shape != grads[name].shape:
            (share,) = (
                dim for dim, size in enumerate(grad.shape) if size != grads[name].shape[dim]
            )
            parts = [torch.empty_like(grad) for _ in range(2)]
            dist.all_gather(parts, grad.contiguous())
            grad = torch.cat(parts, share)
        apart[name] = (grad - grads[name]).abs().max().item()
    learned = {name: value for name, value in apart.items() if "attn_variant" in name}
    return {
        "logits": (out - logits[rows]).abs().max().item(),
        "grads": max(apart.values()),
        "learned": max(learned.values(), default=0.0),
        "names": sorted(learned),
        "all": apart.keys() == grads.keys(),
    }


def named(model):
    return model.named_parameters()


def message(call, model=None):
    """The text of the ValueError of a call, and whether it left the model alone."""
    before = model and (list(dict(model.named_modules())), str(getattr(model, "config", "")))
    try:
        call()
    except ValueError as error:
        after = model and (list(dict(model.named_modules())), str(getattr(model, "config", "")))
        return str(error) if after == before else f"the model was changed: {error}"
    return "no error"


def distributed(**sizes):
    """Arguments of from_pretrained, or None where transformers has none for it."""
    from transformers.distributed import DistributedConfig

    if hasattr(DistributedConfig, "tp_size"):
        return {"distributed_config": DistributedConfig(**sizes)}
    return {"tp_plan": "auto"} if "tp_size" in sizes else None


def load(folder, **sizes):
    """A model of a folder, sharded, with what its load reports."""
    arguments = distributed(**sizes)
    if arguments is None:
        return None
    model, info = attnvariants.from_pretrained(
        transformers.AutoModelForCausalLM, folder, output_loading_info=True, **arguments
    )
    return model.eval(), {name: sorted(map(str, keys)) for name, keys in info.items() if keys}


def saved(model, folder, save=attnvariants.save_pretrained):
    dist.barrier()
    save(model, folder)
    dist.barrier()


def ddp(rank, folder):
    found = {}
    for variant in VARIANTS:
        model = build(variant=variant)
        run = torch.nn.parallel.DistributedDataParallel(model)
        found[variant] = compare(run, named, slice(rank, rank + 1), variant=variant)
    if rank == 0:
        attnvariants.save_pretrained(run, folder / "ddp-softpick")
    found["patched after"] = message(lambda: patch(run, "relu"), run)
    found["unpatched after"] = message(lambda: unpatch(run), run)
    return found


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2(rank, folder):
    found = {}
    for variant in VARIANTS:
        model = shard(build(variant=variant))
        found[variant] = compare(model, named, slice(rank, rank + 1), variant=variant)
        saved(model, folder / f"fsdp2-{variant}")
    unpatch(model)
    plain = expected(variant=None)[0]
    found["unpatched"] = (model(TOKENS).logits - plain).abs().max().item()
    found["patched after"] = message(lambda: patch(model, "ssmax"), model)
    for name, (heads, kv_heads) in UNEVEN.items():
        sizes = {"heads": heads, "kv_heads": kv_heads, "s": 0.5}
        found[name] = compare(shard(build(**sizes)), named, slice(rank, rank + 1), **sizes)
    return found


def fsdp1(rank, folder):
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = build()
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    cpu = torch.device("cpu")
    run = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu
    )

    def gathered(run):
        with FullyShardedDataParallel.summon_full_params(run, with_grads=True):
            yield from run.named_parameters()

    found = {"ssmax": compare(run, gathered, slice(rank, rank + 1))}
    saved(run, folder / "fsdp1-ssmax")
    found["patched after"] = message(lambda: patch(run, "relu"), run)
    return found


def checkpoint(rank, folder):
    """torch.distributed.checkpoint: sharded to sharded, and sharded to one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    model, logits = shard(build()), expected()[0]
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    full = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    own = build().state_dict()
    other = shard(build(s=9.0, b=8.0))
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state["model"])
    return {
        "logits": (other(TOKENS).logits - logits).abs().max().item(),
        "full": rank > 0
        or (full.keys() == own.keys() and all(torch.equal(full[k], own[k]) for k in own)),
    }


def native_fsdp(rank, folder):
    found = {}
    for variant in VARIANTS:
        loaded = load(folder / variant, fsdp_size=2)
        if loaded is None:
            return {"skip": "this transformers has no DistributedConfig(fsdp_size=...)"}
        model, info = loaded
        found[variant] = compare(model, named, slice(rank, rank + 1), variant=variant)
        found[variant]["info"] = info
        saved(model, folder / f"native_fsdp-{variant}", type(model).save_pretrained)
    return found


def tensor(rank, folder):
    found = {}
    for variant in VARIANTS:
        model, info = load(folder / variant, tp_size=2)
        found[variant] = compare(model, named, slice(None), variant=variant)
        found[variant]["info"] = info
        report = report_of(model)
        found[variant]["learned values"] = [row.parameters for row in report.patched]
        tokens = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
        single = build(variant=variant).generate(TOKENS, max_new_tokens=4, do_sample=False)
        found[variant]["generated"] = torch.equal(tokens, single)
        saved(model, folder / f"tensor-{variant}")
    found["patched after"] = message(lambda: patch(model, "relu"), model)
    unpatch(model)
    plain = expected(variant=None)[0]
    found["unpatched"] = (model(TOKENS).logits - plain).abs().max().item()
    return found


def gathered_heads(rank, folder):
    """Olmo2's plan gathers the projections, so that every process computes all heads."""
    model, info = load(folder / "Olmo2", tp_size=2)
    found = {"Olmo2": {**compare(model, named, slice(None), "Olmo2"), "info": info}}
    found["rules"] = tp_plan(model)
    saved(model, folder / "tensor-Olmo2")
    return found


def missing_values(rank, folder):
    """A checkpoint without learned values: the recorded ones, each process its own."""
    if "distributed_config" not in distributed(tp_size=2):
        return {"refused": message(lambda: load(folder / "missing", tp_size=2))}
    model, _ = load(folder / "missing", tp_size=2)
    return {"logits": (model(TOKENS).logits - expected()[0]).abs().max().item()}


def indivisible(rank, folder):
    return {name: message(lambda name=name: load(folder / name, tp_size=2)) for name in INDIVISIBLE}


CHECKS = (
    ddp,
    fsdp2,
    fsdp1,
    checkpoint,
    native_fsdp,
    tensor,
    gathered_heads,
    missing_values,
    indivisible,
)


def main(rank, port, folder):
    """Run all checks; one that fails is reported with its traceback."""
    faulthandler.enable()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = port
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    found = {}
    for check in CHECKS:
        try:
            found[check.__name__] = check(rank, folder)
        except Exception:
            found[check.__name__] = {"error": traceback.format_exc()}
            traceback.print_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
