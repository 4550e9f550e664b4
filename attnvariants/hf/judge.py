"""Whether the figures of a self-test are those of a mask that arrives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnvariants.hf.measure import Part
from attnvariants.hf.outputs import sentence
from attnvariants.hf.reasons import InapplicableError, UnavailableError, VanishedError

NEARLY_CAUSAL = 1e-5
# In float64 a change below this is rounding, and one above it is not.
EXACT = 1e-9
# What must be equal in float64, whatever the model's own precision.
CLOSE = 1e-4
# Between what a note says was compared and what does not apply.
NOT_SO = "; not applicable: "


@dataclass(frozen=True)
class Test:
    """How a test is named and judged.

    Attributes:
        title: in reports.
        exact: whether the figure must be what rounding leaves, else within the tolerance.
        own: what is wrong with an unpatched model that fails it.
        accusation: what is wrong with a patched one; takes got, own, limit and what.
    """

    title: str
    exact: bool
    own: str
    accusation: str


_BEYOND = "of the largest output, more than {limit:g}; the unpatched model differs by {own:.3g}. "
_PADDED = (
    "row differs from the unpadded one by {got:.3g} "
    + _BEYOND
    + "The padding mask does not reach the patched modules, or the variant counts hidden keys."
)
TESTS = {
    "leak": Test(
        "future leak",
        True,
        "the unpatched model is not causal: it changes by {own:.3g}",
        "a future token changes outputs before it by {got:.3g} of the largest output, where the "
        "unpatched model changes by {own:.3g}; the mask does not reach the patched modules.",
    ),
    "padding": Test("left padding", False, "", f"a left-padded {_PADDED}"),
    "right_padding": Test("right padding", False, "", f"a right-padded {_PADDED}"),
    "hidden": Test(
        "hidden tokens",
        True,
        "hidden tokens change the unpatched model by {own:.3g} itself",
        "tokens that the padding mask hides change outputs by {got:.3g} of the largest output "
        "({what}), where the unpatched model changes by {own:.3g}; the padding mask does not reach "
        "the patched modules.",
    ),
    "cache": Test(
        "cache",
        False,
        "",
        "outputs with a cache differ by {got:.3g} from those without ({what}), relative to the "
        "largest output, more than {limit:g}; the unpatched model differs by {own:.3g}. The mask "
        "is aligned otherwise, or the variant counts keys that are not filled yet.",
    ),
    "packed": Test(
        "packed documents",
        False,
        "the unpatched model mixes documents itself: they differ by {own:.3g}",
        "a packed document differs from the same one alone by {got:.3g} "
        + _BEYOND
        + "The mask does not keep documents apart in the patched modules.",
    ),
}

Measured = float | Exception
Precisely = Callable[[int], tuple[Measured, Measured]]


@dataclass(frozen=True)
class Judge:
    """Judges the figures of one verification.

    Attributes:
        tolerance: of what must be equal up to rounding.
        half: whether the model computes in half precision.
        shared: whether sums are shared between rows, so that rounding differs where tokens do.
        precisely: gives a part's figures of the unpatched and the patched model in float64;
            raises UnavailableError where they cannot be had.
    """

    tolerance: float
    half: bool
    shared: bool
    precisely: Precisely

    def judge(
        self, test: str, entries: list[tuple[int, Part, Measured, Measured | None]]
    ) -> tuple[float | None, str]:
        """The largest figure of a test, and what was compared or why it does not apply.

        Args:
            test: its name.
            entries: of each part its place, itself, and its figures unpatched and patched.

        Raises:
            ValueError: a figure is too large.
        """
        figures: list[float] = []
        compared: list[str] = []
        not_so: list[str] = []
        for place, part, own, got in entries:
            if isinstance(own, VanishedError):
                raise own
            if isinstance(own, Exception):
                not_so.append(_why(part, own))
                continue
            if isinstance(got, Exception) or got is None:
                # a run that any model with a cache makes says so around what was raised
                error = getattr(got, "__cause__", None) or got
                raise ValueError(
                    f"verify: with {part.what} the patched model raises "
                    f"{sentence(error) if error is not None else 'nothing'}, where the unpatched "
                    "one runs."
                )
            value, note = self._one(TESTS[test], place, part, own, got)
            if value is None:
                not_so.append(note)
            else:
                figures.append(value)
                compared.append(note)
        lacking = "; ".join(dict.fromkeys(not_so))
        if not figures:
            return None, lacking
        note = ", ".join(dict.fromkeys(compared))
        return max(figures), note + NOT_SO + lacking if lacking else note

    def _one(
        self, test: Test, place: int, part: Part, own: float, got: float
    ) -> tuple[float | None, str]:
        own_limit = NEARLY_CAUSAL if test.exact else self.tolerance
        limit = 10 * own if test.exact else self.tolerance
        # a model that changes by more has no causality or padding to keep
        plausible = own <= (0.1 if self.half else 1e-3)
        if own <= own_limit and got <= limit:
            return got, part.what
        note, added = part.what, ""
        if plausible or own <= own_limit:
            try:
                exact_own, exact_got = self.precisely(place)
                for figure in (exact_own, exact_got):
                    if isinstance(figure, Exception):
                        raise UnavailableError(sentence(figure))
            except UnavailableError as why:
                added = f" It cannot be told from rounding in float64: {why}."
                if test.exact and self.shared:
                    limit = max(limit, self.tolerance)
                    note += f" at a tolerance of {limit:g}, as float64 cannot tell rounding: {why}"
            else:
                assert isinstance(exact_own, float)
                assert isinstance(exact_got, float)
                note += f" in float64, where rounding does not show ({got:.3g} otherwise)"
                own, got = exact_own, exact_got
                limit = max(10 * own, EXACT) if test.exact else min(self.tolerance, CLOSE)
                own_limit = NEARLY_CAUSAL if test.exact else limit
        if not own <= own_limit:
            return None, (
                test.own or "{what}: the unpatched model differs by {own:.3g} itself"
            ).format(own=own, what=part.what)
        if not got <= limit:
            accusation = test.accusation.format(got=got, own=own, limit=limit, what=part.what)
            raise ValueError(f"verify: {accusation}{added}")
        return got, note


def _why(part: Part, own: Exception) -> str:
    if isinstance(own, InapplicableError):
        return str(own)
    return f"with {part.what} the unpatched model raises {sentence(own)}"
