"""Whether a model with a cache, or with packed documents, computes what it does without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf import names
from attnvariants.hf.inputs import columns_of, is_sequence, parameters
from attnvariants.hf.measure import (
    Part,
    Runs,
    change,
    never,
    no_tokens,
)
from attnvariants.hf.names import CACHES, cache_argument, cache_of, memory_argument
from attnvariants.hf.outputs import per_token, run, sentence
from attnvariants.hf.padding import MASKS, MIDDLE, Batch
from attnvariants.hf.probe import Probe
from attnvariants.hf.reasons import InapplicableError, VanishedError

# Slots that a static cache has beyond the tokens.
SPARE = 5
# Model types whose memory of earlier tokens is a state of their own and no keys and values.
_STATES = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlnet", "reformer", "xlm", "transfo-xl")
_ENCODER = (
    "the model is an encoder: config.is_decoder is False, and future tokens change its outputs"
)


def cache_parts(root: nn.Module, probe: Probe, causal: bool | None) -> list[Part]:
    """Runs with caches against one without.

    A growing cache gets the tokens in two parts, so that queries are fewer than keys; a static
    one gets them at once, so that keys are more than queries are meant to see.

    Args:
        root: the model.
        probe: what it is run on.
        causal: whether no future token changes the unpatched model; None if it is not known.

    """
    try:
        name = cache_name(root, probe, causal)
    except (InapplicableError, VanishedError) as why:
        return [never("cache", why)]
    amid = probe.padded.get((MIDDLE, probe.changed or ""))
    assert probe.length is not None
    step = _growing(probe, probe.main, name, 1, bool(causal))
    if causal:
        step = _required(step, name)
    half = probe.length - probe.length // 2
    parts = [
        Part("cache", "the last token behind a cache", step),
        Part("cache", "tokens in two parts", _growing(probe, probe.main, name, half, bool(causal))),
    ]
    if isinstance(amid, Batch):
        what = "tokens in two parts with padding between them"
        parts.append(Part("cache", what, _growing(probe, amid, name, half, bool(causal))))
    parts.append(Part("cache", "static cache", _static(probe, probe.main, name)))
    return parts


def cache_name(root: nn.Module, probe: Probe, causal: bool | None) -> str:
    """The argument of the forward that takes the cache.

    Raises:
        InapplicableError: the model has none, and why.
        VanishedError: it ought to have one.
    """
    if probe.changed is None:
        raise InapplicableError(no_tokens(probe))
    config: Any = root.config
    accepts = parameters(root)
    both = bool(getattr(config, "is_encoder_decoder", False))
    if both and not probe.changed.startswith("decoder_"):
        raise InapplicableError(
            "config.is_encoder_decoder is True, and its inputs hold no tokens of the decoder"
        )
    generates = _generates(root)
    kind = getattr(config, "model_type", "")
    memory = memory_argument(accepts)
    name = cache_argument(accepts)
    if name is None and memory is not None and kind in _STATES:
        raise InapplicableError(f"it keeps earlier tokens in {memory}, which is no cache of keys")
    decodes = both or getattr(config, "is_decoder", False)
    if not generates and not decodes and causal is False:
        raise InapplicableError(_ENCODER)
    if name is not None:
        return name
    uses = "use_cache" in accepts or (generates and bool(getattr(config, "use_cache", False)))
    if not uses:
        raise InapplicableError(
            "its forward takes neither use_cache nor a cache"
            + (": it generates without one" if generates else ", and it does not generate")
        )
    known = " and ".join(CACHES)
    takes = ", ".join(argument for argument in accepts if argument != "self")
    raise VanishedError(
        f"verify: {type(root).__name__} has a cache (use_cache), but none of the arguments of its "
        f"forward is one that is known, which are {known}; it takes {takes}. Without it the "
        "caches of the patched model cannot be tested: use a version of transformers that "
        "docs/compatibility.md names, or name the argument as transformers does."
    )


def _generates(root: nn.Module) -> bool:
    able = getattr(root, "can_generate", None)
    return bool(able is not None and able())


def _growing(
    probe: Probe, batch: Batch, name: str, last: int, causal: bool
) -> Callable[[Runs], float]:
    """The tokens in two parts, the second of `last` tokens or fewer."""

    def measure(runs: Runs) -> float:
        first = runs.rows(batch, probe.length)
        cut = _cut_of(probe, first.shape[1] - last)
        return _change(first, _in_parts(runs.root, probe, batch, name, cut, causal), batch)

    return measure


def _required(measure: Callable[[Runs], float], name: str) -> Callable[[Runs], float]:
    """What any model with a cache runs when it generates."""

    def required(runs: Runs) -> float:
        try:
            return measure(runs)
        except (InapplicableError, VanishedError):
            raise
        except Exception as error:
            raise VanishedError(
                f"verify: {type(runs.root).__name__} runs these inputs without a cache, but the "
                f"last token with one, handed over as {name}=, raises {sentence(error)}; so the "
                "caches of the patched model cannot be tested. Check that the model generates."
            ) from error

    return required


def _cut_of(probe: Probe, cut: int) -> int:
    """Where to cut rows in two: at a place, or behind all that is more than text."""
    assert probe.free is not None
    assert probe.length is not None
    if probe.more:
        # images and the like belong to the first part
        busy = (~probe.free).any(0).nonzero()
        cut = max(cut, int(busy.max()) + 1 if busy.numel() else 0)
    if not 0 < cut < probe.length:
        raise InapplicableError(
            f"its last token of {probe.changed} stands for more than text ({probe.more}), so no "
            "part of text alone can follow"
        )
    return cut


def _in_parts(
    root: nn.Module, probe: Probe, batch: Batch, name: str, cut: int, causal: bool
) -> Tensor:
    assert probe.changed is not None
    assert probe.length is not None
    length = probe.length
    tokens = batch.inputs[probe.changed]
    size = tokens.shape[0], length
    decoder = probe.changed.startswith("decoder_")
    ours = {
        key
        for key, value in batch.inputs.items()
        if is_sequence(key, value, size) and (not decoder or key.startswith(("decoder_", "labels")))
    }
    masks = set(MASKS.values()) & ours
    first = {
        key: columns_of(value, size, slice(0, cut)) if key in ours else value
        for key, value in batch.inputs.items()
    }
    square = {
        key: value
        for key in MASKS.values()
        if isinstance(value := batch.inputs.get(key), Tensor)
        and value.shape[2:] == (length, length)
    }
    first |= {key: mask[:, :, :cut, :cut] for key, mask in square.items()}
    try:
        result = run(root, first, use_cache=True)
    except Exception as error:
        if _generates(root):
            raise
        raise InapplicableError(
            "it does not generate by itself, and raises when it is asked for a cache "
            f"(use_cache=True): {sentence(error)}"
        ) from error
    cache = cache_of(result)
    one = per_token(result, cut)
    if cache is None and not (causal or decoder or getattr(root.config, "is_decoder", False)):
        raise InapplicableError(f"{_ENCODER}; it returns no cache")
    if cache is None and not (decoder or _generates(root) or names.holds_cache(result)):
        raise InapplicableError(
            "it does not generate by itself, and returns no cache when it is asked for one "
            "(use_cache=True)"
        )
    if cache is None:
        fields = ", ".join(result) if hasattr(result, "keys") else type(result).__name__
        raise VanishedError(
            f"verify: {type(root).__name__} was asked for a cache (use_cache=True) and returned "
            f"none by a name that is known ({', '.join(CACHES)}), but {fields}; without it the "
            "caches of the patched model cannot be tested."
        )
    if one is None:
        raise InapplicableError("with a cache it returns no output for each token")
    second = {key: columns_of(batch.inputs[key], size, slice(cut, None)) for key in ours - masks}
    second |= {key: batch.inputs[key] for key in masks}
    second |= {key: mask[:, :, cut:] for key, mask in square.items()}
    if decoder:
        # the decoder takes what it needs of these from the cache
        second |= {key: value for key, value in batch.inputs.items() if key not in ours}
    # what is more than tokens was read with the first part
    other = per_token(run(root, second, use_cache=True, **{name: cache}), length - cut)
    if other is None:
        raise InapplicableError("with a filled cache it returns no output for each token")
    return torch.cat([one, other], dim=1)


def _static(probe: Probe, batch: Batch, name: str) -> Callable[[Runs], float]:
    def measure(runs: Runs) -> float:
        from transformers import StaticCache

        config: Any = runs.root.config
        first = runs.rows(batch, probe.length)
        length = first.shape[1]
        cache: Any = StaticCache(config=config, max_cache_len=length + SPARE)
        if getattr(config, "is_encoder_decoder", False):
            from transformers import EncoderDecoderCache

            read = runs.named(batch.inputs, probe.length).get("encoder_last_hidden_state")
            keys = length if read is None else read.shape[1]
            cache = EncoderDecoderCache(cache, StaticCache(config=config, max_cache_len=keys))
        output = per_token(run(runs.root, batch.inputs, use_cache=True, **{name: cache}), length)
        if output is None:
            raise InapplicableError("with a static cache it returns no output for each token")
        return _change(first, output, batch)

    return measure


def _change(first: Tensor, output: Tensor, batch: Batch) -> float:
    seen = batch.seen
    if seen is None:
        seen = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    return change(first, output, seen, seen)


def packed_part(root: nn.Module, probe: Probe) -> Part:
    """A document behind another one in a row against the same one alone.

    Documents are told apart by positions that start again.
    """
    why = _why_not_packed(root, probe)
    if why:
        return never("packed", why)

    def measure(runs: Runs) -> float:
        tokens = probe.plain.inputs["input_ids"]
        row, length = tokens[:1], tokens.shape[1]
        cut = length // 2
        places = torch.arange(length, device=row.device)[None]
        positions = torch.cat([places[:, :cut], places[:, : length - cut]], dim=1)
        packed = per_token(run(runs.root, {"input_ids": row, "position_ids": positions}), length)
        alone = {"input_ids": row[:, cut:], "position_ids": positions[:, cut:]}
        single = per_token(run(runs.root, alone), length - cut)
        if packed is None or single is None:
            raise InapplicableError("it returns no output for each token of a document")
        everywhere = torch.ones(single.shape[:2], dtype=torch.bool, device=single.device)
        return change(single, packed[:, cut:], everywhere, everywhere)

    return Part("packed", "a packed document against the same one alone", measure)


def _why_not_packed(root: nn.Module, probe: Probe) -> str:
    if probe.changed is None:
        return no_tokens(probe)
    if getattr(root.config, "is_encoder_decoder", False):
        return "config.is_encoder_decoder is True: an encoder's documents are not packed"
    if "position_ids" not in parameters(root):
        return "its forward takes no position_ids"
    if probe.changed != "input_ids":
        return f"its inputs are {probe.changed}, not input_ids"
    if probe.more:
        return f"its inputs hold {probe.more}, which belong to no document"
    return ""
