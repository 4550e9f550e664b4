"""The model that a check runs: one given, one of a folder, or a random one of a config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnvariants.hf.architectures.tiny import model_class, randomise, tiny_config
from attnvariants.hf.names import implementation_of, set_implementation
from attnvariants.hf.outputs import sentence
from attnvariants.hf.patcher import unpatch
from attnvariants.hf.record import GUARD
from attnvariants.hf.state import state_of
from attnvariants.recorded import RECORD

# A model of a bare config is shrunk if it has more weights than this.
LARGE = 20_000_000


def model_of(model: Any) -> tuple[str, nn.Module]:
    """The model to test and what to call it.

    Raises:
        ValueError: there is none.
    """
    if isinstance(model, nn.Module):
        if state_of(model) is not None:
            raise ValueError(
                f"{type(model).__name__} is patched; check takes it as it was: unpatch it first."
            )
        if not hasattr(model, "config"):
            raise ValueError(f"check takes a model of transformers, got {type(model).__name__}.")
        return type(model).__name__, model
    if isinstance(model, (str, Path)):
        path = Path(model)
        if path.is_dir() and any(path.glob("*.safetensors")):
            return _loaded(path)
        pickled = sorted(path.glob("pytorch_model*.bin")) if path.is_dir() else []
        if pickled:
            raise ValueError(
                f"{pickled[0]} is pickled, and only safetensors files are read; convert it, or "
                "give the folder's config.json to test random weights."
            )
        config = _config_of(path)
    else:
        config = model
    if not hasattr(config, "model_type"):
        raise ValueError(
            f"check takes a model, a folder, a config.json or a config, got {type(model).__name__}."
        )
    return _random(config)


def _loaded(folder: Path) -> tuple[str, nn.Module]:
    from attnvariants.hf.loading import from_pretrained

    config = _config_of(folder)
    cls = _class_of(config)
    try:
        model = from_pretrained(cls, folder, local_files_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"the model in {folder} cannot be loaded: {sentence(error)}") from error
    name = f"{type(model).__name__} from {folder.name}"
    if state_of(model) is not None:
        unpatch(model)
        name += ", its saved variants taken out"
    return name, model


def _config_of(path: Path) -> Any:
    """The config of a folder or file; nothing but built-in classes is run.

    Raises:
        ValueError: there is none, or none that transformers knows.
    """
    from transformers import AutoConfig

    if not path.exists():
        raise ValueError(f"there is no {path}; give a model folder or a config.json on disk.")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no config.json, so it is no model folder.")
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a config: {sentence(error)}") from error


def _class_of(config: Any) -> type[nn.Module]:
    """The class the config was saved with, else the one with a language head, else the bare one."""
    import transformers
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    kinds = ["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT"]
    if getattr(config, "is_encoder_decoder", False):
        kinds = kinds[1:]
    for name in kinds:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    return model_class(config)


def _random(config: Any) -> tuple[str, nn.Module]:
    """A random model of a config, tiny if its weights are many."""
    # what a folder records of patches belongs to its weights
    config = copy.deepcopy(config)
    config.__dict__.pop(RECORD, None)
    if implementation_of(config) == GUARD:
        set_implementation(config, None)
    cls = _class_of(config)
    what = "random weights"
    try:
        with torch.device("meta"):
            weights = sum(p.numel() for p in cls(config).parameters())
    except Exception:
        weights = LARGE + 1
    if weights > LARGE:
        config = tiny_config(config)
        what = "random weights, shrunk to toy sizes"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = cls._from_config(config)  # type: ignore[attr-defined]
        except Exception as error:
            raise ValueError(
                f"{cls.__name__} cannot be built from this config: {sentence(error)}"
            ) from error
        randomise(model)
    return f"{cls.__name__} ({what})", model.eval()
