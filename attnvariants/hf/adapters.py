"""PEFT adapters of patched models: what the adapter was trained on is written beside it.

PEFT loads an adapter onto any base that has the layers it names. On a base without the variants,
or with others, that gives wrong numbers and no error, so `attn_variants.json` says what the base
must carry and `load_adapter` holds the base to it.
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnvariants.hf.holder import CHILD, AttnVariant
from attnvariants.hf.penalties import AUTO
from attnvariants.hf.record import entries_of, read_record, record_of, resolve_names, restore
from attnvariants.hf.wrappers import is_peft
from attnvariants.recorded import RECORD

SIDECAR = "attn_variants.json"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
    _save(model, folder, **kwargs)


def begin_adapter(model: Any, tuner: nn.Module) -> None:
    """Have a PeftModel that begins to be built save what its base carries, whoever saves it.

    Whoever loads an adapter into it is warned if the adapter tells of another base. Warns if its
    adapter has learned values of variants and the base carries none.
    """
    if hasattr(type(model), "get_base_model"):
        model.load_adapter = functools.partial(_load, model)
    if any(CHILD in module._modules for module in tuner.modules()):
        # a wrapper of the instance: other PeftModels save as always
        model.save_pretrained = functools.partial(_save, model)
        return
    configs = getattr(tuner, "peft_config", {})
    if any(CHILD in (getattr(c, "modules_to_save", None) or ()) for c in configs.values()):
        warnings.warn(
            "this adapter is for a model with attention variants and the base carries none: it is "
            "loaded with attnvariants.hf.load_adapter(base, folder), or its base patched first.",
            stacklevel=2,
        )


def _save(model: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of a PeftModel, and beside each adapter what its base carries."""
    type(model).save_pretrained(model, folder, *args, **kwargs)
    entries = entries_of(model.get_base_model(), _record)
    if not entries or not kwargs.get("is_main_process", True):
        return
    text = json.dumps(record_of(entries), indent=2, sort_keys=True) + "\n"
    for adapter in kwargs.get("selected_adapters") or list(model.peft_config):
        where = Path(folder) if adapter == "default" else Path(folder, adapter)
        if where.is_dir():
            (where / SIDECAR).write_text(text, encoding="utf-8")


def _load(model: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
    """`load_adapter` of a PeftModel, which warns if the base is not what the adapter tells."""
    try:
        check_told(model.get_base_model(), Path(folder, kwargs.get("subfolder") or ""))
    except ValueError as error:
        warnings.warn(
            f"{error} PEFT loads it all the same, and its outputs are wrong; "
            "attnvariants.hf.load_adapter(base, folder) patches a plain base first.",
            stacklevel=3,
        )
    return type(model).load_adapter(model, folder, *args, **kwargs)


def check_told(base: nn.Module, where: Path) -> None:
    """Hold a base to what the adapter in a folder tells, if there is one that does.

    Raises:
        ValueError: the base has other variants than the adapter was trained with.
    """
    if (where / SIDECAR).is_file():
        _check_modules(base, _read_sidecar(where), where)


def load_adapter(model: Any, folder: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
    """Load an adapter of `save_adapter` onto its base, patching the base first if it is plain.

    An adapter that PEFT itself saved does not say what its base carried, and is loaded as PEFT does
    if nothing speaks against the base: it has a place for every learned value of the adapter, and
    carries what the folder records that the adapter names as its base. Where neither tells, a base
    with variants is taken with a warning.

    Args:
        model: the base model, or a PEFT model that is to get one more adapter.
        folder: the adapter's folder on disk.
        adapter_name: its name in the PEFT model.
        **kwargs: for `PeftModel.from_pretrained`, or `load_adapter` of a PEFT model.

    Returns:
        The PEFT model.

    Raises:
        ValueError: the folder holds no adapter, a file is corrupt, or the base carries other
            variants or learned values than the adapter was trained with; the model is then
            as it was.
    """
    peft = _peft()
    where = Path(folder)
    weights = _read_weights(where)
    told = (where / SIDECAR).is_file()
    wrapped = _base_of(model)
    base = model if wrapped is None else wrapped
    if wrapped is None and is_peft(base):
        raise ValueError(
            f"{type(base).__name__} carries adapters already; pass the PeftModel around it, or "
            "unload them first."
        )
    patched = any(hasattr(module, CHILD) for module in base.modules())
    entries = _read_sidecar(where) if told else []
    if not told:
        _check_untold(base, weights, where)
    elif resolve_names(base, entries, str(where / SIDECAR)) != entries:
        raise ValueError(
            f"the adapter in {where} was trained on a model whose modules are named like "
            f"{entries[0]['modules'][0]}, which {type(base).__name__} has under another name; load "
            "it onto the class it was trained on."
        )
    handles: list[Any] = []
    if told and patched:
        _check_base(base, entries, weights, where)
    elif told and wrapped is not None:
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


def _read_weights(where: Path) -> dict[str, list[int]]:
    """The shapes of an adapter's learned values by name."""
    from safetensors import SafetensorError, safe_open

    if not (where / _CONFIG).is_file():
        raise ValueError(f"{where} holds no {_CONFIG}, so it is no PEFT adapter.")
    if not (where / _WEIGHTS).is_file():
        raise ValueError(
            f"{where} holds no {_WEIGHTS}, and pickled weights are not loaded; save the adapter "
            "with save_adapter."
        )
    try:
        with safe_open(where / _WEIGHTS, "pt") as file:
            names = [name for name in file.keys() if f".{CHILD}." in name]  # noqa: SIM118
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{where / _WEIGHTS} is truncated or corrupt: {error}.") from error
    return {name.removeprefix("base_model.model."): shape for name, shape in shapes.items()}


def _read_sidecar(where: Path) -> list[dict[str, Any]]:
    """The entries that say what an adapter was trained on."""
    return read_record(_json(where / SIDECAR), str(where / SIDECAR))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error


def _check_untold(base: nn.Module, weights: dict[str, list[int]], where: Path) -> None:
    """Hold a base to what is known of an adapter that PEFT itself saved.

    Raises:
        ValueError: the base is another than the adapter names, or carries no variants and the
            adapter brings learned values of some.
    """
    have = _by_module(entries_of(base, _record))
    named = str(_json(where / _CONFIG).get("base_model_name_or_path") or "")
    config = Path(named, "config.json")
    record = _json(config).get(RECORD) if named and config.is_file() else None
    if record is not None:
        want = _by_module(resolve_names(base, read_record(record, str(config)), str(config)))
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise ValueError(
                    f"the adapter in {where} was trained on {named}, which has "
                    f"{_say(want.get(name))} at {name}, and this base has {_say(have.get(name))}; "
                    f"load the base with attnvariants.from_pretrained from {named}."
                )
    elif weights and not have:
        raise ValueError(
            f"{where} holds learned values of attention variants, such as {min(weights)}, and no "
            f"{SIDECAR}, which says what its base must carry: it was not saved by "
            "attnvariants.hf.save_adapter. Patch the base exactly as in training first."
        )
    elif have:
        warnings.warn(
            f"{where} does not say what attention variants it was trained with, and was loaded "
            f"onto a base with {_say(next(iter(have.values())))}; save it with "
            "attnvariants.hf.save_adapter.",
            stacklevel=3,
        )


def _check_base(
    base: nn.Module, entries: list[dict[str, Any]], weights: dict[str, list[int]], where: Path
) -> None:
    """Raise ValueError unless the base carries the adapter's variants, with their values."""
    _check_modules(base, entries, where)
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


def _check_modules(base: nn.Module, entries: list[dict[str, Any]], where: Path) -> None:
    """Raise ValueError unless the base has the variants that the adapter was trained with."""
    have, want = _by_module(entries_of(base, _record)), _by_module(entries)
    for name in sorted(have.keys() | want.keys()):
        mine, its = have.get(name), want.get(name)
        if mine != its:
            raise ValueError(
                f"the adapter in {where} was trained with {_say(its)} at {name}, and this base has "
                f"{_say(mine)}; load it onto the base it was trained on."
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
        name: (
            entry["variant"],
            entry["options"],
            sorted(entry["learned"]),
            entry.get("penalties", AUTO),
        )
        for entry in entries
        for name in entry["modules"]
    }


def _say(what: tuple[Any, ...] | None) -> str:
    if what is None:
        return "no variant"
    variant, options, learned, penalties = what
    options = options if penalties == AUTO else {**options, "penalties": penalties}
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
