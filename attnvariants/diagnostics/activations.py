"""Figures of hidden states: kurtosis, largest and massive activations, the first token's norm."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from attnvariants.diagnostics.definitions import MASSIVE_RATIO, MASSIVE_SIZE


@dataclass(frozen=True)
class ActivationMetrics:
    """Figures of one hidden state of a model; `DEFINITIONS` defines them."""

    kurtosis: float
    kurtosis_pooled: float
    max_abs: float
    largest: float
    massive: float
    first_token_ratio: float

    def figures(self) -> dict[str, float]:
        """Name to number."""
        return asdict(self)


@dataclass
class Moments:
    """Count, mean and sums of central powers, which merge exactly (Pebay, 2008)."""

    count: float = 0.0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of a float64 tensor."""
        if not x.numel():
            return cls()
        mean = x.mean()
        d = x - mean
        square = d * d
        powers = square.sum(), (square * d).sum(), (square * square).sum()
        return cls(x.numel(), float(mean), *(float(p) for p in powers))

    def merge(self, other: Moments) -> Moments:
        """The moments of both samples together."""
        if not self.count or not other.count:
            return self if self.count else other
        a, b, n = self.count, other.count, self.count + other.count
        d = other.mean - self.mean
        second = self.second + other.second + d**2 * a * b / n
        third = self.third + other.third + d**3 * a * b * (a - b) / n**2
        third += 3 * d * (a * other.second - b * self.second) / n
        fourth = self.fourth + other.fourth + d**4 * a * b * (a * a - a * b + b * b) / n**3
        fourth += 6 * d**2 * (a * a * other.second + b * b * self.second) / n**2
        fourth += 4 * d * (a * other.third - b * self.third) / n
        return Moments(n, self.mean + d * b / n, second, third, fourth)

    @property
    def kurtosis(self) -> float:
        """Pearson's: fourth central moment over squared variance; 0 for constants."""
        return self.count * self.fourth / self.second**2 if self.second > 0 else 0.0


class ActivationSums:
    """Sums over batches of one hidden state, from which `metrics` makes its figures."""

    def __init__(self) -> None:
        self.moments = Moments()
        self._totals = {"kurtosis": 0.0, "max_abs": 0.0, "massive": 0.0, "ratio": 0.0}
        self._sequences = self._ratios = 0
        self._largest = 0.0

    def add(self, hidden: Tensor, token_mask: Tensor | None = None) -> None:
        """Add hidden states `[batch, tokens, dim]`; `token_mask` `[batch, tokens]` as in
        `activation_metrics`.

        Raises:
            ValueError: a shape or dtype is out of the contract, or a number is not finite.
        """
        if hidden.dim() != 3 or not hidden.is_floating_point():
            raise ValueError(
                "hidden must be floating point with shape [batch, tokens, dim], "
                f"got {hidden.dtype} with {list(hidden.shape)}."
            )
        if token_mask is not None and (
            token_mask.dtype != torch.bool or token_mask.shape != hidden.shape[:2]
        ):
            raise ValueError(
                f"token_mask must be bool with shape [batch, tokens] = {list(hidden.shape[:2])}, "
                f"got {token_mask.dtype} with {list(token_mask.shape)}."
            )
        for index, states in enumerate(hidden.detach()):
            if token_mask is not None:
                states = states[token_mask[index].to(states.device)]
            if states.numel():
                self._add_sequence(states.cpu().double())

    def _add_sequence(self, states: Tensor) -> None:
        if not bool(torch.isfinite(states).all()):
            raise ValueError("hidden states hold NaN or infinity; there is nothing to measure.")
        size = states.abs()
        moments = Moments.of(states)
        self.moments = self.moments.merge(moments)
        self._sequences += 1
        variance = moments.second / max(moments.count - 1, 1)
        largest = float(size.max())
        self._largest = max(self._largest, largest)
        bar = max(MASSIVE_SIZE, MASSIVE_RATIO * float(size.median()))
        self._totals["kurtosis"] += moments.fourth / moments.count / (variance**2 + 1e-6)
        self._totals["max_abs"] += largest
        self._totals["massive"] += int(((size > MASSIVE_SIZE) & (size >= bar)).sum())
        norms = states.norm(dim=-1)
        if len(norms) > 1 and float(norms[1:].max()) > 0:
            self._ratios += 1
            self._totals["ratio"] += float(norms[0] / norms[1:].max())

    def metrics(self) -> ActivationMetrics:
        """The figures of all batches added.

        Raises:
            ValueError: nothing was added.
        """
        if not self._sequences:
            raise ValueError("ActivationSums holds no sequence; call add first.")
        count = self._sequences
        return ActivationMetrics(
            kurtosis=self._totals["kurtosis"] / count,
            kurtosis_pooled=self.moments.kurtosis,
            max_abs=self._totals["max_abs"] / count,
            largest=self._largest,
            massive=self._totals["massive"] / count,
            first_token_ratio=self._totals["ratio"] / max(self._ratios, 1),
        )


def activation_metrics(hidden: Tensor, token_mask: Tensor | None = None) -> ActivationMetrics:
    """Figures of hidden states.

    Args:
        hidden: `[batch, tokens, dim]`, floating point.
        token_mask: `[batch, tokens]` bool, True for tokens that count; default all.

    Raises:
        ValueError: a shape or dtype is out of the contract, or no token counts.
    """
    sums = ActivationSums()
    sums.add(hidden, token_mask)
    return sums.metrics()
