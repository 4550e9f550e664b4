"""PEFT adapters of patched models: what the adapter was trained on is written beside it.

PEFT loads an adapter onto any base that has the layers it names. On a base without the variants,
or with others, that gives wrong numbers and no error, so `attn_variants.json` says what the base
must carry and `load_adapter` holds the base to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnvariants.hf.holder import CHILD, AttnVariant
from attnvariants.hf.record import entries_of, read_record, record_of, resolve_names, restore
from attnvariants.hf.wrappers import is_peft

SIDECAR = "attn_variants.json"
_WEIGHTS = "adapter_model.safetensors"


def peft_modules_to_save() -> list[str]:
    """For `LoraConfig(modules_to_save=...)`: the variants' learned values, trained and saved.

    Without it PEFT freezes them, as it does the rest of the base.
    """
    return [CHILD]


def save_adapter(model: Any, folder: Any, **kwargs: Any) -> None:
    """`model.save_pretrained(folder, **kwargs)` of a PEFT model, and what its base carries.

    Args:
        model: a `peft.PeftModel` whose base was patched before it was wrapped.
        folder: where to; adapters not named "default" go into folders of their own there.
        **kwargs: for `PeftModel.save_pretrained`.

    Raises:
        ValueError: the model is no PEFT model, its base carries no variants, or learned values
            were trained that PEFT does not save.
    """
    base = _base_of(model)
    if base is None:
        raise ValueError(
            f"save_adapter takes a PeftModel, got {type(model).__name__}; save other models with "
            "attnvariants.save_pretrained."
        )
    if kwargs.get("safe_serialization") is False:
        raise ValueError("save_adapter writes safetensors files only; drop safe_serialization.")
    entries = entries_of(base, _record)
    if not entries:
        raise ValueError(
            f"the base {type(base).__name__} carries no attention variants; save the adapter with "
            "model.save_pretrained."
        )
    for name, module in base.named_modules():
        holder = getattr(module, CHILD, None)
        if isinstance(holder, AttnVariant) and any(p.requires_grad for p in holder.parameters()):
            raise ValueError(
                f"the learned values of {name} are trained but PEFT would not save them; wrap the "
                "base with modules_to_save=attnvariants.hf.peft_modules_to_save()."
            )
    model.save_pretrained(folder, **kwargs)
    if kwargs.get("is_main_process", True):
        text = json.dumps(record_of(entries), indent=2, sort_keys=True) + "\n"
        for adapter in kwargs.get("selected_adapters") or list(model.peft_config):
            where = Path(folder) if adapter == "default" else Path(folder, adapter)
            (where / SIDECAR).write_text(text, encoding="utf-8")


def load_adapter(model: Any, folder: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
    """Load an adapter of `save_adapter` onto its base, patching the base first if it is plain.

    Args:
        model: the base model, or a PEFT model that is to get one more adapter.
        folder: the adapter's folder on disk.
        adapter_name: its name in the PEFT model.
        **kwargs: for `PeftModel.from_pretrained`, or `load_adapter` of a PEFT model.

    Returns:
        The PEFT model.

    Raises:
        ValueError: the folder does not say what the base must carry, a file is corrupt, or the
            base carries other variants or learned values than the adapter was trained with; the
            model is then as it was.
    """
    peft = _peft()
    where = Path(folder)
    entries, weights = _read(where)
    wrapped = _base_of(model)
    base = model if wrapped is None else wrapped
    if wrapped is None and is_peft(base):
        raise ValueError(
            f"{type(base).__name__} carries adapters already; pass the PeftModel around it, or "
            "unload them first."
        )
    if resolve_names(base, entries, str(where / SIDECAR)) != entries:
        raise ValueError(
            f"the adapter in {where} was trained on a model whose modules are named like "
            f"{entries[0]['modules'][0]}, which {type(base).__name__} has under another name; load "
            "it onto the class it was trained on."
        )
    handles: list[Any] = []
    patched = any(hasattr(module, CHILD) for module in base.modules())
    if patched:
        _check_base(base, entries, weights, where)
    elif wrapped is not None:
        raise ValueError(
            f"the base of this {type(model).__name__} carries no attention variants and the "
            f"adapter in {where} was trained with {entries[0]['variant']!r}; unload its adapters, "
            "and load this one onto the base first."
        )
    trainable = {name: value.requires_grad for name, value in base.named_parameters()}
    try:
        if wrapped is None:
            handles = [] if patched else restore(base, entries)
            _check_weights(base, weights, where)
            return peft.PeftModel.from_pretrained(base, str(where), adapter_name, **kwargs)
        _check_weights(base, weights, where)
        model.load_adapter(str(where), adapter_name, **kwargs)
        return model
    except Exception as error:
        if wrapped is None:
            _strip(base)
            for handle in handles:
                handle.unpatch()
        elif adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        for name, value in base.named_parameters():
            value.requires_grad_(trainable.get(name, value.requires_grad))
        if isinstance(error, KeyError):
            text = f"{where / _WEIGHTS} lacks {error}; save the adapter again."
            raise ValueError(text) from error
        raise


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need PEFT; pip install peft.") from error
    return peft


def _base_of(model: Any) -> Any:
    """The model inside a PeftModel, or None."""
    return model.get_base_model() if isinstance(model, _peft().PeftModel) else None


def _unwrapped(holder: Any) -> Any:
    """The base's own holder below PEFT's wrapper."""
    return getattr(holder, "original_module", holder)


def _record(holder: Any) -> dict[str, Any] | None:
    """The record of the base's own holder, with its values of now."""
    holder = _unwrapped(holder)
    return holder.record(current=True) if isinstance(holder, AttnVariant) else None


def _read(where: Path) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """The entries of an adapter's sidecar, and the shapes of its learned values by name."""
    from safetensors import SafetensorError, safe_open

    if not (where / "adapter_config.json").is_file():
        raise ValueError(f"{where} holds no adapter_config.json, so it is no PEFT adapter.")
    if not (where / SIDECAR).is_file():
        raise ValueError(
            f"{where} holds no {SIDECAR}, which says what variants its base must carry: it was not "
            "saved by attnvariants.hf.save_adapter. On a base patched exactly as in training, load "
            "it with PeftModel.from_pretrained and save it with save_adapter."
        )
    if not (where / _WEIGHTS).is_file():
        raise ValueError(
            f"{where} holds no {_WEIGHTS}, and pickled weights are not loaded; save the adapter "
            "with save_adapter."
        )
    try:
        record = json.loads((where / SIDECAR).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where / SIDECAR} is no valid JSON: {error}.") from error
    try:
        with safe_open(where / _WEIGHTS, "pt") as file:
            names = [name for name in file.keys() if f".{CHILD}." in name]  # noqa: SIM118
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{where / _WEIGHTS} is truncated or corrupt: {error}.") from error
    own = {name.removeprefix("base_model.model."): shape for name, shape in shapes.items()}
    return read_record(record, str(where / SIDECAR)), own


def _check_base(
    base: nn.Module, entries: list[dict[str, Any]], weights: dict[str, list[int]], where: Path
) -> None:
    """Raise ValueError unless the base carries what the adapter was trained with."""
    have, want = _by_module(entries_of(base, _record)), _by_module(entries)
    for name in sorted(have.keys() | want.keys()):
        mine, its = have.get(name), want.get(name)
        if mine != its:
            raise ValueError(
                f"the adapter in {where} was trained with {_say(its)} at {name}, and this base has "
                f"{_say(mine)}; load it onto the base it was trained on."
            )
    for entry in entries:
        for name in entry["modules"]:
            holder = _unwrapped(getattr(base.get_submodule(name), CHILD))
            for key, value in entry.get("initial", {}).items():
                now = getattr(holder, key).detach()
                then = torch.as_tensor(value, dtype=now.dtype, device=now.device).expand_as(now)
                if f"{name}.{CHILD}.{key}" not in weights and not torch.equal(now, then):
                    raise ValueError(
                        f"{name}.{CHILD}.{key} of this base holds other values than the adapter in "
                        f"{where} was trained with, and the adapter does not bring its own; load "
                        "it onto the base it was trained on."
                    )


def _check_weights(base: nn.Module, weights: dict[str, list[int]], where: Path) -> None:
    """Raise ValueError unless the base has a place for every learned value of the adapter."""
    for name, shape in weights.items():
        path, _, key = name.partition(f".{CHILD}.")
        holder = _unwrapped(getattr(base.get_submodule(path), CHILD, None))
        mine = getattr(holder, key, None)
        if mine is None or list(mine.shape) != list(shape):
            got = "does not have it" if mine is None else f"needs {list(mine.shape)}"
            raise ValueError(
                f"{name} in {where / _WEIGHTS} has shape {list(shape)} and the base {got}; the "
                "adapter is another model's."
            )


def _by_module(entries: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """`module -> what it computes`; not by which engine, nor from which initial values."""
    return {
        name: (entry["variant"], entry["options"], sorted(entry["learned"]))
        for entry in entries
        for name in entry["modules"]
    }


def _say(what: tuple[Any, ...] | None) -> str:
    if what is None:
        return "no variant"
    variant, options, learned = what
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{variant!r}({', '.join(filter(None, [given, *(f'learned {n}' for n in learned)]))})"


def _strip(base: nn.Module) -> None:
    """Take out what a failed load of an adapter left in the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(base.named_modules()):
        inner = getattr(module, "original_module", None)
        if isinstance(module, BaseTunerLayer):
            inner = module.get_base_layer()
        if inner is not None and type(module).__module__.startswith("peft."):
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, inner)
    base.__dict__.pop("peft_config", None)
