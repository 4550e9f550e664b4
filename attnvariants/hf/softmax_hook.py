"""Models with attention of their own: while a module runs, its one softmax is the variant.

The module's `forward` is stood in for on the instance, so that whatever it raises, interrupts
included, nothing outside its call ever sees another softmax. Only what is known to add its mask
to the scores before one softmax over the keys is taken on (`softmax_known`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnvariants.autocast import no_autocast
from attnvariants.hf.find import Target, forward_source, replaced_forward
from attnvariants.hf.holder import CHILD, HOOK, Spec
from attnvariants.hf.names import IMPLEMENTATION, implementation_of
from attnvariants.hf.penalties import split_in
from attnvariants.hf.softmax_known import Known, known_of, known_parent
from attnvariants.problem import compute_dtype
from attnvariants.reference import row_weights
from attnvariants.registry import Rows, Variant, get_variant

_ENGINES = ("auto", "reference")
_OF_FUNCTIONAL = ["input", "dim", "_stacklevel", "dtype"]
_SOFTMAX: tuple[Any, ...] = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
# Called with (module, scores, ALiBi's part of them or 0, spec, weights) of each replaced softmax.
observers: list[Callable[..., None]] = []
_paused: ContextVar[bool] = ContextVar("attnvariants_softmax_hook_paused", default=False)


class HookedForward:
    """What stands at `forward` of a hooked module.

    Attributes:
        module: the module.
        previous: what stood there on the instance, as accelerate's hooks do, or None.
        heads: its number of query heads.
        known: what is known of its class.
    """

    def __init__(self, module: nn.Module, previous: Any, heads: int, known: Known):
        self.module = module
        self.previous = previous
        self.heads = heads
        self.known = known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, its softmax over the keys replaced.

        Raises:
            ValueError: it is being compiled, or the module did not compute exactly one softmax
                of scores.
        """
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{type(self.module).__name__} computes its variant through backend={HOOK!r}, "
                "which torch.compile cannot trace; run the model without it."
            )
        if _paused.get():
            return self._own(*args, **kwargs)
        floats = [
            value
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor) and value.is_floating_point()
        ]
        spec = getattr(self.module, CHILD)(floats[0] if floats else None)
        dtypes, given = {value.dtype for value in floats}, self._given(args, kwargs)
        shown = self._shown(given, spec)
        with _Interception(self, spec, dtypes, self._alibi(given), shown) as softmax:
            result = self._own(*args, **kwargs)
        if not softmax.count:
            raise ValueError(
                f"{type(self.module).__name__} computed no softmax of attention scores in this "
                "call, so its variant was not applied; call "
                "model.set_attn_implementation('eager') or unpatch the model."
            )
        return result

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
        """The arguments of a call by name."""
        forward = inspect.signature(type(self.module).forward)
        return forward.bind(self.module, *args, **kwargs).arguments

    def _alibi(self, given: Mapping[str, Any]) -> Tensor | None:
        """The position bias `[batch or 1, heads, 1, keys or more]` that the call is given."""
        bias = given.get(self.known.alibi)
        return None if bias is None else bias.unflatten(0, (-1, self.heads))

    def _shown(self, given: Mapping[str, Any], spec: Spec) -> Tensor | None:
        """What the additive mask `[batch, heads, queries, keys]` of a call does not hide, bool.

        The scores tell by themselves what a dtype's minimum hides, and lower numbers do not.
        """
        # of two, attention between sequences adds the encoder's
        for name in ("encoder_attention_mask", "attention_mask"):
            mask = given.get(name)
            if isinstance(mask, Tensor) and mask.dim() == 4 and mask.is_floating_point():
                keep = split_in(self.module, mask, spec).keep
                if keep is None or keep.dtype == torch.bool:
                    return keep
                return keep > -math.inf
        return None

    def lowest_visible(self, dtypes: Iterable[torch.dtype]) -> float:
        """Scores at or below this are those of hidden keys."""
        least = max(torch.finfo(dtype).min for dtype in dtypes)
        if self.known.divided_by:
            least /= float(getattr(self.module, self.known.divided_by))
        return max(least, self.known.hidden) / 2


class _Interception(TorchFunctionMode):
    """Replaces the one softmax over the last dimension inside it."""

    def __init__(
        self,
        forward: HookedForward,
        spec: Spec,
        dtypes: set[torch.dtype],
        alibi: Tensor | None,
        shown: Tensor | None,
    ):
        super().__init__()
        self.forward, self.spec, self.dtypes = forward, spec, dtypes
        self.alibi, self.shown = alibi, shown
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _SOFTMAX:
            return func(*args, **kwargs)
        names = ["input", "dim", "dtype"] if func is not F.softmax else _OF_FUNCTIONAL
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        scores, dim = given["input"], given["dim"]
        if dim not in (-1, scores.dim() - 1):
            return func(*args, **kwargs)
        self.count += 1
        if self.count > self.forward.known.streams:
            raise ValueError(
                f"{type(self.forward.module).__name__} computes {self.count} softmaxes in a call, "
                f"expected {self.forward.known.streams}: which are attention cannot be told; "
                "unpatch the model."
            )
        variant = get_variant(self.spec.variant)
        split = self._split(scores)
        if variant.name == "softmax":
            return func(*args, **kwargs)
        weights = self._weights(split, variant)
        for observe in observers:
            alibi = 0.0 if self.alibi is None else self.alibi[..., -split.shape[-1] :]
            observe(self.forward.module, split, alibi, self.spec, weights)
        weights = weights.reshape(scores.shape)
        return weights.to(given.get("dtype") or scores.dtype)

    def _split(self, scores: Tensor) -> Tensor:
        """The scores as `[batch, heads, queries, keys]`."""
        heads = self.forward.heads
        if scores.dim() == 4 and scores.shape[1] == heads:
            return scores
        if scores.dim() == 3 and scores.shape[0] % heads == 0:
            return scores.unflatten(0, (-1, heads))
        raise ValueError(
            f"{type(self.forward.module).__name__} computes a softmax of shape "
            f"{list(scores.shape)}, expected scores [batch, {heads}, queries, keys] or "
            f"[batch * {heads}, queries, keys]: unpatch the model."
        )

    def _weights(self, scores: Tensor, variant: Variant) -> Tensor:
        dtypes = {scores.dtype, *self.dtypes}
        device = scores.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        # NaN compares as visible, so that it is not hidden with the masked scores
        keep = ~(scores <= self.forward.lowest_visible(dtypes))
        if self.shown is not None:
            keep = keep & self.shown[..., : scores.shape[-1]]
        with no_autocast(scores):
            dtype = compute_dtype(scores)
            options = {
                name: value.view(-1, 1, 1).to(dtype) if isinstance(value, Tensor) else value
                for name, value in variant.resolve(self.spec.options).items()
            }
            q_len, kv_len = scores.shape[-2:]
            visible = keep.sum(-1, keepdim=True).to(dtype)
            rows = Rows(visible, q_len, kv_len, kv_len - q_len)
            scores = scores.to(dtype).masked_fill(~keep, 0.0)
            bias = 0.0 if self.alibi is None else self.alibi[..., -kv_len:].to(dtype)
            scores = scores - bias
            if variant.prepare is not None:
                scores, _ = variant.prepare(scores, scores, rows, **options)
            scores = scores + bias
            if isinstance(bias, Tensor):
                scores = scores - _at_last_visible(bias, keep)
            return row_weights(scores, keep, rows, variant, options)


def _at_last_visible(bias: Tensor, keep: Tensor) -> Tensor:
    """A bias `[batch or 1, heads, 1, keys]` at the last key each row sees, its own position."""
    last = (keep * torch.arange(keep.shape[-1], device=keep.device)).amax(-1)
    return bias[:, :, 0].expand(*keep.shape[:2], -1).gather(-1, last).unsqueeze(-1)


def check_engine(impl: str) -> None:
    """Raise ValueError for an engine that needs more than scores."""
    if impl not in _ENGINES:
        raise ValueError(
            f"backend={HOOK!r} computes rows of scores in plain torch; impl must be "
            f"{' or '.join(map(repr, _ENGINES))}, got {impl!r}."
        )


def refusal(
    target: Target, variant: Variant | None = None, options: Mapping[str, Any] | None = None
) -> str:
    """Why the hook cannot run a variant, or any, in a module; empty if it can."""
    if target.dispatches:
        return (
            "it calls transformers' attention interface, where variants are exact and have "
            f"kernels; leave out backend={HOOK!r}"
        )
    cls, known = type(target.module), known_of(type(target.module))
    if known is None:
        parent = known_parent(cls)
        if parent:
            return (
                f"it computes attention otherwise than {parent}; load the model with "
                "attn_implementation='eager'"
            )
        return "it is none of the classes whose masks and softmax the hook knows"
    if installed(target.module) is None and (by := replaced_forward(target.module)):
        return by
    if target.heads is None:
        return "it does not tell its number of heads"
    if known.unless and _value(target, known.unless):
        return f"its {known.unless} is on, where its softmax is another function"
    biased = known.bias if isinstance(known.bias, bool) else bool(_value(target, known.bias))
    # of transformers 4, where many classes could hold one
    biased |= str(getattr(target.module, "position_embedding_type", "")).startswith("relative")
    used = implementation_of(target.config)
    if used not in ("eager", "sdpa", None):
        return f"its config names {used!r}; load the model with attn_implementation='eager'"
    if known.sdpa and used == "sdpa" and f"config.{IMPLEMENTATION}" not in forward_source(cls):
        return "it was built for sdpa; load the model with attn_implementation='eager'"
    if known.sdpa and biased and used == "sdpa":
        return (
            "its eager attention, which the hook runs, adds another position bias than its sdpa "
            "attention; load the model with attn_implementation='eager' to have it"
        )
    return "" if variant is None else _unfit(variant, options or {}, known if biased else None)


def _unfit(variant: Variant, options: Mapping[str, Any], biased: Known | None) -> str:
    if variant.own_scale or (variant.prepare is not None and not variant.row_temperature):
        return f"{variant.name} needs queries and keys, and the hook sees nothing but scores"
    if biased is None:
        return ""
    if variant.row_temperature and not biased.alibi:
        return (
            f"its scores hold a position bias, which {variant.name}'s temperature must not multiply"
        )
    for feature in ("bias", "alibi_slopes"):
        if feature in variant.refuses:
            return f"its scores hold a position bias: {variant.refuses[feature]}"
    if biased.shifted and not _ignores_shifts(variant, options):
        return (
            f"its scores hold a bias by key and not by distance, and {variant.name} changes with "
            "a number added to all scores of a row"
        )
    return ""


def _ignores_shifts(variant: Variant, options: Mapping[str, Any]) -> bool:
    """Whether a number added to all scores of a row leaves its weights as they are."""
    scores = torch.tensor([[[[-1.5, 0.25, 0.5, 2.0]]]], dtype=torch.float64)
    keep, rows = torch.ones_like(scores, dtype=torch.bool), Rows(scores.new_tensor(4.0), 1, 4, 3)
    values = variant.resolve({k: v for k, v in options.items() if k not in variant.learned})
    before, after = (row_weights(x, keep, rows, variant, values) for x in (scores, scores - 3))
    return torch.allclose(before, after, atol=1e-9)


def _value(target: Target, name: str) -> Any:
    return getattr(target.module, name, getattr(target.config, name, None))


def needs_eager(target: Target) -> bool:
    """Whether the module must be told to compute its softmax itself."""
    known = known_of(type(target.module))
    return known is not None and known.sdpa and implementation_of(target.config) == "sdpa"


def install(target: Target) -> None:
    """Stand in for the module's forward; it must have a holder when it is called."""
    module, known = target.module, known_of(type(target.module))
    if installed(module) is not None or known is None or target.heads is None:
        return
    forward = HookedForward(module, module.__dict__.get("forward"), target.heads, known)
    module.__dict__["forward"] = forward
    module.register_forward_pre_hook(_still_there)


def uninstall(module: nn.Module) -> None:
    """Leave no trace of `install`; nothing if there is none."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _still_there]:
        del hooks[key]
    for name in ("forward", "_old_forward"):
        forward = module.__dict__.get(name)
        if not isinstance(forward, HookedForward):
            continue
        if forward.previous is not None:
            module.__dict__[name] = forward.previous
        elif name == "forward":
            del module.__dict__[name]
        else:
            # what accelerate keeps to be put back, and calls meanwhile
            module.__dict__[name] = _bound(module)


def installed(module: nn.Module) -> HookedForward | None:
    """What stands in for the module's forward, under accelerate's hooks too."""
    for name in ("forward", "_old_forward"):
        forward = module.__dict__.get(name)
        if isinstance(forward, HookedForward):
            return forward
    return None


def _bound(module: nn.Module) -> Callable[..., Any]:
    return type(module).forward.__get__(module)


def _still_there(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: raise if the variant would silently not be computed."""
    forward = installed(module)
    if forward is None:
        raise ValueError(
            f"the forward of {type(module).__name__} was replaced after it was patched, so its "
            "variant would be ignored; unpatch the model and patch it again."
        )
    if forward.module is not module:
        raise ValueError(
            f"{type(module).__name__} was copied without its hook, as nn.DataParallel does; use "
            "DistributedDataParallel, or copy.deepcopy for a copy."
        )


@contextmanager
def paused() -> Iterator[None]:
    """Hooked modules compute their own softmax inside."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


def is_paused() -> bool:
    """Whether this is inside `paused`."""
    return _paused.get()
