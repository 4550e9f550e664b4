"""Inputs that the self-test of a patch runs a model on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Probe:
    """Inputs of the model's forward, the tokens that the leak test changes, and the padding.

    `pad` is the number of padding tokens left of row 1; `changed` names the argument whose tokens
    are changed; `allowed` are tokens without a special meaning.
    """

    inputs: dict[str, Tensor]
    changed: str | None = None
    allowed: Tensor | None = None
    pad: int = 0
    short: dict[str, Tensor] | None = None


def made_probe(root: nn.Module, seed: int) -> Probe:
    """Small random inputs of the model's own kind.

    Raises:
        ValueError: the model takes neither tokens nor square images.
    """
    config = root.config
    main = str(getattr(root, "main_input_name", "input_ids"))
    generator = torch.Generator().manual_seed(seed)
    device = _device(root)
    if main == "pixel_values":
        size = getattr(config, "image_size", None)
        if isinstance(size, int) or (isinstance(size, (tuple, list)) and len(size) == 2):
            height, width = (size, size) if isinstance(size, int) else size
            channels = getattr(config, "num_channels", 3)
            pixels = torch.randn(2, channels, height, width, generator=generator)
            dtype = next(root.parameters()).dtype
            return Probe({"pixel_values": pixels.to(device, dtype)})
    text = _text_config(config)
    vocab = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)
    if main != "input_ids" or not isinstance(vocab, int):
        raise ValueError(
            f"verify cannot make inputs for {type(root).__name__}, whose input is {main}; pass "
            "inputs= with the arguments of its forward."
        )
    special = _special_tokens(config) | _special_tokens(text)
    allowed = [token for token in range(min(vocab, 4096)) if token not in special]
    if len(allowed) < 2:
        allowed = [0, 1]
    choices = torch.tensor(allowed)
    length = _length(text)
    tokens = choices[torch.randint(len(allowed), (2, length), generator=generator)]
    inputs = {"input_ids": tokens.to(device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens.flip(0).to(device)
    return _padded(root, inputs, choices.to(device))


def given_probe(root: nn.Module, inputs: Mapping[str, Tensor]) -> Probe:
    """The caller's inputs; padded as well if they are nothing but tokens.

    Raises:
        ValueError: there are fewer than two tokens to change.
    """
    given = dict(inputs)
    changed = next((key for key in ("decoder_input_ids", "input_ids") if key in given), None)
    if changed is None:
        return Probe(given)
    if given[changed].dim() != 2 or given[changed].shape[1] < 2:
        raise ValueError(
            f"verify needs {changed} of shape [batch, tokens] with at least 2 tokens, got "
            f"{list(given[changed].shape)}."
        )
    tokens_only = set(given) <= {"input_ids", "decoder_input_ids"}
    if tokens_only and all(value.shape[1] >= 4 for value in given.values()):
        return _padded(root, {key: value[:1].expand(2, -1) for key, value in given.items()}, None)
    return Probe(given, changed)


def _padded(root: nn.Module, inputs: dict[str, Tensor], allowed: Tensor | None) -> Probe:
    """A batch whose row 1 is left-padded by a third, and that row alone without padding."""
    changed = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    accepts = parameters(root)
    tokens = inputs["input_ids"].clone()
    if "attention_mask" not in accepts:
        return Probe(inputs, changed, allowed)
    length = tokens.shape[1]
    pad = length // 3
    fill = getattr(_text_config(root.config), "pad_token_id", None)
    tokens[1, :pad] = fill if isinstance(fill, int) and fill >= 0 else 0
    mask = torch.ones_like(tokens)
    mask[1, :pad] = 0
    batch = {**inputs, "input_ids": tokens, "attention_mask": mask}
    short = {key: value[1:2] for key, value in batch.items()}
    for key in ("input_ids", "attention_mask"):
        short[key] = short[key][:, pad:]
    if "position_ids" in accepts:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        short["position_ids"] = batch["position_ids"][1:2, pad:]
    return Probe(batch, changed, allowed, pad, short)


def _device(root: nn.Module) -> torch.device:
    """Where the model takes its inputs; offloaded parameters are nowhere."""
    for parameter in root.parameters():
        if not parameter.is_meta:
            return parameter.device
    for module in root.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu")


def _length(config: Any) -> int:
    window = getattr(config, "sliding_window", None)
    length = 18
    if isinstance(window, int) and 0 < window <= 256:
        length = max(length, 2 * window)
    for name in ("max_position_embeddings", "max_target_positions"):
        most = getattr(config, name, None)
        if isinstance(most, int) and most > 0:
            length = min(length, most)
    return max(length - length % 3, 3)


def _special_tokens(config: Any) -> set[int]:
    special: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")):
            values = value if isinstance(value, (list, tuple)) else [value]
            special.update(token for token in values if isinstance(token, int))
    return special


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:
        return config


def parameters(root: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Arguments of the model's forward."""
    return inspect.signature(type(root).forward).parameters
