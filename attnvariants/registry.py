"""The registry: the folder `variants/` is the list, one file a variant, named as it is called."""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnvariants import scalars
from attnvariants.checks import DTYPES, dense
from attnvariants.context import readable

if TYPE_CHECKING:
    from attnvariants.geometry import Packed

# What `attention` takes besides a variant's options, for suggestions.
CALL_ARGUMENTS = (
    "attn_mask",
    "bias",
    "causal",
    "window_size",
    "alibi_slopes",
    "softcap",
    "scale",
    "position",
    "dropout_p",
    "generator",
    "impl",
    "return_weights",
    "return_stats",
)


class Rows(NamedTuple):
    """What a variant may know about the query rows of one block.

    Attributes:
        visible: `[batch or 1, heads or 1, rows, 1]`, float: n, the number of keys each row sees.
        q_len: number of queries of the whole call.
        kv_len: number of keys of the whole call, up to where the last query stands.
        offset: row i of the call stands at position `i + offset` among the keys. It and kv_len are
            int64 scalars where the keys end in a tail of empty slots, as a static cache's.
        packed: None, or the sequences that a call of packed ones holds; then `q_len` and `kv_len`
            are those of the longest and `offset` has no meaning.
        first_key: where the first of the keys at hand stands; not 0 where a state stands for those
            before it.
    """

    visible: Tensor
    q_len: int
    kv_len: int | Tensor
    offset: int | Tensor
    packed: Packed | None = None
    first_key: int = 0

    def positions(self, query: Tensor, key: Tensor) -> tuple[tuple[Tensor, Any], ...]:
        """Of all queries and of all keys: where each stands, int64 `[tokens]`, and the greater of
        its sequence's two lengths, at least 1: a number or scalar, or `[tokens]` where packed.
        """
        if self.packed is not None:
            return self.packed.positions(query.shape[-2], key.shape[-2])
        longest: Any = max(self.q_len, 1)
        if isinstance(self.kv_len, Tensor):
            longest = self.kv_len.clamp(min=longest)
        else:
            # symbolic lengths too
            longest = torch.sym_max(longest, self.kv_len)
        of_queries = torch.arange(query.shape[-2], device=query.device) + self.offset
        of_keys = torch.arange(key.shape[-2], device=key.device) + self.first_key
        return (of_queries, longest), (of_keys, longest)


@dataclass(frozen=True)
class Option:
    """One option of a variant: its default and what it accepts.

    Attributes:
        default: value when the caller gives none.
        doc: one line for `attnvariants show`.
        choices: strings (or booleans) accepted.
        number: finite numbers are accepted too.
        minimum: smallest number accepted.
        above: numbers must be strictly greater than this.
        learned: a floating tensor of shape `[]` or `[heads]` is accepted and gets its gradient.
        in_prepare: the option acts in `prepare` alone, so that fused kernels need not know it.
        from_config: name of the Hugging Face config field that `patch` fills the option from.
    """

    default: Any
    doc: str
    choices: tuple[Any, ...] = ()
    number: bool = True
    minimum: float | None = None
    above: float | None = None
    learned: bool = False
    in_prepare: bool = False
    from_config: str | None = None

    def accepts(self) -> str:
        """What may be given, in words."""
        words = [repr(choice) for choice in self.choices]
        if self.number:
            bound = ""
            if self.minimum is not None:
                bound = f" >= {self.minimum:g}"
            elif self.above is not None:
                bound = f" > {self.above:g}"
            words.append(f"a finite number{bound}")
        if self.learned:
            words.append("a floating tensor of shape [] or [heads]")
        return " or ".join(words)

    def check(self, owner: str, name: str, value: Any) -> Any:
        """Return `value` if it is acceptable, else raise ValueError."""
        if value is None and self.default is None:
            return value
        if isinstance(value, Tensor):
            whole = not value.is_floating_point() and not value.is_complex()
            if self.learned and not (whole and value.dim() == 0):
                return self._check_tensor(owner, name, value)
            if value.requires_grad or value.numel() != 1:
                raise ValueError(
                    f"{owner}'s {name} must be {self.accepts()}, got a tensor; it is not learned."
                )
        given = scalars.plain(f"{owner}'s {name}", value)
        if any(given is choice or (isinstance(given, str) and given == choice)
               for choice in self.choices):  # fmt: skip
            return given
        if self.number and scalars.is_real(given):
            small = self.minimum is not None and given < self.minimum
            edge = self.above is not None and given <= self.above
            # a comparison, which a symbolic number of a call being compiled has too
            if abs(given) < math.inf and not small and not edge:
                # fractions and numpy's long double have no place in what is compiled or saved
                known = isinstance(given, (int, float, torch.SymInt, torch.SymFloat))
                return given if known else float(given)
        raise ValueError(
            f"{owner}'s {name} must be {self.accepts()}, got {scalars.in_words(value)}."
        )

    def _check_tensor(self, owner: str, name: str, value: Tensor) -> Tensor:
        dense(f"{owner}'s {name}", value)
        if value.dtype not in DTYPES or value.dim() > 1:
            raise ValueError(
                f"{owner}'s {name} must be {self.accepts()}, "
                f"got shape {list(value.shape)} of {value.dtype}."
            )
        # A device sync a call would cost more than the check is worth: patch() checks there.
        on_cpu = value.device.type == "cpu" and readable(value)
        if on_cpu and not bool(torch.isfinite(value.detach()).all()):
            raise ValueError(f"{owner}'s {name} holds NaN or infinity; learned values are finite.")
        return value


Ratio = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Variant:
    """A replacement for the softmax: `weights = numerator / denominator` of the scores of a row.

    Attributes:
        doc: the module docstring; its first line is the summary, its first indented block the
            formula, and it names the source as `arXiv:NNNN.NNNNN`.
        ratio: `ratio(scores, rows, **options) -> (numerator, denominator)`; scores are
            `[batch, heads, rows, keys]`, the denominator broadcasts over keys, or is None for 1.
            Plain differentiable torch: the oracle. Hidden keys come in with the score `hidden`.
            Rows whose denominator is 0 get zero weights.
        hidden: the score that stands for "this key is not there", a number or a function of the
            options; the numerator must be 0 at it and the denominator unchanged by it.
        options: the variant's own options.
        fused: as `ratio`, quicker on blocks that fit a cache, differentiable too; it may overwrite
            scores that require no gradient. The chunked engine prefers it.
        fused_unit: `fused` takes the scores times this; log2 e saves a pass to those that use
            exp2, because the engine folds it into the scale.
        prepare: `prepare(query, key, rows, **options) -> (query, key)`, differentiable, before
            the product of the two (temperatures, norms, feature maps).
        row_temperature: whether all that `prepare` does is to multiply each query by a number of
            its row; where only scores are at hand it is given them in place of the query.
        scale: default score multiplier; None means 1/sqrt(head_dim). A variant with its own scale
            is not given a model's.
        refuses: call features the variant has no meaning for, with the reason.
        check: `check(rows, options, scale)`, raises ValueError when they do not agree.
        row_sum: "one", "at most one" or "any", what a row of weights sums to.
        nonnegative: whether weights are >= 0.
        softmax_scores: whether the weights are the plain softmax of the scores, so that other
            people's softmax kernels can run it.
        hooks: the fused kernels' part, `attnvariants_kernels.hooks.Hooks`, or a function
            `(options, case) -> Hooks` where it depends on either; None has no kernels.
        theta: `theta(options, case)`, the hooks' runtime numbers.
        width_factor: how many times head_dim the prepared query and key are wide.
        linear_eps: None, or weights are the scores themselves over the greater of their sum and
            this: then linear kernels run it in linear time, and `recurrent` decodes with a state.
        default_learned: learned options that a patched model always gets as parameters.
        presets: name -> function of the training length -> initial values of learned options.
        name: registry name, filled in on registration.
    """

    doc: str | None
    ratio: Ratio
    hidden: float | Callable[[Mapping[str, Any]], float] = -math.inf
    options: Mapping[str, Option] = field(default_factory=dict)
    fused: Ratio | None = None
    fused_unit: float = 1.0
    prepare: Callable[..., tuple[Tensor, Tensor]] | None = None
    row_temperature: bool = False
    scale: float | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Rows, Mapping[str, Any], float], None] | None = None
    row_sum: str = "any"
    nonnegative: bool = True
    softmax_scores: bool = False
    hooks: Any = None
    theta: Callable[[Mapping[str, Any], Any], tuple[float, ...]] | None = None
    width_factor: int = 1
    linear_eps: float | None = None
    default_learned: tuple[str, ...] = ()
    presets: Mapping[str, Callable[[int], dict[str, float]]] = field(default_factory=dict)
    name: str = ""

    def __deepcopy__(self, memo: Any) -> Variant:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.name or get_variant(self.name) is not self:
            raise TypeError(f"only registered variants can be pickled, {self.name!r} is not.")
        return get_variant, (self.name,)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.doc or "").strip().split("\n", 1)[0]

    @property
    def formula(self) -> str:
        """The first indented block of the docstring."""
        block = re.search(r"(?:^[ ]{4}.*\n(?:\n(?=[ ]{4}))?)+", (self.doc or "") + "\n", re.M)
        return "\n".join(line[4:] for line in block[0].rstrip().split("\n")) if block else ""

    @property
    def arxiv(self) -> str:
        """arXiv id of the source, or an empty string."""
        found = re.search(r"arXiv:(\d{4}\.\d{4,5})", self.doc or "")
        return found[1] if found else ""

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the options that may be learned tensors."""
        return tuple(name for name, option in self.options.items() if option.learned)

    @property
    def own_scale(self) -> bool:
        """Whether the variant fixes its own scale, so that a model's must not be passed."""
        return self.scale is not None

    def hidden_score(self, options: Mapping[str, Any]) -> float:
        """The score of a key that is not there, under these options."""
        return self.hidden(options) if callable(self.hidden) else self.hidden

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options of the variant, checked, with defaults filled in.

        Raises:
            ValueError: an unknown option, or a value that the option does not accept.
        """
        unknown = [name for name in options if name not in self.options]
        if unknown:
            takes = f"takes {', '.join(self.options)}" if self.options else "takes no options"
            got = ", ".join(repr(name) for name in unknown)
            near = difflib.get_close_matches(unknown[0], [*self.options, *CALL_ARGUMENTS], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            if unknown[0] in CALL_ARGUMENTS:
                hint = f" (attention has a {unknown[0]}, this function has none)"
            raise ValueError(f"{self.name or 'this variant'} {takes}; got {got}{hint}.")
        return {
            name: option.check(self.name, name, options[name])
            if name in options
            else option.default
            for name, option in self.options.items()
        }


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which would import the whole compiler for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_registered: dict[str, Variant] = {}
# attributes are read as they are when a compiled call is traced, entries of a dict as they were
_loaded = SimpleNamespace()


def _shipped() -> list[str]:
    from attnvariants import variants

    names = (module.name for module in pkgutil.iter_modules(variants.__path__))
    return [name for name in names if not name.startswith("_")]


def list_variants() -> tuple[str, ...]:
    """Names of all variants, shipped and registered, in alphabetical order."""
    return tuple(sorted({*_shipped(), *_registered}))


def get_variant(name: str | Variant) -> Variant:
    """The variant of that name; a `Variant` is returned as it is.

    Raises:
        ValueError: no such variant; the message suggests the nearest name.
    """
    if isinstance(name, Variant):
        return name
    if not isinstance(name, str):
        raise ValueError(f"variant must be a name or a Variant, got {type(name).__name__}.")
    if name in _registered:
        return _registered[name]
    _load(name)
    return getattr(_loaded, name)


@constant_when_compiled
def _load(name: str) -> None:
    # not hasattr, which every object's own attributes have
    if name in vars(_loaded):
        return
    known = list_variants()
    if name not in known:
        raise ValueError(f"unknown variant {name!r}; {suggest(name, known)}")
    module = importlib.import_module(f"attnvariants.variants.{name}")
    setattr(_loaded, name, replace(module.VARIANT, name=name))


def is_registered(variant: Variant) -> bool:
    """Whether `get_variant(variant.name)` is this very variant."""
    if variant.name in _registered:
        return _registered[variant.name] is variant
    return getattr(_loaded, variant.name, None) is variant


def register(name: str, variant: Variant, *, replace_existing: bool = False) -> Variant:
    """Add a variant from outside the package; returns it with its name filled in.

    Raises:
        ValueError: the name is taken or no identifier, or `variant` is not a Variant.
    """
    if not isinstance(variant, Variant):
        raise ValueError(f"register takes a Variant, got {type(variant).__name__}.")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a variant's name must be a Python identifier, got {name!r}.")
    if name in list_variants() and not replace_existing:
        raise ValueError(
            f"variant {name!r} exists already; choose another name or pass replace_existing=True."
        )
    _registered[name] = replace(variant, name=name)
    return _registered[name]


def suggest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """`did you mean ...? Known: ...`, for errors about names."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(known)}."
