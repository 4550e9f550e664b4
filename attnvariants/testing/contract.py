"""The conformance suite: every part of the contract, for any variant and engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants.api import attention
from attnvariants.registry import Variant, get_variant

# Errors are relative to the largest entry, or to 1 where that is smaller.
_FLOOR = 1.0


class Cell(NamedTuple):
    """What one part of the contract came to.

    Attributes:
        case: its name in `CASES`.
        tensor: "out", or the input whose gradient it is.
        error: largest difference to the float64 reference, relative to its largest entry (or to 1
            where that is smaller); NaN if the result is not finite.
    """

    case: str
    tensor: str
    error: float


class Report(NamedTuple):
    """All cells of a run, and the cases that the variant has no meaning for."""

    cells: list[Cell]
    refused: list[str]

    @property
    def worst(self) -> Cell:
        """The cell with the largest error."""
        return max(self.cells, key=lambda cell: cell.error if cell.error == cell.error else 1e30)

    def __str__(self) -> str:
        refused = f"; refused: {', '.join(self.refused)}" if self.refused else ""
        worst = self.worst
        return (
            f"{len(self.cells)} results, worst {worst.error:.1e} ({worst.tensor} of "
            f"{worst.case}){refused}"
        )


def random(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal float64 numbers, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    q_len: int = 7,
    kv_len: int = 7,
    dim: int = 8,
    value_dim: int = 8,
    seed: int = 0,
    size: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, float64, standard normal times `size`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * size

    return (
        normal(batch, heads, q_len, dim),
        normal(batch, kv_heads, kv_len, dim),
        normal(batch, kv_heads, kv_len, value_dim),
    )


def pad(*lengths_of: int, kv_len: int, left: bool) -> Tensor:
    """Key-padding mask [batch, 1, 1, kv_len] of sequences of these lengths."""
    keep = torch.zeros(len(lengths_of), 1, 1, kv_len, dtype=torch.bool)
    for row, length in enumerate(lengths_of):
        keep[row, ..., kv_len - length :] = left
        keep[row, ..., :length] |= not left
    return keep


def dead_rows(q_len: int, kv_len: int) -> Tensor:
    """A random mask [2, 2, q_len, kv_len] with rows that see nothing."""
    keep = random(2, 2, q_len, kv_len, seed=5) > 0
    keep[0, 0, 2] = False
    keep[1, :, 0] = False
    return keep


# name: (sizes of `make_inputs`, arguments of `attention`)
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "full": ({}, {}),
    "causal": ({}, {"causal": True}),
    "cache": ({"q_len": 3}, {"causal": True}),
    "decode": ({"q_len": 1}, {"causal": True}),
    "more_queries": ({"q_len": 9, "kv_len": 5}, {"causal": True}),
    "length_one": ({"q_len": 1, "kv_len": 1}, {"causal": True}),
    "window": ({"q_len": 8, "kv_len": 11}, {"window_size": (2, 1)}),
    "causal_window": ({"q_len": 9, "kv_len": 9}, {"window_size": (3, 0), "causal": True}),
    "left_window": ({"q_len": 9, "kv_len": 4}, {"window_size": (1, -1)}),
    "left_pad": ({}, {"attn_mask": pad(7, 3, kv_len=7, left=True), "causal": True}),
    "right_pad": ({}, {"attn_mask": pad(4, 7, kv_len=7, left=False)}),
    "mask": ({}, {"attn_mask": dead_rows(7, 7)}),
    "mask_heads_window": (
        {"q_len": 5},
        {"attn_mask": dead_rows(5, 7)[:1], "causal": True, "window_size": (3, -1)},
    ),
    "float_mask": (
        {},
        {"attn_mask": random(1, 2, 7, 7).masked_fill(~dead_rows(7, 7)[:1], -torch.inf)},
    ),
    "bias": ({"q_len": 4}, {"bias": random(2, 2, 4, 7), "causal": True}),
    "bias_broadcast": ({}, {"bias": random(1, 2, 1, 7)}),
    "alibi": ({"q_len": 5}, {"alibi_slopes": random(2).abs(), "causal": True}),
    "alibi_batch": ({}, {"alibi_slopes": random(2, 2).abs()}),
    "softcap": ({}, {"softcap": 1.5, "causal": True}),
    "gqa": ({"heads": 6, "kv_heads": 2, "q_len": 5}, {"causal": True}),
    "mqa": ({"heads": 3, "kv_heads": 1}, {"attn_mask": dead_rows(7, 7)[:, :1]}),
    "value_dim": ({"dim": 6, "value_dim": 3}, {"causal": True}),
    "scale": ({}, {"scale": 0.7}),
    "together": (
        {"heads": 4, "q_len": 5, "kv_len": 8, "value_dim": 5},
        {
            "causal": True,
            "window_size": (5, 0),
            "softcap": 2.0,
            "bias": random(2, 4, 5, 8),
            "attn_mask": random(2, 1, 1, 8, seed=3) > -1,
            "scale": 0.4,
        },
    ),
}
# as `CASES`, of several tiles in every direction where tiles are what engines work in
TILED_CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tiles": ({"batch": 1, "q_len": 77, "kv_len": 150, "dim": 20}, {"causal": True}),
    "tiles_gqa": (
        {"batch": 1, "heads": 4, "q_len": 150, "kv_len": 70, "dim": 16, "value_dim": 24},
        {"window_size": (40, 9)},
    ),
    "tiles_mask": (
        {"q_len": 33, "kv_len": 129, "dim": 16},
        {"attn_mask": random(2, 2, 33, 129, seed=4) > 1, "softcap": 3.0},
    ),
}


def refused(variant: Variant, call: Mapping[str, Any]) -> list[str]:
    """Parts of a call that the variant has no meaning for."""
    mask = call.get("attn_mask")
    float_mask = mask is not None and mask.dtype != torch.bool
    return [f for f in variant.refuses if f in call or (f == "bias" and float_mask)]


def conformance(
    variant: str | Variant,
    *,
    impl: str = "triton",
    tolerance: float = 1e-5,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    cases: Iterable[str] | None = None,
    **options: Any,
) -> Report:
    """Output and all gradients of each case against the dense reference in float64.

    Args:
        variant: a name or a Variant; its `ratio` is the reference.
        impl: the engine under test.
        tolerance: largest error allowed; see `Cell`.
        dtype: of the tensors that the engine gets; the reference gets the same numbers.
        device: where the engine runs.
        cases: names in `CASES` and `TILED_CASES`; None for all.
        options: the variant's own.

    Returns:
        A `Report`; `str` of it is one line.

    Raises:
        AssertionError: results that are off by more than `tolerance` or not finite, all listed.
        ValueError: the engine cannot run the variant at all.
    """
    variant = get_variant(variant)
    every = {**CASES, **TILED_CASES}
    report = Report([], [])
    for case in every if cases is None else cases:
        sizes, call = every[case]
        if refused(variant, call):
            report.refused.append(case)
            continue
        report.cells.extend(_cells(variant, case, sizes, call, impl, dtype, device, options))
    bad = [cell for cell in report.cells if not cell.error <= tolerance]
    if bad:
        lines = "\n".join(f"  {cell.tensor} of {cell.case}: {cell.error:.1e}" for cell in bad)
        raise AssertionError(
            f"{variant.name or 'the variant'} by impl={impl!r} differs from its reference by more "
            f"than {tolerance:.0e}:\n{lines}"
        )
    return report


def _cells(
    variant: Variant,
    case: str,
    sizes: dict[str, int],
    call: dict[str, Any],
    impl: str,
    dtype: torch.dtype,
    device: str | torch.device,
    options: dict[str, Any],
) -> list[Cell]:
    leaves = dict(zip(("query", "key", "value"), make_inputs(**sizes), strict=True))
    leaves |= {name: call[name] for name in ("bias", "alibi_slopes") if name in call}
    rest = {name: item for name, item in call.items() if name not in leaves} | options

    def cast(item: Any, to: torch.dtype) -> Any:
        if not isinstance(item, Tensor):
            return item
        # both get the numbers that `dtype` can hold
        item = item.to(dtype).to(to) if item.is_floating_point() else item
        return item.to(device)

    def run(engine: str, to: torch.dtype) -> list[Tensor]:
        tensors = {name: cast(item, to).requires_grad_() for name, item in leaves.items()}
        others = {name: cast(item, to) for name, item in rest.items()}
        out = attention(**tensors, variant=variant, impl=engine, **others)
        cotangent = cast(random(*out.shape, seed=9), to)
        inputs = list(tensors.values())
        grads = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
        return [
            out.detach(),
            *(
                torch.zeros_like(x) if grad is None else grad
                for x, grad in zip(inputs, grads, strict=True)
            ),
        ]

    wanted = run("reference", torch.float64)
    found = run(impl, dtype)
    cells = []
    for name, got, want in zip(("out", *leaves), found, wanted, strict=True):
        size = max(_FLOOR, float(want.abs().max())) if want.numel() else 1.0
        error = float((got.double() - want).abs().max()) / size if want.numel() else 0.0
        cells.append(Cell(case, name, error))
    return cells
