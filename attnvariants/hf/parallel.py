"""Patched models over several processes: their tensor-parallel plan, and what cannot be patched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from attnvariants.hf.find import Target, attention_modules
from attnvariants.hf.holder import CHILD
from attnvariants.hf.names import parallel_styles

# Attention whose query projection has one of these styles computes its own share of the heads.
_SPLIT = ("colwise", "local_colwise")
# What cuts a parameter [heads]: transformers 4 has its own style for plain shards of one dimension.
_BY_HEADS = ("local_rowwise", "colwise")
# Newer releases keep shards as DTensors, which this style makes local where they are read.
_LOCAL = "local_params"
_QUERY = re.compile(r"(w?q|query)", re.I)
_BEFORE = "patch the model before wrapping it"
_WRAPPERS = {
    "DataParallel": _BEFORE,
    "DistributedDataParallel": _BEFORE,
    "FullyShardedDataParallel": _BEFORE,
    "OptimizedModule": "patch the model that was compiled (its _orig_mod), best before compiling",
}
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")


def tp_plan(model: nn.Module, plan: Mapping[str, str] | None = None) -> dict[str, str]:
    """The rules of tensor parallelism for the learned parameters of a patched model.

    A parameter `[heads]` is cut where the model's own plan cuts the heads of its module, and whole
    on every process otherwise. `from_pretrained` adds the rules to the model's plan by itself when
    it loads a model with tensor parallelism.

    Args:
        model: the patched model.
        plan: its plan, `pattern of names -> style`; by default `model.tp_plan`.

    Returns:
        `pattern of names -> style`, with `*` for layer numbers as in transformers' own plans.
    """
    styles = parallel_styles()
    style = next((style for style in _BY_HEADS if style in styles), _BY_HEADS[-1])
    rules: dict[str, str] = {}
    for target in _sharded(model, plan):
        learned = [name for name, _ in getattr(target.module, CHILD).named_parameters()]
        holder = _pattern(f"{target.name}.{CHILD}")
        rules.update({f"{holder}.{name}": style for name in learned})
        if learned and _LOCAL in styles:
            rules[holder] = _LOCAL
    return rules


def prepare_tp(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Add `tp_plan` to the plan of a patched model that is about to be sharded.

    Args:
        model: the patched model, before it is sharded.
        kwargs: what `from_pretrained` was called with, which says whether and how.

    Raises:
        ValueError: the heads of a patched module do not divide by the tensor-parallel size, or the
            caller's plan takes the place of the model's and lacks the rules of its variants.
    """
    size, given = _request(kwargs)
    if size == 1 or (given is not None and not given):
        return
    replaces = given is not None and not _merges()
    plan = {**({} if replaces else _own_plan(model)), **(given or {})}
    for target in _sharded(model, plan):
        _check_heads(target, size)
    rules = tp_plan(model, plan)
    if replaces and not rules.items() <= plan.items():
        raise ValueError(
            "in this version of transformers tp_plan takes the place of the model's own plan and "
            f"lacks the rules of its variants; add {rules} to it, or pass tp_plan='auto'."
        )
    model._tp_plan = {**_own_plan(model), **rules}  # type: ignore[assignment]


def fills_missing(kwargs: Mapping[str, Any]) -> bool:
    """Whether a load with these arguments can set learned values that its checkpoint lacks.

    Older releases of transformers cannot, under tensor parallelism.
    """
    return _merges() or _request(kwargs)[0] == 1


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that was wrapped or sharded already.

    Raises:
        ValueError: the model is a wrapper (DDP, FSDP, `torch.compile`), or its parameters are
            sharded.
    """
    kind = type(model).__name__
    for name, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            where = f"{name} is" if name else "the model is"
            raise ValueError(f"{where} wrapped in {wrapper} already; {_WRAPPERS[wrapper]}.")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"{kind} is sharded already ({name} is a DTensor); patch it before fully_shard, "
                "and for tensor parallelism save the patched model and load it with "
                "attnvariants.from_pretrained."
            )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"{kind} was loaded with tensor parallelism; save the patched model and load it with "
            "attnvariants.from_pretrained."
        )


def _sharded(model: nn.Module, plan: Mapping[str, str] | None) -> Iterator[Target]:
    """The patched modules whose heads the plan spreads over the processes."""
    plan = _own_plan(model) if plan is None else plan
    for target in attention_modules(model):
        if not hasattr(target.module, CHILD):
            continue
        inside = (f"{target.name}.{name}" for name, _ in target.module.named_modules() if name)
        queries = (name for name in inside if _QUERY.match(name[len(target.name) + 1 :]))
        if any(plan.get(_pattern(name)) in _SPLIT for name in queries):
            yield target


def _check_heads(target: Target, size: int) -> None:
    kv_heads = next(
        (
            value
            for name in _KV_HEADS
            if isinstance(value := getattr(target.config, name, None), int)
        ),
        None,
    )
    counts = {"heads": target.heads, "key/value heads": kv_heads}
    wrong = [f"{count} {what}" for what, count in counts.items() if count and count % size]
    if wrong:
        raise ValueError(
            f"{type(target.module).__name__} ({target.name}) has {' and '.join(wrong)}, which do "
            f"not divide by the tensor-parallel size {size}; choose a size that divides them."
        )


def _request(kwargs: Mapping[str, Any]) -> tuple[int, Mapping[str, str] | None]:
    """Tensor-parallel size and rules that a call of `from_pretrained` asks for."""
    config, plan, size = (kwargs.get(name) for name in ("distributed_config", "tp_plan", "tp_size"))
    if isinstance(config, Mapping):
        from transformers.distributed import DistributedConfig

        config = DistributedConfig.from_dict(dict(config))
    if config is not None:
        # Without a size of its own it is an older one, whose only use is expert parallelism.
        size, plan = getattr(config, "tp_size", 1), getattr(config, "tp_plan", None)
    elif size is None and plan is not None:
        mesh = kwargs.get("device_mesh")
        whole = int(os.environ.get("WORLD_SIZE", 1))
        size = whole if mesh is None else (mesh["tp"] if mesh.ndim > 1 else mesh).size()
    return size or 1, plan if isinstance(plan, Mapping) else None


def _merges() -> bool:
    """Whether a caller's plan is added to the model's own, as newer releases do."""
    from transformers.distributed import DistributedConfig

    return hasattr(DistributedConfig, "tp_size")


def _own_plan(model: nn.Module) -> dict[str, str]:
    plan = getattr(model, "_tp_plan", None)
    return dict(plan) if isinstance(plan, Mapping) else {}


def _pattern(name: str) -> str:
    """A qualified name with `*` for its layer numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
