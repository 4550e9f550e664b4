"""Save a patched model so that what is written can be restored, or say why it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attnvariants.hf import masks
from attnvariants.hf.find import attention_modules
from attnvariants.hf.holder import CHILD
from attnvariants.hf.names import implementation_of
from attnvariants.hf.record import GUARD, SAVED_AS, entries_of, record_of
from attnvariants.hf.state import state_of
from attnvariants.hf.wrappers import (
    gathered,
    is_first_process,
    is_native,
    is_sharded,
    plain_name,
    unwrapped,
)
from attnvariants.recorded import RECORD


def save_pretrained(
    model: nn.Module,
    folder: Any,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    guard: bool = True,
    **kwargs: Any,
) -> None:
    """`model.save_pretrained(folder, **kwargs)` of a patched model, checked first.

    Learned values are written with the other weights and the variants into config.json, from
    which `from_pretrained` restores them. DDP, DataParallel and torch.compile wrappers are taken
    off. Of several processes all may call this, and of a sharded model all must; the first one
    writes, or the one with `is_main_process=True`.

    Args:
        model: a patched transformers model; one without variants is saved as it is.
        folder: where to.
        state_dict: the weights, such as `accelerator.get_state_dict(model)` gives; default the
            model's.
        guard: write an `attn_implementation` into config.json that makes a plain `from_pretrained`
            of transformers >= 5 fail with a hint, in place of silently loading another model.
            Passing it `attn_implementation="sdpa"` loads the plain model, with a warning.
        **kwargs: for `model.save_pretrained`.

    Raises:
        ValueError: the model carries PEFT adapters, its record and its variants disagree, layers
            share a variant, `state_dict` lacks learned values, or the folder is a file.
    """
    whole = unwrapped(model)
    entries = _checked(whole)
    if kwargs.get("safe_serialization") is False:
        raise ValueError("save_pretrained writes safetensors files only; drop safe_serialization.")
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file; give a folder to save the model in.")
    main = kwargs.setdefault("is_main_process", is_first_process())
    if state_dict is None and is_sharded(model):
        state_dict = gathered(model)
    if not main and not is_native(whole):
        return
    if state_dict is not None:
        _check_weights(whole, state_dict)
        kwargs["state_dict"] = dict(state_dict)
    with _recorded(whole.config, entries, guard):
        whole.save_pretrained(folder, **kwargs)


def _checked(model: Any) -> list[dict[str, Any]]:
    """The entries to record, if the model agrees with itself."""
    kind = type(model).__name__
    entries = entries_of(model)
    if not entries and getattr(model.config, RECORD, None) is not None:
        raise ValueError(
            f"the config of this {kind} records attention variants that it does not carry: it was "
            "loaded by a plain from_pretrained, which gives other numbers; load it with "
            f"attnvariants.from_pretrained, or delete model.config.{RECORD} to save it as it is."
        )
    if entries and getattr(model.config, "output_attentions", False):
        raise ValueError(
            "transformers neither saves nor loads config.output_attentions=True but for eager "
            f"attention; set it to False on the config of this {kind}, and pass "
            "output_attentions=True to its calls."
        )
    owner: dict[int, str] = {}
    for name, module in model.named_modules():
        holder = module._modules.get(CHILD)
        if holder is not None and owner.setdefault(id(holder), name) != name:
            raise ValueError(
                f"{name} and {owner[id(holder)]} share one {CHILD}, which safetensors cannot "
                "hold; patch them apart."
            )
    patched = {name for entry in entries for name in entry["modules"]}
    state = state_of(model)
    for handle in state.handles if state is not None else ():
        torn = sorted(set(handle.names) - patched)
        if torn:
            raise ValueError(
                f"{torn[0]} was patched and its {CHILD} is gone; call unpatch(model) and patch it "
                "again before saving."
            )
    for target in attention_modules(model) if entries else ():
        holder = getattr(target.module, CHILD, None)
        if holder is None or "backend" in holder.record():
            continue
        if implementation_of(target.config) not in masks.KEYS:
            raise ValueError(
                f"{target.name} carries {holder.variant!r}, but the model's attention "
                f"implementation was set to {implementation_of(target.config)!r} after "
                "patching, which does not use it; patch again, or unpatch before saving."
            )
    return entries


def _check_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raise ValueError if weights given by hand lack learned values."""
    names = (plain_name(name) for name, _ in model.named_parameters())
    wanted = [name for name in names if f".{CHILD}." in name]
    absent = [name for name in wanted if name not in state_dict]
    if absent:
        like = next(iter(state_dict), "nothing")
        raise ValueError(
            f"state_dict lacks {len(absent)} learned values, the first is {absent[0]}, and holds "
            f"names like {like}; pass accelerator.get_state_dict(model) or model.state_dict()."
        )


@contextmanager
def _recorded(config: Any, entries: list[dict[str, Any]], guard: bool) -> Iterator[None]:
    """The config with the record of what the model carries, and as it was afterwards."""
    own = config.__dict__
    before = {name: own[name] for name in (RECORD, SAVED_AS) if name in own}
    if entries:
        own[RECORD] = record_of(entries)
        own.pop(SAVED_AS, None)
    if entries and guard:
        own[SAVED_AS] = GUARD
    try:
        yield
    finally:
        for name in (RECORD, SAVED_AS):
            own.pop(name, None)
        own.update(before)
