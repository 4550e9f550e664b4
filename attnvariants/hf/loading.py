"""Load a saved model with its variants: holders are in place before the weights come.

transformers builds a model from its config and then fills it from the checkpoint. Between the two,
at the end of `PreTrainedModel.post_init`, the variants that the config records are patched in, so
that shards, dtypes, device maps and parallel plans treat learned values as any other weight. What
the checkpoint lacks is set by `AttnVariant.reset_parameters` where transformers initialises.
"""

from __future__ import annotations

import functools
import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnvariants.engines import check_impl
from attnvariants.hf import masks
from attnvariants.hf.adapters import check_told
from attnvariants.hf.holder import CHILD, AttnVariant
from attnvariants.hf.names import implementation_of
from attnvariants.hf.parallel import fills_missing, prepare_tp
from attnvariants.hf.record import GUARD, read_record, resolve_names, restore
from attnvariants.recorded import RECORD

_WRAPPED = ("from_pretrained", "post_init")
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_CANNOT_FILL = (
    "this version of transformers cannot set them under tensor parallelism: load the model in one "
    "process, save it, and load that"
)
_lock = threading.Lock()
_users = 0
_originals: dict[str, Any] = {}


class _Thread(threading.local):
    """The settings of the `auto_load` blocks this thread is in, and its running loads."""

    def __init__(self) -> None:
        self.settings: list[tuple[str | None, bool]] = []
        self.loads: list[_Load] = []


_thread = _Thread()


def is_loading() -> bool:
    """Whether a load that restores variants is running in this thread."""
    return bool(_thread.loads)


class _Load:
    """One running `PreTrainedModel.from_pretrained`."""

    def __init__(
        self, cls: type, source: Any, kwargs: dict[str, Any], impl: str | None, strict: bool
    ):
        self.cls, self.kwargs, self.impl, self.strict = cls, kwargs, impl, strict
        self.folder = Path(source) if isinstance(source, (str, Path)) else None
        self.where = "the config" if source is None else f"the config of {source}"
        self.model: nn.Module | None = None

    def means(self, model: nn.Module) -> bool:
        """Whether this is the whole model being loaded, and not a part of it."""
        return self.model is None and type(model) is self.cls

    def attach(self, model: nn.Module) -> None:
        """Patch the empty model as its config records."""
        from transformers import PreTrainedModel

        self.model = model
        record = getattr(model.config, RECORD, None)
        if record is None:
            self._refuse_other_config()
            return
        entries = resolve_names(model, read_record(record, self.where), self.where)
        for module in model.modules():
            # Parts of a model may have a copy of its config.
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop(RECORD, None)
        restore(model, entries, self.impl)
        prepare_tp(model, self.kwargs)

    def _refuse_other_config(self) -> None:
        """Raise ValueError if a config was passed that lacks the record of the one on disk."""
        subfolder = self.kwargs.get("subfolder") or ""
        path = Path(self.folder or ".", subfolder, "config.json")
        if self.folder is None or not path.is_file():
            return
        if json.loads(path.read_text(encoding="utf-8")).get(RECORD) is not None:
            raise ValueError(
                f"{path} records attention variants and the config that was passed does not; pass "
                f"the saved one, or delete {RECORD} from the file to load the plain model."
            )

    def finish(self, model: Any, info: dict[str, Any]) -> None:
        """Judge what transformers found of the learned values.

        Raises:
            ValueError: the checkpoint holds others than the config records, or lacks some and the
                load is strict.
        """
        if self.model is None and getattr(model.config, RECORD, None) is not None:
            raise ValueError(
                f"{self.cls.__name__} does not call post_init when it is built, so its recorded "
                "variants cannot be restored; load it plainly and patch it."
            )
        unexpected = _ours(info.get("unexpected_keys"))
        missing = _ours(info.get("missing_keys"))
        if unexpected:
            raise ValueError(
                f"its learned values do not match its config at {unexpected[0]}: the checkpoint "
                f"holds it and {self.where} records no variant that has it; restore the config "
                "that the model was saved with."
            )
        if missing:
            text = (
                f"the checkpoint lacks {len(missing)} learned values that {self.where} records, "
                f"the first is {missing[0]}"
            )
            for name in missing:
                path, _, key = name.rpartition(".")
                model.get_submodule(path).reset_parameters([key])
            if not fills_missing(self.kwargs):
                raise ValueError(f"{text}; {_CANNOT_FILL}.")
            if self.strict:
                raise ValueError(f"{text}; save the model again, or load it with strict=False.")
            warnings.warn(f"{text}; they have their initial values from the record.", stacklevel=4)
        self._check_values(model)
        for module in model.modules():
            # transformers makes every parameter it loads require a gradient.
            if isinstance(module, AttnVariant) and not module.trainable:
                module.requires_grad_(False)

    def _check_values(self, model: nn.Module) -> None:
        """Raise ValueError if learned values that were loaded hold NaN or infinity."""
        for name, value in model.named_parameters():
            if f".{CHILD}." in name and not value.is_meta:
                local = value.to_local() if hasattr(value, "to_local") else value
                if not bool(local.detach().isfinite().all()):
                    raise ValueError(
                        f"its learned values hold NaN or infinity at {name}; the checkpoint is "
                        "damaged, or the training diverged: load an earlier one."
                    )

    def explain(self) -> str | None:
        """Why the checkpoint could not be loaded, from a look at its files."""
        from safetensors import SafetensorError, safe_open

        if self.folder is None or not self.folder.is_dir():
            return None
        for path in sorted([*self.folder.glob("config.json"), *self.folder.glob("*.index.json")]):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                return f"{path} is no valid JSON: {error}."
        expected = dict(self.model.named_parameters()) if self.model is not None else {}
        prefix = getattr(self.model, "base_model_prefix", "")
        absent = set(_ours(expected))
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    shapes = {name: file.get_slice(name).get_shape() for name in _ours(file.keys())}
            except (SafetensorError, OSError) as error:
                return f"{path} is truncated or corrupt: {error}."
            for name, shape in shapes.items():
                for own in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                    absent.discard(own)
                    if own in expected and list(expected[own].shape) != list(shape):
                        return (
                            f"{name} in {path} has shape {list(shape)}, the model needs "
                            f"{list(expected[own].shape)}, one value a head; the checkpoint is "
                            "another model's."
                        )
        if absent and not fills_missing(self.kwargs):
            return f"the checkpoint lacks learned values such as {min(absent)}; {_CANNOT_FILL}."
        return None


def _ours(names: Any) -> list[str]:
    """The names of learned values, of a report's entries, in order."""
    texts = (name if isinstance(name, str) else name[0] for name in names or ())
    return sorted(name for name in texts if f".{CHILD}." in name)


@contextmanager
def auto_load(*, impl: str | None = None, strict: bool = False) -> Iterator[None]:
    """Inside, this thread's `from_pretrained` of any transformers class restores variants.

    Models whose config records no variants load as always. Methods of
    `transformers.PreTrainedModel` are wrapped meanwhile and put back afterwards; other threads
    see no difference.

    Args:
        impl: engine of the restored variants in place of the recorded one.
        strict: refuse a checkpoint that lacks learned values, in place of a warning.

    Raises:
        ValueError: from a load inside, if variants cannot be restored; there is no model then.
    """
    if impl is not None:
        check_impl(impl)
    masks.register()
    _wrap()
    _thread.settings.append((impl, strict))
    try:
        yield
    finally:
        _thread.settings.pop()
        _unwrap()


def from_pretrained(
    auto_class: Any, folder: Any, *, impl: str | None = None, strict: bool = False, **kwargs: Any
) -> Any:
    """`auto_class.from_pretrained(folder, **kwargs)`, with the variants the model was saved with.

    Sharded checkpoints, `dtype`, `device_map`, quantisation and `distributed_config` work as they
    do in transformers, and so does loading a bare model from a saved head or the reverse. The
    model is patched as by `patch`: `unpatch` works, and `patches_of(model)` gives the handles.
    Learned values missing in the checkpoint get their recorded initial values, with a warning.
    Only safetensors files are read unless `use_safetensors=False` is passed.

    Args:
        auto_class: an `AutoModel...` or a model class of transformers.
        folder: the folder, or whatever else `auto_class.from_pretrained` takes.
        impl: engine in place of the recorded one.
        strict: raise if learned values are missing in the checkpoint.
        **kwargs: for `auto_class.from_pretrained`.

    Returns:
        What `auto_class.from_pretrained` does: the model, or with `output_loading_info=True` the
        model and a report of missing and unexpected keys.

    Raises:
        ValueError: the record is damaged, newer, or names unknown variants, options or modules;
            learned values are of another shape or not in the record; a file is corrupt. There is
            no half-loaded model.
    """
    if not callable(getattr(auto_class, "from_pretrained", None)):
        got = auto_class if isinstance(auto_class, str) else type(auto_class).__name__
        raise ValueError(
            "from_pretrained takes a class of transformers that has from_pretrained, such as "
            f"AutoModelForCausalLM, and then the folder, got {got!r}."
        )
    if isinstance(folder, (str, Path)) and (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a PEFT adapter; load its base model, then call "
            "attnvariants.hf.load_adapter(base, folder)."
        )
    kwargs.setdefault("use_safetensors", True)
    with torch.inference_mode(False), auto_load(impl=impl, strict=strict):
        return auto_class.from_pretrained(folder, **kwargs)


def _wrap() -> None:
    """Wrap the methods of PreTrainedModel, once for all threads."""
    from transformers import PreTrainedModel

    global _users
    with _lock:
        _users += 1
        if _users > 1:
            return
        _originals.update((name, PreTrainedModel.__dict__[name]) for name in _WRAPPED)
        load, post_init = (_originals[name] for name in _WRAPPED)
        load = load.__func__

        @functools.wraps(load)
        def wrapped_load(cls: type, *args: Any, **kwargs: Any) -> Any:
            return (
                _load(load, cls, args, kwargs) if _thread.settings else load(cls, *args, **kwargs)
            )

        @functools.wraps(post_init)
        def wrapped_post_init(self: Any) -> None:
            post_init(self)
            running = _thread.loads[-1] if _thread.loads else None
            if running is not None and running.means(self):
                running.attach(self)

        wrapped: tuple[Any, ...] = (classmethod(wrapped_load), wrapped_post_init)
        for name, function in zip(_WRAPPED, wrapped, strict=True):
            setattr(PreTrainedModel, name, function)


def _unwrap() -> None:
    from transformers import PreTrainedModel

    global _users
    with _lock:
        _users -= 1
        if not _users:
            for name in _WRAPPED:
                setattr(PreTrainedModel, name, _originals.pop(name))


def _load(load: Any, cls: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    from safetensors import SafetensorError

    source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if "attn_implementation" in kwargs:
        kwargs["attn_implementation"] = _without_keys(kwargs["attn_implementation"])
    elif _is_guarded(source, kwargs):
        kwargs["attn_implementation"] = None
    running = _Load(cls, source, kwargs, *_thread.settings[-1])
    with_info = kwargs.pop("output_loading_info", False)
    # transformers loads the base of an adapter, and takes the adapter's folder out of these
    adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path") or source
    _thread.loads.append(running)
    try:
        model, info = load(cls, *args, output_loading_info=True, **kwargs)
        running.finish(model, info)
        if isinstance(adapter, (str, Path)):
            check_told(model, Path(adapter))
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = running.explain()
        if reason is None:
            raise
        raise ValueError(f"{cls.__name__} cannot be loaded: {reason}") from error
    finally:
        _thread.loads.pop()
    return (model, info) if with_info else model


def _is_guarded(source: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the config to be loaded names an operator that no model can be built with.

    That is what `save_pretrained` puts there, or in a patched model's own config our keys.
    """
    from transformers import PretrainedConfig

    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        parts = (getattr(config, name, None) for name in config.sub_configs)
        named = (implementation_of(part) for part in (config, *parts))
        return any(name in (GUARD, *masks.KEYS) for name in named)
    where = config if config is not None else source
    if where is None:
        return False
    options = {name: kwargs[name] for name in _HUB if name in kwargs}
    found, _ = PretrainedConfig.get_config_dict(where, **options)
    return found.get("attn_implementation") == GUARD


def _without_keys(implementation: Any) -> Any:
    """An attention implementation, or those of parts of a model, with None for our own keys."""
    if isinstance(implementation, dict):
        return {name: _without_keys(value) for name, value in implementation.items()}
    return None if implementation in (GUARD, *masks.KEYS) else implementation
