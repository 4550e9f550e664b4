"""A cache of fixed size for models patched with cosFormer: a state in place of keys and values.

    cache = RecurrentCache(model)
    model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

What `attnvariants.recurrent` needs of all earlier tokens is one matrix a head. transformers hands
new keys to the cache and what the cache returns to attention: the layers here return the new keys
alone, marked, and the attention function gives a marked call to its layer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from attnvariants import recurrent
from attnvariants.hf.dispatch import RECURRENT
from attnvariants.hf.holder import CHILD, Spec
from attnvariants.hf.lazy import LazyMask
from attnvariants.hf.names import caches_know_query_lengths
from attnvariants.registry import get_variant

_ORDINARY = "generate without this cache to use an ordinary one"


class RecurrentCache(DynamicCache):
    """A cache whose size does not depend on the length, for variants that decode with a state.

    Layers patched with such a variant (cosformer) keep its state, all others what a
    `DynamicCache` keeps. Gives what a `DynamicCache` gives, padding, beams, prompts in parts and
    several new tokens at once included. It cannot go back: assisted decoding and `crop` raise, and
    so do `output_attentions` and attention diagnostics, which need the keys, and `torch.compile`.

    Args:
        model: the patched model, a causal decoder.

    Raises:
        ValueError: no layer has such a variant, or one that has cannot be decoded with a state (a
            window, no causality, shared keys, no max_len), or transformers is too old.
    """

    def __init__(self, model: nn.Module):
        if not caches_know_query_lengths():
            raise ValueError(
                "RecurrentCache needs transformers >= 5.5, whose caches tell mask sizes by the "
                f"number of queries; this is {transformers_version}. Upgrade it."
            )
        config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        if config.is_encoder_decoder or getattr(config, "num_kv_shared_layers", 0):
            what = "has an encoder" if config.is_encoder_decoder else "shares keys between layers"
            raise ValueError(
                f"RecurrentCache is for causal decoders that keep their own keys, and "
                f"{type(model).__name__} {what}; {_ORDINARY}."
            )
        super().__init__(config=config)
        padding = _Padding()
        taken: dict[int, str] = {}
        for name, module in model.named_modules():
            spec = module.attn_variant(None) if hasattr(module, CHILD) else None
            if spec is None or get_variant(spec.variant).linear_eps is None:
                continue
            index = _index(name, module, len(self.layers), taken)
            taken[index] = name
            self.layers[index] = _layer(name, module, spec, self.layers[index], padding)
        if not taken:
            raise ValueError(
                f"no layer of {type(model).__name__} has a variant that decodes with a state, as "
                f"cosformer does; patch(model, 'cosformer') first, or {_ORDINARY}."
            )
        self.padding = padding

    def reset(self) -> None:
        """Forget everything, as before the first token."""
        super().reset()
        self.padding.visible = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams of a beam search."""
        super().reorder_cache(beam_idx)
        self.padding.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        if self.padding.visible is not None:
            self.padding.visible = self.padding.visible.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self.padding.select(indices)


class RecurrentLayer(CacheLayerMixin):
    """The state of one attention layer.

    Attributes:
        state: what all tokens so far left behind; None before the first.
        variant: the variant's name, whose options, `max_len` among them, come with the calls.
        max_len: how many tokens there may be.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, name: str, variant: str, max_len: int, padding: _Padding):
        super().__init__()
        self.name = name
        self.variant = variant
        self.max_len = max_len
        self.padding = padding
        self.state: recurrent.State | None = None
        self._unread = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; a state is made by the first call."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, marked for the attention function.

        Raises:
            RuntimeError: the last marked keys never came to it, or the call is being compiled.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "RecurrentCache does not run under torch.compile; run the model without it, or "
                "compile it with a static cache."
            )
        if self._unread:
            raise RuntimeError(
                f"the keys of {self.name} did not come from the cache to the attention of "
                f"{self.variant} as they were: the model was unpatched or patched anew since the "
                f"RecurrentCache was made, or changes them in between; {_ORDINARY}."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # a view of its own: the mark must not outlive the call
        key_states = key_states.view_as(key_states)
        setattr(key_states, RECURRENT, self)
        self._unread = True
        return key_states, value_states

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        spec: Spec,
        scale: float | None,
        refused: dict[str, Any],
    ) -> Tensor:
        """Causal attention of the new tokens to themselves and all earlier ones.

        Args:
            query: `[batch, heads, tokens, head_dim]`, of the new tokens; key and value likewise.
            mask: as the attention function got it.
            spec: the module's variant and options.
            scale: as `attention` takes it.
            refused: by name, what else was asked for; none of it can be had.

        Returns:
            `[batch, heads, tokens, value_dim]`.

        Raises:
            ValueError: something of `refused`, another variant than at the start, a mask that is
                more than causality and padding, or more tokens than max_len.
        """
        self._unread = False
        given = [name for name, value in refused.items() if value]
        if given or spec.variant != self.variant:
            what = f"no {' and no '.join(given)}" if given else f"the state of {self.variant} alone"
            raise ValueError(f"RecurrentCache has {what} in {self.name}; {_ORDINARY}.")
        past = self.get_seq_length()
        shown = self.padding.of_new(mask, past, query.shape[2], self.name)
        options = {k: v for k, v in spec.options.items() if k != "max_len"}
        if self.state is None:
            call = {"max_len": self.max_len, "scale": scale, "impl": spec.impl, **options}
            out, state = recurrent.prefill(query, key, value, self.variant, key_mask=shown, **call)
        else:
            out, state = recurrent.step(query, key, value, self.state, key_mask=shown)
        self.state = state
        return out

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return 0 if self.state is None else self.state.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of all keys, and the first one's place: as if they were kept."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Number of tokens that there may be."""
        return self.max_len

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget the state."""
        self.state, self._unread = None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams of a beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        if self.state is not None:
            indices = indices.to(self.state.memory.device)
            self._replace(self.state.memory[indices], self.state.total[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.state is not None:
            memory, total = self.state.memory, self.state.total
            self._replace(memory.repeat_interleave(repeats, 0), total.repeat_interleave(repeats, 0))

    def _replace(self, memory: Tensor, total: Tensor) -> None:
        assert self.state is not None
        self.state = self.state._replace(memory=memory, total=total)

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing for 0.

        Raises:
            ValueError: tokens are to be taken back.
        """
        if tokens_to_remove:
            self.activate_past_recording()

    def activate_past_recording(self) -> None:
        """Not possible: assisted decoding asks for it, to take back tokens later.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a RecurrentCache cannot take back tokens, as crop and assisted decoding do: a state "
            "is a sum over all of them; drop the assistant or prompt_lookup_num_tokens, or "
            f"{_ORDINARY}."
        )

    def offload(self) -> None:
        """Nothing: the state stays where it is."""

    prefetch = offload


class _Padding:
    """What the masks of all layers say, read once a forward.

    Attributes:
        visible: `[batch]`, the number of tokens so far that are no padding; None where all are.
    """

    def __init__(self) -> None:
        self.visible: Tensor | None = None
        self._last: tuple[Any, int, Tensor | None] = (lambda: None, -1, None)

    def of_new(self, mask: Any, past: int, tokens: int, name: str) -> Tensor | None:
        """Which of the new tokens are visible, bool `[batch, tokens]`; None where all are."""
        known, start, shown = self._last
        if mask is not None and known() is mask and start == past:
            return shown
        keep = None if mask is None else _padding_of(mask, past, tokens, name)
        earlier = self.visible if past else None
        if keep is None:
            consistent, shown = earlier is None, None
        else:
            before = keep[:, :past].sum(1)
            consistent = bool((before == (past if earlier is None else earlier)).all())
            shown = keep[:, past:]
        if not consistent:
            raise ValueError(
                f"the attention mask of {name} hides other earlier tokens than it did before, "
                "which a state cannot undo; give every call the mask of all tokens so far, or "
                f"{_ORDINARY}."
            )
        self.visible = None if keep is None else keep.sum(1)
        self._last = (weakref.ref(mask) if mask is not None else (lambda: None), past, shown)
        return shown

    def select(self, indices: Tensor) -> None:
        """Follow the batch."""
        if self.visible is not None:
            self.visible = self.visible[indices.to(self.visible.device)]


def _padding_of(mask: Any, past: int, tokens: int, name: str) -> Tensor | None:
    """Which tokens are visible, bool `[batch, past + tokens]`, from a causal mask; None for all.

    Raises:
        ValueError: the mask is more than causality and padding.
    """
    total = past + tokens
    if isinstance(mask, LazyMask):
        view = mask.view(tokens, total)
        plain = view is not None and view.window is None and view.documents is None
        if view is not None and plain and (view.causal or tokens == 1) and view.keys == total:
            return None if view.keep is None else view.keep[:, 0, 0]
        mask = mask.tensor()
    shape = mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2:] == (tokens, total)
    if mask.is_floating_point():
        # added to the scores: 0 leaves them, the minimum hides them
        adds = (mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)
        shape, mask = shape and not bool(adds.any()), mask == 0
    if shape:
        mask = mask != 0
        keep = mask[:, 0, -1]
        causal = torch.ones(tokens, total, dtype=torch.bool, device=mask.device).tril(past)
        if torch.equal(mask[:, 0], keep[:, None] & causal):
            return keep
    raise ValueError(
        f"the attention mask of {name} is more than causality and padding, which is all that a "
        f"RecurrentCache can honour; {_ORDINARY}."
    )


def _index(name: str, module: nn.Module, count: int, taken: dict[int, str]) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or not 0 <= index < count or index in taken:
        other = f", as {taken[index]} has" if index in taken else ""
        raise ValueError(
            f"{name} says it is layer {index}{other}, which is no layer of the text decoder's "
            f"cache of its own; {_ORDINARY}."
        )
    return index


def _layer(
    name: str, module: nn.Module, spec: Spec, ordinary: Any, padding: _Padding
) -> RecurrentLayer:
    max_len = spec.options.get("max_len")
    why = []
    if not getattr(module, "is_causal", False):
        why.append("its attention is not causal")
    if getattr(ordinary, "is_sliding", False):
        why.append("it sees a window of the keys")
    elif type(ordinary) is not DynamicLayer:
        why.append(f"its cache, {type(ordinary).__name__}, holds more than keys and values")
    if max_len is None:
        why.append("max_len, the most tokens there will be, is not set; pass it to patch")
    if max_len is None or why:
        raise ValueError(
            f"{name} cannot be decoded with a state: {'; '.join(why)}. {_ORDINARY.capitalize()}, "
            "or patch other layers."
        )
    return RecurrentLayer(name, spec.variant, int(max_len), padding)
