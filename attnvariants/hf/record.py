"""The record of patches in a config, `config.attn_variants`: written, checked, put back."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from attnvariants._version import __version__
from attnvariants.hf.holder import CHILD, AttnVariant
from attnvariants.hf.penalties import AUTO, check_penalties
from attnvariants.hf.wrappers import plain_name
from attnvariants.recorded import RECORD
from attnvariants.registry import get_variant, list_variants, suggest

VERSION = 1
# Under this name in a saved config it stops a plain from_pretrained of transformers >= 5, whose
# error then quotes it. It is never registered.
SAVED_AS = "attn_implementation"
GUARD = "load with attnvariants.from_pretrained"
_REQUIRED = {"variant": str, "impl": str, "options": dict, "learned": list, "modules": list}
# What penalties must be, `check_penalties` knows.
_OPTIONAL = {
    "initial": dict,
    "trainable": bool,
    "masks": str,
    "backend": str,
    "penalties": object,
}


def own_record(holder: Any) -> dict[str, Any] | None:
    """The record of a holder; None if something else stands in its place."""
    return holder.record() if isinstance(holder, AttnVariant) else None


def entries_of(
    root: nn.Module, describe: Callable[[Any], dict[str, Any] | None] = own_record
) -> list[dict[str, Any]]:
    """What the modules of a model carry, modules with the same variant and options in one entry.

    Args:
        root: the model; module names in the entries are relative to it.
        describe: the record of what stands at `attn_variant`, or None to leave it out.
    """
    entries: list[dict[str, Any]] = []
    for name, module in root.named_modules():
        name = plain_name(name)
        # Wrappers answer for the attributes of what they wrap; children are one's own.
        record = describe(module._modules.get(CHILD))
        if record is None:
            continue
        same = (e for e in entries if {**e, "modules": 0} == {**record, "modules": 0})
        entry = next(same, None)
        if entry is None:
            entry = {**record, "modules": []}
            entries.append(entry)
        entry["modules"].append(name)
    return entries


def record_of(entries: list[dict]) -> dict[str, Any]:
    """The record with these entries, as it stands in a config."""
    return {"version": VERSION, "package": __version__, "patches": entries}


def read_record(record: Any, where: str) -> list[dict]:
    """The entries of a record, checked against what is installed.

    Args:
        record: the value of `config.attn_variants`, as JSON gives it.
        where: whose record it is, for the errors.

    Raises:
        ValueError: it is damaged, newer than this package, or names unknown variants or options.
    """
    version = record.get("version") if isinstance(record, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{where} records attention variants in a form that cannot be read: expected a "
            f"version and patches, got {_short(record)}; save the model again."
        )
    if record["version"] > VERSION:
        raise ValueError(
            f"{where} records attention variants in version {record['version']}, written by "
            f"attnvariants {record.get('package', 'of unknown version')}; this one, "
            f"{__version__}, reads up to version {VERSION}: upgrade attnvariants."
        )
    entries = record.get("patches")
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{where} records no list of patches, got {_short(entries)}; save the model again."
        )
    seen: set[str] = set()
    for entry in entries:
        _check_entry(entry, where)
        twice = sorted(seen.intersection(entry["modules"]))
        if twice:
            raise ValueError(f"{where} records {twice[0]} twice; save the model again.")
        seen.update(entry["modules"])
    return entries


def _check_entry(entry: Any, where: str) -> None:
    kinds = {**_REQUIRED, **_OPTIONAL}
    if not isinstance(entry, dict):
        raise ValueError(f"{where} records a patch that is no mapping, got {_short(entry)}.")
    for name in (*_REQUIRED, *(name for name in _OPTIONAL if name in entry)):
        if not isinstance(entry.get(name), kinds[name]):
            raise ValueError(
                f"{where} records a patch whose {name} must be a {kinds[name].__name__}, got "
                f"{_short(entry.get(name))}; save the model again."
            )
    for name in ("learned", "modules"):
        odd = [value for value in entry[name] if not isinstance(value, str)]
        if odd:
            raise ValueError(
                f"{where} records a patch whose {name} must be names, got {_short(odd[0])}; save "
                "the model again."
            )
    new = sorted(map(str, set(entry) - set(kinds)))
    if new:
        raise ValueError(
            f"{where} records {', '.join(new)} of a patch, which this package does not know; "
            "upgrade attnvariants."
        )
    name = entry["variant"]
    if name not in list_variants():
        raise ValueError(
            f"{where} was saved with the variant {name!r}, which is not registered: call "
            "attnvariants.register with it before loading, or upgrade attnvariants; "
            f"{suggest(name, list_variants())}"
        )
    variant = get_variant(name)
    learned, initial = entry["learned"], entry.get("initial", {})
    stray = [key for key in learned if key not in variant.learned]
    stray += [key for key in initial if key not in learned]
    if stray:
        raise ValueError(
            f"{where} records a learned value {stray[0]!r} of {name}, whose learned options are "
            f"{', '.join(variant.learned) or 'none'}; save the model again."
        )
    for key, value in initial.items():
        if not all(isinstance(v, (int, float)) for v in (value if _is_list(value) else [value])):
            raise ValueError(
                f"{where} records {name}'s {key} as {_short(value)}; it must be a number or a list "
                "of them: save the model again."
            )
    try:
        variant.resolve(entry["options"])
        check_penalties(_arguments(entry).get("penalties", AUTO))
    except ValueError as error:
        raise ValueError(f"{where} records what {name} does not take: {error}") from error


def _arguments(entry: dict) -> dict[str, Any]:
    """The keyword arguments of `patch` for an entry."""
    variant = get_variant(entry["variant"])
    initial = entry.get("initial", {})
    learned = {}
    for name in entry["learned"]:
        value = initial.get(name, variant.options[name].default)
        learned[name] = torch.tensor(value, dtype=torch.float64, device="cpu")
    variant.resolve(learned)
    more = {name: entry[name] for name in _OPTIONAL if name in entry and name != "initial"}
    return {"impl": entry["impl"], **more, **entry["options"], **learned}


def resolve_names(model: nn.Module, entries: list[dict], where: str) -> list[dict]:
    """The entries with module names as they are in this model.

    A head and its bare model differ by `base_model_prefix`, in either direction. What the model
    ignores in checkpoints, as a lone encoder does a decoder, is left out.

    Raises:
        ValueError: the model has no such modules.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = getattr(model, "base_model_prefix", "")
    ignored = list(map(re.compile, getattr(model, "_keys_to_ignore_on_load_unexpected", ()) or ()))
    wanted = [
        name
        for entry in entries
        for name in entry["modules"]
        if name in names or not any(pattern.search(name) for pattern in ignored)
    ]
    ways: tuple[Callable[[str], str], ...] = (
        lambda name: name,
        lambda name: name.removeprefix(f"{prefix}."),
        lambda name: f"{prefix}.{name}",
    )
    for way in ways:
        if all(way(name) in names for name in wanted):
            kept = set(wanted)
            return [
                {**entry, "modules": [way(name) for name in entry["modules"] if name in kept]}
                for entry in entries
                if kept.intersection(entry["modules"])
            ]
    lost = (name for name in wanted if all(way(name) not in names for way in ways))
    absent = next(lost, wanted[0])
    raise ValueError(
        f"{where} records a variant at {absent}, and {type(model).__name__} has no such module; "
        "load it with the class it was saved from."
    )


def restore(model: nn.Module, entries: Iterable[dict], impl: str | None = None) -> list[Any]:
    """Patch a model as the entries say, whose names are the model's own; all or nothing.

    A backend that the modules no longer have, or do not have yet, in the installed transformers
    is replaced by the one that they have, with a warning.

    Raises:
        ValueError: as `patch` and `backends.settled`.
    """
    from attnvariants.hf.backends import settled
    from attnvariants.hf.patcher import patch

    handles: list[Any] = []
    try:
        with torch.device("cpu"):
            for entry in settled(model, entries, impl):
                names = frozenset(entry["modules"])
                arguments = _arguments(entry) | ({"impl": impl} if impl else {})
                chosen = _named(names)
                handles.append(patch(model, entry["variant"], layers=chosen, **arguments))
    except BaseException:
        for handle in handles:
            handle.unpatch()
        raise
    return handles


def warn_of_plain_reload(model: nn.Module) -> None:
    """Warn if the config records variants that a plain `from_pretrained` left out."""
    record = getattr(getattr(model, "config", None), RECORD, None)
    if record is None or any(hasattr(module, CHILD) for module in model.modules()):
        return
    warnings.warn(plain_reload(model, record), stacklevel=3)


def plain_reload(model: nn.Module, record: Any) -> str:
    """That a model carries none of the variants that its config records, and what to do."""
    names = sorted({entry["variant"] for entry in record["patches"]}) if _readable(record) else ()
    return (
        f"the config of this {type(model).__name__} records attention variants "
        f"({', '.join(names) or 'of unknown name'}) that it does not carry: a plain "
        "from_pretrained leaves them and their learned values out. Load the model with "
        f"attnvariants.from_pretrained, or delete model.config.{RECORD} to patch it anew."
    )


def _readable(record: Any) -> bool:
    try:
        return bool(read_record(record, "the config"))
    except ValueError:
        return False


def _named(names: frozenset[str]) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: name in names


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
