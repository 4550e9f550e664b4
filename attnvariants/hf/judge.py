"""Whether the figures of a self-test are those of a mask that arrives."""

from __future__ import annotations

from dataclasses import dataclass

NEARLY_CAUSAL = 1e-5


@dataclass(frozen=True)
class Figures:
    """What a model's own run, or its patched one, gave; see `Verification`."""

    finite: bool
    leak: float | None = None
    padding: float | None = None
    hidden: float | None = None
    cache: float | None = None
    cache_note: str = ""
    packed: float | None = None


def judge_leak(patched: Figures, base: Figures, slack: float) -> tuple[float | None, str]:
    """The leak, unless the unpatched model leaks itself.

    Raises:
        ValueError: the figure is too large.
    """
    if patched.leak is None or base.leak is None:
        return None, "no tokens to change, or no output for each of them"
    if base.leak > NEARLY_CAUSAL:
        return None, f"the unpatched model is not causal: it changes by {base.leak:.3g}"
    if patched.leak > max(10 * base.leak, slack):
        raise ValueError(
            f"verify: a future token changes outputs before it by {patched.leak:.3g} of the "
            f"largest output, where the unpatched model changes by {base.leak:.3g}; the mask does "
            "not reach the patched modules."
        )
    return patched.leak, "change of outputs before a changed token"


def judge_padding(patched: Figures, base: Figures, tolerance: float) -> tuple[float | None, str]:
    """The difference of a padded row, unless the unpatched model differs too.

    Raises:
        ValueError: the figure is too large.
    """
    if patched.padding is None or base.padding is None:
        return None, "no left-padded batch of tokens"
    if base.padding > tolerance:
        return None, f"the unpatched model differs by {base.padding:.3g} itself"
    if not patched.padding <= tolerance:
        raise ValueError(
            f"verify: a left-padded row differs from the unpadded one by {patched.padding:.3g} of "
            f"the largest output, more than {tolerance:g}; the unpatched model differs by "
            f"{base.padding:.3g}. The padding mask does not reach the patched modules, or the "
            "variant counts hidden keys."
        )
    return patched.padding, "left-padded row against the unpadded one"


def judge_hidden(patched: Figures, base: Figures, slack: float) -> tuple[float | None, str]:
    """The change by hidden tokens, unless they change the unpatched model.

    Raises:
        ValueError: the figure is too large.
    """
    if patched.hidden is None or base.hidden is None:
        return None, "no left-padded batch of tokens"
    if base.hidden > NEARLY_CAUSAL:
        return None, f"the unpatched model changes by {base.hidden:.3g} itself"
    if patched.hidden > max(10 * base.hidden, slack):
        raise ValueError(
            f"verify: tokens that the padding mask hides change outputs by {patched.hidden:.3g} of "
            f"the largest output, where the unpatched model changes by {base.hidden:.3g}; the "
            "padding mask does not reach the patched modules."
        )
    return patched.hidden, "change of outputs when hidden tokens change"


def judge_cache(patched: Figures, base: Figures, tolerance: float) -> tuple[float | None, str]:
    """The difference of a cache, unless the unpatched model's differs too.

    Raises:
        ValueError: the figure is too large.
    """
    if base.cache is None or patched.cache is None:
        return None, base.cache_note or patched.cache_note
    if base.cache > tolerance:
        return None, f"the unpatched model differs by {base.cache:.3g} itself"
    if not patched.cache <= tolerance:
        raise ValueError(
            f"verify: outputs with a cache differ by {patched.cache:.3g} of the largest from those "
            f"without, more than {tolerance:g} ({patched.cache_note}); the unpatched model differs "
            f"by {base.cache:.3g}. The mask is aligned otherwise, or the variant counts keys that "
            "are not filled yet."
        )
    return patched.cache, patched.cache_note


def judge_packed(patched: Figures, base: Figures, tolerance: float) -> tuple[float | None, str]:
    """The difference of a packed document, unless the unpatched model's differs too.

    Raises:
        ValueError: the figure is too large.
    """
    if base.packed is None or patched.packed is None:
        return None, "no positions of tokens to start again"
    if base.packed > tolerance:
        return None, f"the unpatched model differs by {base.packed:.3g} itself"
    if not patched.packed <= tolerance:
        raise ValueError(
            f"verify: a packed document differs from the same one alone by {patched.packed:.3g} "
            f"of the largest output, more than {tolerance:g}; the unpatched model differs by "
            f"{base.packed:.3g}. The mask does not keep documents apart in the patched modules."
        )
    return patched.packed, "a packed document against the same one alone"
