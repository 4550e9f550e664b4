"""Run a model and measure its attention layer by layer, as the calls are made."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnvariants.api import iter_weights
from attnvariants.checks import dense
from attnvariants.diagnostics.activations import ActivationSums, Moments
from attnvariants.diagnostics.metrics import AttentionSums, check_threshold
from attnvariants.diagnostics.report import LayerReport, Report
from attnvariants.scalars import check_integer, in_words

_HIDDEN = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


def diagnose(
    model: nn.Module,
    batch: Tensor | Mapping[str, Any],
    *,
    attention_mask: Tensor | None = None,
    sink_threshold: float = 0.3,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Figures of a model's attention and hidden states on some sequences.

    Patched layers are measured with their variant, all others as the softmax that they are; for
    that they are patched while this runs. Mode, operators and config of the model are the same
    afterwards. Nothing of size tokens x tokens is kept, and no query or key.

    Args:
        model: a model that `attnvariants.patch` can patch, patched or not.
        batch: `[batch, tokens]` token ids, or a mapping of the model's arguments.
        attention_mask: `[batch, tokens]`, 1 or True for tokens; padding is left out of all
            figures.
        sink_threshold: weight on token 0 beyond which a sequence has a sink.
        batch_size: sequences a forward pass; default all at once.
        progress: called as `progress(sequences done, sequences)` after each pass.

    Raises:
        ValueError: the model cannot be patched, no attention was called, or an argument is out of
            the contract, or a weight or hidden state is not finite.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"diagnose takes a torch model, got {type(model).__name__}.")
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function (done, of), got {in_words(progress)}.")
    model = getattr(model, "_orig_mod", model)
    inputs, mask = _inputs(model, batch, attention_mask)
    count = next(iter(inputs.values())).shape[0]
    step = _batch_size(batch_size, count)
    recorder = _Recorder(model, check_threshold(sink_threshold))
    hidden: dict[str, ActivationSums] = {}
    losses = _Losses()
    with ExitStack() as stack:
        bare = getattr(model, "get_base_model", lambda: model)()
        skipped = stack.enter_context(_measurable(bare))
        stack.enter_context(_evaluating(model))
        stack.enter_context(recorder)
        stack.enter_context(torch.no_grad())
        for start in range(0, count, step):
            part = {n: _part(value, start, start + step, count) for n, value in inputs.items()}
            part_mask = None if mask is None else mask[start : start + step]
            recorder.begin(part_mask)
            outputs = model(**part, **_extras(model))
            for name, states in _hidden_states(outputs):
                # states of another shape (vision towers, pooled ones) have no tokens to count
                if states.dim() == 3 and states.is_floating_point():
                    fits = part_mask is not None and states.shape[:2] == part_mask.shape
                    hidden.setdefault(name, ActivationSums()).add(
                        states, part_mask if fits else None
                    )
            losses.add(model, part, part_mask, outputs)
            if progress is not None:
                progress(min(start + step, count), count)
    if not recorder.layers:
        unmeasured = next(iter(skipped.items()), None)
        hint = "" if unmeasured is None else f" ({unmeasured[0]}: {unmeasured[1]})"
        raise ValueError(
            f"{type(model).__name__} called none of the attention modules that can be measured on "
            f"this batch{hint}; pass the inputs that reach its text part."
        )
    moments = Moments()
    for sums in hidden.values():
        moments = moments.merge(sums.moments)
    first = next(iter(inputs.values()))
    return Report(
        model=type(model).__name__,
        layers=tuple(
            LayerReport(name, recorder.variants[name], sums.metrics())
            for name, sums in recorder.layers.items()
        ),
        hidden={name: sums.metrics() for name, sums in hidden.items()},
        kurtosis_pooled=moments.kurtosis if hidden else None,
        loss=losses.mean,
        sequences=count,
        tokens=first.shape[:2].numel() if mask is None else int(mask.sum()),
        sink_threshold=float(sink_threshold),
        skipped=skipped,
    )


class _Recorder:
    """Observer of the attention calls of one model; a context manager."""

    def __init__(self, model: nn.Module, sink_threshold: float):
        self.layers: dict[str, AttentionSums] = {}
        self.variants: dict[str, str] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._threshold = sink_threshold
        self._calls: Counter[str] = Counter()
        self._mask: Tensor | None = None

    def begin(self, mask: Tensor | None) -> None:
        """A forward pass follows."""
        self._calls.clear()
        self._mask = mask

    def __enter__(self) -> _Recorder:
        from attnvariants.hf import dispatch

        dispatch.observers.append(self._observe)
        return self

    def __exit__(self, *exception: object) -> None:
        from attnvariants.hf import dispatch

        dispatch.observers.remove(self._observe)

    def _observe(
        self, module: nn.Module, query: Tensor, key: Tensor, out: Tensor, call: dict[str, Any]
    ) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        self._calls[name] += 1
        if self._calls[name] > 1:
            name = f"{name} #{self._calls[name]}"
        if call.get("sinks") is not None:
            raise ValueError(
                f"{name} cannot be measured: its learned attention sinks take weight that belongs "
                "to no key; leave its model out."
            )
        mask = self._mask
        if mask is not None and mask.shape != (query.shape[0], query.shape[2]):
            mask = None
        sums = self.layers.setdefault(name, AttentionSums(self._threshold))
        try:
            sums.add(iter_weights(query, key, **call), query.shape[:3], query_mask=mask, out=out)
        except ValueError as error:
            raise ValueError(f"{name} cannot be measured: {error}") from error
        self.variants[name] = str(call["variant"])


class _Losses:
    """Next-token cross-entropy of models that generate text."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(
        self, model: nn.Module, inputs: dict[str, Any], mask: Tensor | None, outputs: Any
    ) -> None:
        ids, logits = inputs.get("input_ids"), getattr(outputs, "logits", None)
        generates = getattr(model, "can_generate", None)
        encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if ids is None or logits is None or encoder or generates is None or not generates():
            return
        if logits.shape[:2] != ids.shape:
            return
        targets = ids[:, 1:].to(logits.device)
        loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
        counted = torch.ones_like(targets, dtype=torch.bool)
        if mask is not None:
            counted = (mask[:, 1:] & mask[:, :-1]).to(logits.device)
        self._total += float(loss[counted].sum())
        self._count += int(counted.sum())

    @property
    def mean(self) -> float | None:
        return self._total / self._count if self._count else None


@contextmanager
def _measurable(model: nn.Module) -> Iterator[dict[str, str]]:
    """The layers without a variant patched with softmax; yields those that cannot be."""
    from attnvariants.hf import patch
    from attnvariants.hf.find import attention_modules
    from attnvariants.hf.holder import CHILD, HOOK

    targets = attention_modules(model)
    patched = {target.name for target in targets if hasattr(target.module, CHILD)}
    hooked = {
        target.name: f"patched through backend={HOOK!r}, which sees no query and key"
        for target in targets
        if target.name in patched and getattr(target.module, CHILD).backend == HOOK
    }
    plain = [target for target in targets if target.name not in patched]
    free = {target.name for target in plain if not target.reason}
    skipped = {target.name: target.reason for target in plain if target.reason} | hooked
    handle = None
    if free:
        handle = patch(model, "softmax", layers=lambda name, module: name in free)
    elif not patched:
        # raises, with the reasons
        patch(model, "softmax")
    try:
        yield skipped
    finally:
        if handle is not None:
            handle.unpatch()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _inputs(
    model: nn.Module, batch: Any, attention_mask: Tensor | None
) -> tuple[dict[str, Any], Tensor | None]:
    """The model's arguments on its device, and the mask as bool."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    first = next(iter(inputs.values()), None)
    if not isinstance(first, Tensor) or first.dim() < 2 or not first.numel():
        raise ValueError(
            "batch must be token ids [batch, tokens] or a mapping of the model's arguments that "
            "starts with such a tensor, and must not be empty."
        )
    for name, value in inputs.items():
        if isinstance(value, Tensor) or name == "attention_mask":
            _check_tensor("batch" if value is batch else name, value)
    if isinstance(batch, Tensor):
        _check_ids(model, batch)
    device = next((p.device for p in model.parameters()), first.device)
    inputs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs, None
    if mask.dim() != 2 or mask.shape != first.shape[:2]:
        raise ValueError(
            f"attention_mask must have shape [batch, tokens] = {list(first.shape[:2])}, "
            f"got {list(mask.shape)}."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "attention_mask must hold 1 or True for tokens and 0 or False for padding, got other "
            f"values of {mask.dtype}; a mask that is added to scores is none of these."
        )
    mask = mask != 0
    if bool(mask.all()):
        return inputs, None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "diagnose cannot tell an encoder's padding from a decoder's; pass encoder-decoder "
            "models sequences of one length."
        )
    return inputs, mask


def _check_tensor(name: str, tensor: Any) -> None:
    if dense(name, tensor).is_meta:
        raise ValueError(f"{name} must have values to be measured on, got a meta tensor.")


def _check_ids(model: nn.Module, ids: Tensor) -> None:
    """Raise ValueError unless the model has embeddings for these tokens."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"batch must be token ids of int32 or int64, got {ids.dtype}; convert it.")
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    if isinstance(embeddings, nn.Embedding):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= embeddings.num_embeddings:
            raise ValueError(
                f"batch must be token ids 0 .. {embeddings.num_embeddings - 1}, which are all that "
                f"the model knows, got {low if low < 0 else high}."
            )


def _batch_size(batch_size: int | None, count: int) -> int:
    return count if batch_size is None else check_integer("batch_size", batch_size, 1)


def _part(value: Any, start: int, stop: int, count: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
        return value[start:stop]
    return value


def _extras(model: nn.Module) -> dict[str, bool]:
    """Arguments that make the model return its hidden states and keep no cache."""
    parameters = inspect.signature(model.forward).parameters
    swallows = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    wanted = {"output_hidden_states": True, "use_cache": False, "return_dict": True}
    return {name: value for name, value in wanted.items() if swallows or name in parameters}


def _hidden_states(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    for kind in _HIDDEN:
        for index, states in enumerate(getattr(outputs, kind, None) or ()):
            if isinstance(states, Tensor):
                yield f"{kind}.{index}", states
