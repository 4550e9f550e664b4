"""Whether results are as good as their dtype allows, by the float64 reference and its condition.

A result that is off by more than rounding of the row explains is compared with what the reference
itself makes of inputs moved by a few units of rounding: an engine may be as far off as that, and no
further. So cancellation, near-ties of a maximum and kinks are judged by the call at hand, and no
tolerance is widened for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants.api import attention
from attnvariants.registry import Rows, Variant, get_variant

Results = dict[str, Tensor]
# `again(rounding, seed)`: the reference's results of inputs moved by so many units of rounding
Again = Callable[[float, int], Results]

# Units of rounding, of the largest entry of the row, that no engine can be asked to avoid.
_ROUNDINGS = 8.0
# Units of the largest entry of all, where the formula itself cancels inside a row.
_ROUNDINGS_OF_ALL = 4.0
# Times the reference's own movement under one unit of rounding of each input.
_MOVEMENTS = 6.0
_TRIES = 4
_MORE_TRIES = 16
# An error so many times what is allowed is not explained by a few more tries.
_HOPELESS = 100.0
# A step of so many units that moves a row more than this many times what one unit does is a jump.
_STRIDE = 64.0
_JUMP = 20.0


class Fault(NamedTuple):
    """A result that is off.

    Attributes:
        tensor: "out", or the input whose gradient it is.
        what: "NaN", "infinite" or "off".
        excess: the largest error, in units of what is allowed there.
        error: the largest error relative to the tensor's largest entry.
    """

    tensor: str
    what: str
    excess: float
    error: float

    def __str__(self) -> str:
        if self.what != "off":
            return f"{self.tensor} is {self.what}"
        return f"{self.tensor} is off by {self.error:.1e}, {self.excess:.3g} times what is allowed"


@dataclass(frozen=True)
class Call:
    """One call of `attention`, in float64 numbers that the tested dtype can hold.

    Attributes:
        variant: a name or a Variant.
        leaves: tensors by argument that get a gradient: query, key, value and more.
        rest: the other arguments, options included.
        cotangent: of the output.
        seed: of the dropout's generator.
        function: takes the arguments of `attention` by name.
    """

    variant: str | Variant
    leaves: Mapping[str, Tensor]
    rest: Mapping[str, Any]
    cotangent: Tensor
    seed: int = 0
    function: Callable[..., Tensor] = field(default=attention)

    def run(self, impl: str, dtype: torch.dtype) -> Results:
        """Output and gradients by an engine, all floating tensors in `dtype`."""

        def cast(item: Any) -> Any:
            floating = isinstance(item, Tensor) and item.is_floating_point()
            # keeps strides
            return item.to(dtype) if floating else item

        leaves = {name: cast(leaf).detach().requires_grad_() for name, leaf in self.leaves.items()}
        rest = {name: cast(item) for name, item in self.rest.items()}
        if rest.get("dropout_p"):
            rest["generator"] = torch.Generator().manual_seed(self.seed)
        out = self.function(**leaves, variant=self.variant, impl=impl, **rest)
        grads: Any = [None] * len(leaves)
        if out.requires_grad:
            grads = torch.autograd.grad(
                out, list(leaves.values()), cast(self.cotangent), allow_unused=True
            )
        found = {"out": out.detach()}
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            found[name] = torch.zeros_like(leaf) if grad is None else grad
        return found

    def moved(self, rounding: float, seed: int) -> Call:
        """The call with every input moved by up to `rounding` of itself."""
        generator = torch.Generator().manual_seed(seed)

        # every other time nothing moves the scores: equal ones stay so
        ties = seed % 2 == 1

        def move(tensor: Tensor, rounding: float = rounding) -> Tensor:
            sign = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return tensor.double() * (1 + rounding * sign)

        rest = dict(self.rest)
        mask = rest.get("attn_mask")
        if isinstance(mask, Tensor) and mask.is_floating_point():
            # what hides goes on hiding
            rest["attn_mask"] = mask.where(mask.abs() > 1e300, move(mask))
        return replace(
            self,
            variant=_noisy(get_variant(self.variant), rounding, generator, ties),
            leaves={
                name: move(leaf, 0.0 if ties and name != "value" else rounding)
                for name, leaf in self.leaves.items()
            },
            rest=rest,
            cotangent=move(self.cotangent),
        )

    def rounded(self, dtype: torch.dtype, seed: int) -> Call:
        """The call with inputs moved by a unit of float32 or of `dtype`, in numbers of `dtype`."""
        moved = self.moved(max(torch.finfo(dtype).eps, 1e-7), seed)
        leaves = {name: leaf.to(dtype).double() for name, leaf in moved.leaves.items()}
        return replace(self, leaves=leaves)

    def again(self, rounding: float, seed: int) -> Results:
        """What the reference makes of moved inputs."""
        return self.moved(rounding, seed).run("reference", torch.float64)


def _noisy(variant: Variant, rounding: float, generator: torch.Generator, ties: bool) -> Variant:
    """The variant with noise in its scores and in the gradients that meet in its formula.

    Those of numerator and denominator cancel each other in a row that is nearly one key's. Scores
    have none where ties are to stay.
    """

    def noise(tensor: Tensor) -> Tensor:
        sign = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 2 - 1
        return tensor * (1 + rounding * sign)

    def in_gradient(tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and tensor.requires_grad:
            return _with_hook(tensor, noise)
        return tensor

    def ratio(scores: Tensor, rows: Rows, **options: Any) -> tuple[Tensor, Tensor | None]:
        shown = scores if ties else noise(scores)
        # gradients of equal keys cancel in their sum
        shown = shown if not shown.requires_grad else _with_hook(shown, noise)
        numerator, denominator = variant.ratio(shown, rows, **options)
        noisy = in_gradient(numerator)
        assert noisy is not None
        return noisy, in_gradient(denominator)

    def prepare(query: Tensor, key: Tensor, rows: Rows, **options: Any) -> tuple[Tensor, Tensor]:
        if variant.prepare is not None:
            query, key = variant.prepare(query, key, rows, **options)
            if not ties:
                query, key = noise(query), noise(key)
        return in_gradient(query), in_gradient(key)  # type: ignore[return-value]

    return replace(variant, ratio=ratio, prepare=prepare)


def _with_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    # a leaf or a view of one must not get it
    tensor = tensor * 1
    tensor.register_hook(hook)
    return tensor


def as_plain(call: Call, faults: list[Fault], found: Results, dtype: torch.dtype) -> list[Fault]:
    """The faults that are more than twice as far off as the dense formula in the same dtype.

    Where a formula cancels by itself, no engine that computes it has more digits.
    """
    doubtful = [fault for fault in faults if fault.what == "off"]
    if not doubtful:
        return faults
    errors: dict[str, float] = {fault.tensor: 0.0 for fault in doubtful}
    # rounding falls by chance: what the formula may lose is what it loses for inputs next to these
    for moved in (call, *(call.rounded(dtype, seed) for seed in range(0, 2 * _MORE_TRIES, 2))):
        plain, exact = moved.run("reference", dtype), moved.run("reference", torch.float64)
        for name in errors:
            errors[name] = max(errors[name], _error(plain[name], exact[name]))
    wanted = call.run("reference", torch.float64)
    return [
        fault
        for fault in faults
        if fault.what != "off"
        or _error(found[fault.tensor], wanted[fault.tensor]) > 2 * errors[fault.tensor]
    ]


def _error(got: Tensor, want: Tensor) -> float:
    """The largest finite error."""
    error = (got.double() - want.double()).abs()
    return float(error.where(error.isfinite(), 0).max())


def compare(
    found: Results,
    wanted: Results,
    dtype: torch.dtype,
    again: Again,
    unit: float | None = None,
    hasty: bool = False,
) -> list[Fault]:
    """Everything that is off.

    Args:
        found: an engine's results.
        wanted: those of the float64 reference of the same numbers.
        dtype: of the results.
        again: the reference of inputs moved by units of rounding, called only where needed.
        unit: one unit of rounding of the engine's own arithmetic; None is that of float32, or of
            float64 for float64 results.
        hasty: a few tries are enough where the error is large, though it may be a jump.
    """
    if unit is None:
        unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    faults = []
    spread = _Spread(wanted, again, unit)
    for name, want in wanted.items():
        fault = _judge(name, found[name].double(), want.double(), dtype, unit, spread, hasty)
        if fault is not None:
            faults.append(fault)
    return faults


def _judge(
    name: str,
    got: Tensor,
    want: Tensor,
    dtype: torch.dtype,
    unit: float,
    spread: _Spread,
    hasty: bool,
) -> Fault | None:
    if got.shape != want.shape:
        return Fault(name, f"of shape {list(got.shape)}, not {list(want.shape)}", math.inf, 1.0)
    if not got.numel():
        return None
    limits = torch.finfo(dtype)
    # what is not finite in float64, or out of the dtype's range, may be anything but a number
    defined = want.isfinite()
    if bool((got.isnan() & defined).any()):
        return Fault(name, "NaN", math.inf, math.inf)
    representable = defined & (want.abs() < limits.max * (1 - _MOVEMENTS * limits.eps))
    endless = got.isinf() & representable
    if bool(endless.any()) and bool((endless & ~spread.overflows(name, limits.max)).any()):
        return Fault(name, "infinite", math.inf, math.inf)
    zero = want.new_zeros(())
    want = want.where(representable, zero)
    error = (got.where(representable & got.isfinite(), zero) - want).abs()
    rounding = limits.eps / 2 * want.abs() + max(limits.smallest_normal * limits.eps, 1e-45)
    allowed = rounding * 1.01 + _ROUNDINGS * unit * _row_max(want.abs())
    if bool((error <= allowed).all()):
        return None
    for tries in (_TRIES, _MORE_TRIES):
        wider = allowed + _MOVEMENTS * spread.of(name, tries)
        wider += _ROUNDINGS_OF_ALL * unit * want.abs().max()
        wider = torch.where(spread.jumps(name, tries), torch.inf, wider)
        if bool((error <= wider).all()):
            return None
        if hasty and bool((error > _HOPELESS * wider).any()):
            break
    excess = float((error / wider).max())
    return Fault(name, "off", excess, float(error.max() / want.abs().max().clamp(min=1e-300)))


def _row_max(tensor: Tensor) -> Tensor:
    return tensor.amax(-1, keepdim=True) if tensor.dim() > 1 else tensor.max()


class _Spread:
    """How far the reference moves under units of rounding, row by row, as far as asked for."""

    def __init__(self, wanted: Results, again: Again, unit: float):
        self.wanted, self.again, self.unit = wanted, again, unit
        self.near: list[Results] = []
        self.far: list[Results] = []

    def of(self, name: str, tries: int) -> Tensor:
        """Movement under one unit."""
        while len(self.near) < tries:
            self.near.append(self.again(self.unit, len(self.near)))
        return self._largest(name, self.near)

    def jumps(self, name: str, tries: int) -> Tensor:
        """Where a step of several units meets a jump, so that nothing near it can be judged."""
        while len(self.far) < tries:
            self.far.append(self.again(_STRIDE * self.unit, len(self.far)))
        wide, narrow = self._largest(name, self.far), self._largest(name, self.near)
        floor = _STRIDE * self.unit * _row_max(self.wanted[name].abs())
        return wide > _JUMP * (_STRIDE * narrow + floor)

    def overflows(self, name: str, largest: float) -> Tensor:
        """Where a few units of rounding leave the range of a dtype."""
        want = self.wanted[name]
        return want.abs() + _MOVEMENTS * self.of(name, 1) >= largest

    def _largest(self, name: str, results: list[Results]) -> Tensor:
        want = self.wanted[name]
        moved = torch.stack([(each[name] - want).abs().nan_to_num(0.0) for each in results])
        return _row_max(moved.amax(0))
