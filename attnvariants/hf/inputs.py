"""Small random inputs for any transformers model, from its config and the names it takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Frames, samples and grids are tried in this order; the first that a model runs is its own.
_FRAMES = (64, 32, 128, 100, 3000)
_SAMPLES = (4000, 1600, 24000)
# Arguments whose second dimension never is one of tokens.
_MEDIA = ("pixel_", "image_", "video_", "input_features", "input_values", "audio_", "past_")


@dataclass(frozen=True)
class Sample:
    """Arguments of a model's forward.

    Attributes:
        inputs: the arguments.
        what: in words, for reports.
        tokens: names of the arguments that hold tokens, the decoder's last.
        allowed: tokens without a special meaning.
    """

    inputs: dict[str, Tensor]
    what: str
    tokens: tuple[str, ...] = ()
    allowed: Tensor = field(default_factory=lambda: torch.tensor([0, 1]))


def parameters(root: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Arguments of the model's forward, and of those it overrides and may hand the rest on to."""
    found: dict[str, inspect.Parameter] = {}
    for cls in type(root).__mro__:
        if cls is nn.Module:
            break
        if "forward" not in vars(cls):
            continue
        own = inspect.signature(vars(cls)["forward"]).parameters
        found = {**own, **found}
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return found or inspect.signature(type(root).forward).parameters


def samples(root: nn.Module, seed: int = 0, length: int | None = None) -> Iterator[Sample]:
    """Inputs that may suit a model, the likeliest first; the caller takes the first that runs."""
    maker = _Maker(root, seed, length)
    main = getattr(root, "main_input_name", "input_ids")
    main = main[0] if isinstance(main, (tuple, list)) else str(main)
    accepts = parameters(root)
    required = {
        name
        for name, p in accepts.items()
        if p.default is p.empty and p.kind != p.VAR_KEYWORD and p.kind != p.VAR_POSITIONAL
    } - {"self"}
    if "input_ids" in accepts and maker.vocab and not required & {"pixel_values"}:
        yield from maker.with_tokens(accepts)
    if main == "past_values" or "past_values" in required:
        yield from maker.series()
    for name in ("input_features", "input_values", "audio_values"):
        if name in accepts:
            yield from maker.sound(name, accepts)
    for name in ("pixel_values", "pixel_values_videos", "hidden_states", "flattened_patches"):
        if name in accepts:
            yield from maker.images(name, accepts)
    if "inputs_embeds" in accepts:
        yield from maker.embeddings(accepts)


class _Maker:
    """The random numbers and sizes that the samples of one model share."""

    def __init__(self, root: nn.Module, seed: int, length: int | None):
        self.root = root
        self.config: Any = getattr(root, "config", None)
        self.text = text_config(self.config)
        self.device = device_of(root)
        self.dtype = next(
            (p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32
        )
        self.seed = seed
        self.length = length or token_length(self.text)
        vocab = getattr(self.text, "vocab_size", None) or getattr(self.config, "vocab_size", None)
        self.vocab = vocab if isinstance(vocab, int) else 0
        special = special_tokens(self.config) | special_tokens(self.text)
        allowed = [token for token in range(min(self.vocab, 4096)) if token not in special]
        self.allowed = torch.tensor(allowed if len(allowed) > 1 else [0, 1])

    def floats(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def ids(self, *shape: int, shift: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + shift)
        picks = torch.randint(len(self.allowed), shape, generator=generator)
        return self.allowed[picks].to(self.device)

    def with_tokens(self, accepts: Mapping[str, Any]) -> Iterator[Sample]:
        ids = self.ids(2, self.length)
        end = getattr(self.text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < self.vocab:
            # some models pool the row of the first end token, which padding must not hide
            ids[:, self.length - 1 - self.length // 3] = end
        inputs = {"input_ids": ids}
        tokens: tuple[str, ...] = ("input_ids",)
        if getattr(self.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepts:
            inputs["decoder_input_ids"] = self.ids(2, self.length, shift=1)
            tokens = ("input_ids", "decoder_input_ids")
        yield Sample(inputs, "tokens", tokens, self.allowed)
        for name in ("pixel_values", "input_features", "input_values"):
            if name in accepts:
                more = (
                    self.images(name, accepts) if name == "pixel_values" else self.sound(name, {})
                )
                for sample in more:
                    yield Sample(
                        {**inputs, **sample.inputs},
                        f"tokens and {sample.what}",
                        tokens,
                        self.allowed,
                    )

    def images(self, name: str, accepts: Mapping[str, Any]) -> Iterator[Sample]:
        vision = getattr(self.config, "vision_config", None) or self.config
        size = _first(vision, self.config, names=("image_size", "img_size", "input_size")) or 32
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        channels = (
            _first(vision, self.config, names=("num_channels", "in_channels", "in_chans")) or 3
        )
        patch = _first(vision, names=("patch_size",)) or 8
        patch = patch if isinstance(patch, int) else patch[-1]
        depth = _first(vision, names=("temporal_patch_size", "patch_temporal")) or 1
        frames = _first(vision, names=("num_frames", "frames_per_clip")) or 2
        image = Sample({name: self.floats(2, channels, height, width)}, "images")
        video = Sample({name: self.floats(2, frames, channels, height, width)}, "videos")
        grid_name = next(
            (n for n in ("grid_thw", "image_grid_thw", "grid_hws", "grid_hw") if n in accepts), None
        )
        if grid_name:
            grid = torch.tensor([[1, 4, 4], [1, 4, 8]], device=self.device)
            if grid_name in ("grid_hws", "grid_hw"):
                grid = grid[:, 1:]
            width_ = channels * depth * patch * patch
            yield Sample({name: self.floats(48, width_), grid_name: grid}, "patches")
            yield Sample(
                {name: self.floats(48, channels, patch, patch), grid_name: grid}, "patches"
            )
        if name == "hidden_states":
            return
        yield from (video, image) if name == "pixel_values_videos" else (image, video)

    def sound(self, name: str, accepts: Mapping[str, Any]) -> Iterator[Sample]:
        audio = getattr(self.config, "audio_config", None) or self.config
        extra: dict[str, Tensor] = {}
        tokens: tuple[str, ...] = ()
        if "decoder_input_ids" in accepts and getattr(self.config, "is_encoder_decoder", False):
            extra = {"decoder_input_ids": self.ids(2, self.length)}
            tokens = ("decoder_input_ids",)
        if name != "input_features":
            for count in _SAMPLES:
                yield Sample({name: self.floats(2, count), **extra}, "sound", tokens, self.allowed)
                yield Sample(
                    {name: self.floats(2, 1, count), **extra}, "sound", tokens, self.allowed
                )
            return
        bins = (
            _first(
                audio,
                self.config,
                names=(
                    "num_mel_bins",
                    "feature_size",
                    "input_feat_per_channel",
                    "feature_projection_input_dim",
                    "input_dim",
                    "input_feat_size",
                ),
            )
            or 16
        )
        longest = getattr(audio, "max_source_positions", None)
        counts = [2 * longest] if isinstance(longest, int) else []
        for count in (*counts, *_FRAMES):
            for shape in ((2, bins, count), (2, count, bins)):
                yield Sample({name: self.floats(*shape), **extra}, "spectra", tokens, self.allowed)

    def series(self) -> Iterator[Sample]:
        length = getattr(self.config, "context_length", 32)
        channels = getattr(self.config, "num_input_channels", 1)
        yield Sample({"past_values": self.floats(2, length, channels)}, "series")

    def embeddings(self, accepts: Mapping[str, Any]) -> Iterator[Sample]:
        width = getattr(self.text, "hidden_size", None) or getattr(self.config, "hidden_size", None)
        if isinstance(width, int):
            yield Sample({"inputs_embeds": self.floats(2, self.length, width)}, "embeddings")


def _first(*configs: Any, names: tuple[str, ...]) -> Any:
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
    return None


def is_sequence(name: str, value: Any, size: tuple[int, int]) -> bool:
    """Whether an argument has an entry for each token of `size`, `[batch, tokens]`.

    Positions may have a dimension before these, one entry for time, height and width.
    """
    if not isinstance(value, Tensor) or name.startswith(_MEDIA):
        return False
    return tuple(value.shape[:2]) == size or (
        name == "position_ids" and tuple(value.shape[1:]) == size
    )


def columns_of(value: Tensor, size: tuple[int, int], columns: slice) -> Tensor:
    """Some tokens' entries of an argument that `is_sequence`."""
    cut = value[:, columns] if tuple(value.shape[:2]) == size else value[..., columns]
    # as `generate` hands them over; some models take a view of their tokens
    return cut.contiguous()


def device_of(root: nn.Module) -> torch.device:
    """Where the model takes its inputs; offloaded parameters are nowhere."""
    for parameter in root.parameters():
        if not parameter.is_meta:
            return parameter.device
    for module in root.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu")


def token_length(config: Any) -> int:
    """A number of tokens that reaches beyond the model's window, a multiple of three."""
    length = 18
    window = _quietly(config, "sliding_window")
    if isinstance(window, int) and 0 < window <= 256:
        length = max(length, 2 * window)
    for name in ("max_position_embeddings", "max_target_positions"):
        most = _quietly(config, name)
        if isinstance(most, int) and most > 0:
            length = min(length, most)
    return max(length - length % 3, 3)


def _quietly(config: Any, name: str) -> Any:
    """A field; None where the layers of a config differ in it."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def special_tokens(config: Any) -> set[int]:
    """Token ids that a config names."""
    special: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids", "bos_id", "eos_id")):
            values = value if isinstance(value, (list, tuple)) else [value]
            special.update(token for token in values if isinstance(token, int))
    return special


def text_config(config: Any) -> Any:
    """The config of a model's text part; the config itself if there is none or several."""
    try:
        return config.get_text_config()
    except (ValueError, AttributeError):
        return config
