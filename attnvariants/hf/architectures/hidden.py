"""Whether hidden keys are absent from a patched model: as from a call with them cut out.

Softmax gives a hidden key no weight whatever hides it, so that a patch with softmax cannot tell. So
each attention call of a model is compared, under other variants, with one of the same queries and
only those keys to which the model's own eager attention gives weight when all scores are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import attnvariants
from attnvariants.hf import softmax_hook
from attnvariants.hf.architectures.drive import patch_most
from attnvariants.hf.dispatch import attention_forward
from attnvariants.hf.eager import eager_of
from attnvariants.hf.holder import CHILD, Spec
from attnvariants.hf.lazy import LazyMask, to_float
from attnvariants.hf.masks import KEYS
from attnvariants.hf.names import attention_functions
from attnvariants.hf.sinks import attention_with_sinks
from attnvariants.hf.sparse import picked
from attnvariants.reference import row_weights
from attnvariants.registry import Rows, get_variant

# One that a key's presence changes, and one that changes with their number; then what refuses less.
VARIANTS = (("softpick", "relu"), ("ssmax",), ("sparsemax",))

# Below this share of a row's largest weight a key is hidden; a row whose highest entry of the mask
# is as low as this sees nothing.
_NO_WEIGHT, _BLIND = 1e-20, -50.0
# No product of a tiny model's queries and keys is as low.
_NO_SCORE = -4e3
# Rows that are less than this share of the values are nothing but rounding.
_NOTHING = 1e-2
# Rows of a call that are compared.
_MOST_ROWS = 240


@dataclass
class Absence:
    """What was found.

    Attributes:
        difference: the largest relative difference of a row that hides keys; None if none does.
        where: class of the module that it was found in, and the variant.
        note: what could not be compared.
    """

    difference: float | None = None
    where: str = ""
    note: str = ""

    def add(self, expected: Tensor, got: Tensor, where: str, values: Tensor | None = None) -> None:
        """Compare rows, `[rows, width]`, by their size, or that of `values` if they are nothing."""
        size = max(float(expected.abs().max()), 1e-30)
        if values is not None:
            # scores that all but cancel make rows of mere rounding
            size = max(size, _NOTHING * float(values.abs().max()))
        change = float((expected - got.double()).abs().max()) / size
        if self.difference is None or not change <= self.difference:
            self.difference, self.where = change, where


def absence(model: nn.Module, run: Callable[[], Any], **patching: Any) -> Absence:
    """Patch a model with variants that are no softmax and compare its calls; it is left as it was.

    Args:
        run: runs the model on all that is to be compared.
        patching: further arguments of `patch`.
    """
    found = Absence()
    for names in VARIANTS:
        taken = [name for name in names if _try(model, name, run, found, patching)]
        if taken:
            return found
    found.note = "no variant that tells hidden keys apart can be put in"
    return found


def _try(
    model: nn.Module, variant: str, run: Callable[[], Any], found: Absence, patching: dict[str, Any]
) -> bool:
    try:
        handle = patch_most(model, variant, **patching)
    except ValueError:
        return False
    try:
        with torch.no_grad(), _watching(found):
            run()
    finally:
        handle.unpatch()
    return True


@contextmanager
def _watching(found: Absence) -> Iterator[None]:
    """Compare every call of a patched module inside."""
    functions: Any = attention_functions()

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        result = attention_forward(module, query, key, value, *args, **kwargs)
        if hasattr(module, CHILD):
            mask = args[0] if args else kwargs.pop("attention_mask", None)
            _compare_call(found, module, (query, key, value), mask, kwargs, result[0])
        return result

    def hooked(*call: Any) -> None:
        _compare_scores(found, *call)

    for name in KEYS:
        functions[name] = watched
    softmax_hook.observers.append(hooked)
    try:
        yield
    finally:
        softmax_hook.observers.remove(hooked)
        for name in KEYS:
            # what is registered for all is there still
            del functions[name]


def _compare_call(
    found: Absence,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    kwargs: dict[str, Any],
    out: Tensor,
) -> None:
    """A call through transformers' attention interface.

    Args:
        tensors: query, key and value.
        mask: as the model made it.
        out: `[batch, q_len, heads, value_dim]`, what the variant gave.
    """
    query, key, value = tensors
    mask = picked(module, query, key, mask, kwargs)
    bias = kwargs.get("position_bias")
    if mask is None and bias is None:
        return
    mask = _additive(mask, query, key.shape[2])
    weights = _eager_weights(module, tensors, mask, kwargs)
    if weights is None:
        found.note = f"the eager attention of {type(module).__name__} returns no weights"
        return
    shape = weights.shape
    added = torch.zeros(shape, dtype=torch.float64)
    for term in (mask, bias):
        if term is not None:
            added = added + term[..., : shape[-1]].double()
    keep = weights > _NO_WEIGHT * weights.amax(-1, keepdim=True)
    if mask is not None:
        keep &= (mask[..., : shape[-1]].amax(-1, keepdim=True) > _BLIND).expand(*shape[:3], 1)
    spec: Spec = getattr(module, CHILD)(query)
    query = query.expand(shape[0], -1, -1, -1)
    key, value = (t.repeat_interleave(shape[1] // t.shape[1], 1).double() for t in (key, value))
    sinks = kwargs.get("s_aux") if kwargs.get("sinks") is None else kwargs["sinks"]
    call = {"scaling": kwargs.get("scaling"), "softcap": kwargs.get("softcap"), "sinks": sinks}
    for (batch, rows), head, shown in _groups(keep):
        keys, values = (tensor[batch[:, None], head, shown] for tensor in (key, value))
        more = added[batch, head, rows].gather(-1, shown)
        expected = _cut(query[batch, head, rows].double(), keys, values, more, spec, head, call)
        where = f"{type(module).__name__}, {spec.variant}"
        found.add(expected, out[batch, rows, head], where, values)


def _additive(mask: Any, query: Tensor, kv_len: int) -> Tensor | None:
    """The mask as eager attention adds it, `[batch, heads, q_len, kv_len]`."""
    if isinstance(mask, LazyMask):
        mask = mask.tensor("bool")
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask[..., :kv_len]
    return to_float(mask[..., :kv_len] != 0, query.dtype)


def _eager_weights(
    module: nn.Module, tensors: tuple[Tensor, ...], mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """What the model's own eager attention weighs if all products of queries and keys are 0."""
    query, key, value = tensors
    more = {**kwargs, "dropout": 0.0}
    result = eager_of(type(module))(module, query * 0, key, value, mask, **more)
    weights: Any = result[1] if isinstance(result, tuple) and len(result) > 1 else None
    whole = isinstance(weights, Tensor) and weights.dim() == 4
    return weights if whole and weights.shape[-1] == key.shape[2] else None


def _groups(keep: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], int, Tensor]]:
    """Rows of one head that hide some keys and see equally many.

    Yields:
        Their batch entries and positions, the head, and the keys that they see, `[rows, n]`.
    """
    counts = keep.sum(-1)
    places = ((counts > 0) & (counts < keep.shape[-1])).nonzero()
    places = places[:: max(1, -(-len(places) // _MOST_ROWS))]
    for head in places[:, 1].unique().tolist():
        of_head = places[places[:, 1] == head]
        seen = counts[of_head[:, 0], head, of_head[:, 2]]
        for count in seen.unique().tolist():
            batch, _, rows = of_head[seen == count].unbind(1)
            shown = keep[batch, head, rows].nonzero()[:, 1].view(-1, count)
            yield (batch, rows), head, shown


def _cut(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    added: Tensor,
    spec: Spec,
    head: int,
    call: dict[str, Any],
) -> Tensor:
    """Rows of one head over the keys that each sees, in float64: `[rows, value_dim]`.

    Args:
        query: `[rows, head_dim]`.
        keys, values: `[rows, n, width]`.
        added: `[rows, n]`, the bias of those keys.
    """
    variant = get_variant(spec.variant)
    options: dict[str, Any] = {
        name: option.double().view(-1)[head : head + 1]
        if isinstance(option, Tensor) and option.numel() > 1
        else option
        for name, option in spec.options.items()
    }
    more: dict[str, Any] = {
        "bias": added[:, None, None] if bool(added.any()) else None,
        "scale": None if variant.own_scale else call["scaling"],
        "softcap": call["softcap"],
        "impl": "reference",
    }
    query, keys, values = query[:, None, None], keys[:, None], values[:, None]
    if call["sinks"] is None:
        out = attnvariants.attention(query, keys, values, spec.variant, **more, **options)
    else:
        sinks = call["sinks"].double()
        sinks = sinks[head : head + 1] if sinks.dim() == 1 else sinks
        run: dict[str, Any] = {"dropout_p": 0.0, "return_weights": False}
        out = attention_with_sinks(
            query, keys, values, sinks, variant=spec.variant, **run, **more, **options
        )
    return out[:, 0, 0]


def _compare_scores(
    found: Absence, module: nn.Module, scores: Tensor, bias: Any, spec: Spec, weights: Tensor
) -> None:
    """A call whose softmax was replaced, by its scores `[batch, heads, queries, keys]`.

    Args:
        bias: ALiBi's part of the scores, `[batch or 1, heads, 1, keys]`, or 0.
        weights: what the variant made of them.
    """
    scores = scores.double()
    keep = scores > _NO_SCORE
    variant = get_variant(spec.variant)
    if variant.prepare is not None:
        found.note = f"{variant.name} in place of {type(module).__name__}'s softmax is not compared"
        return
    bias = torch.as_tensor(bias, dtype=torch.float64).expand_as(scores)
    for (batch, rows), head, shown in _groups(keep):
        options = {
            name: value.double().view(-1)[head].view(1, 1, 1)
            if isinstance(value, Tensor) and value.numel() > 1
            else value
            for name, value in variant.resolve(spec.options).items()
        }
        # ALiBi counts from the row's own key, the last it sees
        own = bias[batch, head, rows].gather(-1, shown[:, -1:])
        cut = (scores[batch, head, rows].gather(-1, shown) - own)[None, None]
        count = shown.shape[1]
        whole = Rows(torch.full(cut.shape[:-1], count).double()[..., None], len(shown), count, 0)
        expected = row_weights(cut, torch.ones_like(cut, dtype=torch.bool), whole, variant, options)
        got = weights[batch, head, rows]
        expected = got.new_zeros(got.shape).double().scatter(1, shown, expected[0, 0])
        found.add(expected, got, f"{type(module).__name__}, {spec.variant}")
