"""What `bench.gpu` measures: the variants, the shapes, and the order in which they matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import attnvariants

# Passes over the keys of the forward: what a variant may be compared with.
ONE_PASS, POINTWISE, TWO_SWEEP, THRESHOLD, LINEAR = (
    "one-pass", "pointwise", "two-sweep", "threshold", "linear",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A row of the tables: one of our variants, or a peer where `variant` is empty."""

    name: str
    family: str
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    scores: str = "gaussian"


OURS = (
    Case("softmax", ONE_PASS, "softmax"),
    Case("softpick", ONE_PASS, "softpick"),
    Case("ssmax", ONE_PASS, "ssmax"),
    Case("lssa", ONE_PASS, "lssa"),
    Case("sa_softmax x", ONE_PASS, "sa_softmax", {"form": "x"}),
    Case("relu", POINTWISE, "relu"),
    Case("sigmoid", POINTWISE, "relu", {"act": "sigmoid", "power": 0.0}),
    Case("lssar", TWO_SWEEP, "lssar"),
    Case("sa_softmax minmax0", TWO_SWEEP, "sa_softmax"),
    Case("sparsemax peaked", THRESHOLD, "sparsemax", scores="peaked"),
    Case("cosformer", LINEAR, "cosformer"),
    Case("sparsemax", THRESHOLD, "sparsemax"),
)

FLASH, CUDNN, ORIGINAL_SOFTPICK = "SDPA flash", "SDPA cuDNN", "softpick original"
BASELINES = (Case(FLASH, "peer"), Case(CUDNN, "peer"))
PEERS = (
    Case(ORIGINAL_SOFTPICK, "peer"),
    Case("flash-attn 2", "peer"),
    Case("flash-attn 3", "peer"),
    Case("FLA", "peer"),
    Case("triton-sigmoid", "peer"),
    Case("adasplash-2 entmax 1.5", "peer", scores="peaked"),
    Case("adasplash-1 sparsemax", "peer", scores="peaked"),
)
# One compilation a shape, so they come last outside of the first length.
FLEX = (Case("FlexAttention", "peer"), Case("FlexAttention ssmax", "peer"))


def known():
    """All cases by name; a registered variant that is not listed above gets a plain one."""
    listed = {case.variant for case in OURS}
    others = [n for n in attnvariants.list_variants() if n not in listed]
    more = tuple(
        Case(n, "other", n) for n in others if getattr(attnvariants.get_variant(n), "hooks", None)
    )
    return {case.name: case for case in (*BASELINES, *OURS, *more, *PEERS, *FLEX)}


class Shape(NamedTuple):
    """Sizes of one call, query and key alike."""

    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool

    @property
    def flop(self):
        """Multiplications and additions of a dense forward, half of them if causal."""
        full = 4 * self.batch * self.heads * self.length**2 * self.head_dim
        return full / 2 if self.causal else full


def tflops(shape, direction, milliseconds):
    """TFLOP/s as if dense, the backward being 2.5 forwards, as FlashAttention counts."""
    return shape.flop * (2.5 if direction == "backward" else 1.0) / milliseconds / 1e9


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; lengths and head_dims with the most important first."""

    tokens: int = 16384
    width: int = 2048
    head_dims: tuple[int, ...] = (128, 64)
    lengths: tuple[int, ...] = (8192, 4096, 16384, 2048, 1024, 512)
    long: tuple[int, ...] = (65536, 131072)
    accuracy: tuple[int, int, int] = (1, 4, 1024)
    accuracy_dtypes: tuple[str, ...] = ("bfloat16", "float16")

    def shape(self, head_dim, length, causal):
        """The shape of that length; the batch fills it up to the number of tokens."""
        batch = max(1, self.tokens // length)
        return Shape(batch, self.width // head_dim, length, head_dim, causal)


DRY = Plan(128, 32, (16, 8), (64, 32, 128), (256,), (1, 2, 64))


def timing_order(plan, cases):
    """(case, shape) pairs, the most important first; the baselines begin every shape."""
    flex = {case.name for case in FLEX}
    main = [c for c in cases.values() if c.name not in flex]
    long = [
        c
        for c in main
        if c.family in (THRESHOLD, LINEAR) or c.name in (FLASH, CUDNN) or "adasplash" in c.name
    ]
    late = [c for c in cases.values() if c.name in flex]
    first, rest = plan.lengths[:3], plan.lengths[3:]
    wide, narrow = plan.head_dims[:1], plan.head_dims[1:]

    def block(head_dims, lengths, chosen, masks=(True, False)):
        shapes = [plan.shape(d, n, m) for n in lengths for d in head_dims for m in masks]
        return [(case, shape) for shape in shapes for case in chosen]

    return [
        *block(wide, first, main),
        *block(wide, plan.long, long, (True,)),
        *block(narrow, first, main),
        *block(plan.head_dims, first[:1], late),
        *block(wide, rest, main),
        *block(narrow, rest, main),
        *block(narrow, plan.long, long, (True,)),
        *block(wide, plan.long, long, (False,)),
        *block(wide, (*first[1:], *rest), late),
        *block(narrow, (*first[1:], *rest), late),
        *block(narrow, plan.long, long, (False,)),
    ]


def warm_order(plan, cases):
    """(case, shape) pairs that compile every kernel once, as small and as large as the run."""
    flex = {case.name for case in FLEX}
    ends = (min(plan.lengths), max(plan.lengths))
    pairs = [
        (case, plan.shape(head_dim, length, causal))
        for length in ends
        for head_dim in plan.head_dims
        for causal in (True, False)
        for case in cases.values()
        if case.name not in flex
    ]
    return pairs + [
        (cases[name], plan.shape(head_dim, plan.lengths[0], causal))
        for name in flex & set(cases)
        for head_dim in plan.head_dims
        for causal in (True, False)
    ]
