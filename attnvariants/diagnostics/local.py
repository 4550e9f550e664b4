"""A model folder and a text on disk, for the command line: nothing is downloaded or unpickled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Enough characters for a window of the longest tokens; tokenising more would take time for nothing.
_CHARACTERS_A_TOKEN = 32


def load_model(folder: Path) -> tuple[nn.Module, list[str]]:
    """The model of a folder, and the names of weights that its files lack.

    A folder saved from a language model gives one; any other gives the bare model. Variants that
    the model was saved with are put back in.

    Raises:
        ValueError: the folder, its config or its weights are missing or cannot be read.
    """
    check_folder(folder)
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from attnvariants.hf import from_pretrained

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = _load(lambda: AutoConfig.from_pretrained(folder, **local), folder, "config")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{folder} holds an encoder-decoder model, which needs inputs for both; call "
            "attnvariants.diagnostics.diagnose with them."
        )
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) or ()
    language = (named,) if isinstance(named, str) else named
    saved = getattr(config, "architectures", None) or ()
    auto = AutoModelForCausalLM if any(name in language for name in saved) else AutoModel
    model, info = _load(
        lambda: from_pretrained(auto, folder, config=config, output_loading_info=True, **local),
        folder,
        "model",
    )
    return model, sorted(info["missing_keys"])


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(
            f"{folder} holds no tokenizer (tokenizer.json); save one with "
            "tokenizer.save_pretrained."
        )
    from transformers import AutoTokenizer

    return _load(
        lambda: AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ),
        folder,
        "tokenizer",
    )


def check_folder(folder: Path) -> None:
    """Raise ValueError unless the folder looks like a saved model."""
    if not folder.exists():
        raise ValueError(f"there is no folder {folder}; give a model folder on disk.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that holds the model.")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json, so it is no model folder; save one with "
            "model.save_pretrained."
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no weights in safetensors files, and pickled ones are not loaded; "
            "save the model with model.save_pretrained."
        )


def _load(load: Callable[[], Any], folder: Path, what: str) -> Any:
    try:
        return load()
    # what others' readers make of a damaged file is theirs to choose: configs have their own
    # errors, tokenizers raise Exception itself
    except Exception as error:
        lines = str(error).strip().split("\n") or [type(error).__name__]
        first = " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])
        reason = first or type(error).__name__
        raise ValueError(f"the {what} in {folder} cannot be loaded: {reason}") from error


def default_text() -> str:
    """English prose that every Python has: the help topics of the language."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is no file, or no UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"there is no text file {path}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text; convert it.") from None


def text_windows(tokenizer: Any, text: str, window: int, count: int) -> Tensor:
    """Consecutive windows of a text as token ids, with the tokenizer's special tokens in each.

    Returns:
        `[at most count, window]`, int64; text behind the last one is not read.

    Raises:
        ValueError: the text is shorter than a window, or the tokenizer's special tokens fill it.
    """
    special = tokenizer.num_special_tokens_to_add()
    if window <= special:
        raise ValueError(
            f"a window of {window} tokens has no room for text beside the tokenizer's {special} "
            f"special tokens; take at least {special + 1}."
        )
    text = text[: window * count * _CHARACTERS_A_TOKEN]
    if tokenizer.is_fast:
        rows = tokenizer(text, truncation=True, max_length=window, return_overflowing_tokens=True)[
            "input_ids"
        ]
    else:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        body = window - special
        bodies = [ids[start : start + body] for start in range(0, len(ids), body)]
        rows = [tokenizer.build_inputs_with_special_tokens(body) for body in bodies]
    full = [row for row in rows if len(row) == window]
    if not full:
        raise ValueError(
            f"the text has {len(rows[0]) if rows else 0} tokens, fewer than the window of "
            f"{window}; give a longer text or a smaller --window."
        )
    return torch.tensor(full[:count], dtype=torch.int64)


def check_fits(model: Any, ids: Tensor) -> None:
    """Raise ValueError unless the model has embeddings for these tokens and positions."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < ids.shape[1]:
        raise ValueError(
            f"the model has {longest} positions, fewer than the window of {ids.shape[1]}; give a "
            f"--window of at most {longest}."
        )
    known, largest = model.get_input_embeddings().weight.shape[0], int(ids.max())
    if largest >= known:
        raise ValueError(
            f"the tokenizer gives token {largest} and the model knows {known}; the tokenizer in "
            "the folder is another model's."
        )
