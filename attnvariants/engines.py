"""Which engine runs a call, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# batching registers the operators' vmap rules
from attnvariants import batching, chunked, chunked_ops, context, fused, reference, sdpa  # noqa: F401
from attnvariants.problem import Problem, RowStats
from attnvariants.registry import suggest
from attnvariants.scalars import in_words

ENGINES = ("auto", "reference", "chunked", "triton", "sdpa")

# "auto" builds no mask of more scores than this for torch's SDPA, which keeps it whole.
_MASK_SCORES = 1 << 26


@dataclass(frozen=True)
class Explanation:
    """Which engine runs a call, and why the others do not; `str` of it is a small table.

    Attributes:
        engine: the one that runs; "none" where the `impl` that was asked for cannot.
        reasons: of every engine why it runs or does not.
    """

    engine: str
    reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"engine: {self.engine}"]
        for engine, reasons in self.reasons.items():
            lines.append(f"  {engine:9s} {'; '.join(reasons)}")
        return "\n".join(lines)


def check_impl(impl: str) -> str:
    """`impl` if there is such an engine.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(impl, str) or impl not in ENGINES:
        raise ValueError(f"unknown impl {in_words(impl)}; {suggest(str(impl), ENGINES)}")
    return impl


def choose(impl: str, query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> str:
    """The engine of a call, given as it came, not yet prepared.

    Raises:
        ValueError: `impl` names an engine that cannot run it; all reasons are listed.
    """
    if impl in _WHY_NOT:
        reasons = _WHY_NOT[impl](query, key, value, problem)
        if reasons:
            listed = "; ".join(f"({i}) {reason}" for i, reason in enumerate(reasons, 1))
            any_call = "reference" if _against_chunked(query, key, value, problem) else "chunked"
            raise ValueError(
                f"impl={impl!r} cannot run this call: {listed}. Use impl={any_call!r}, which runs "
                "any, or impl='auto'."
            )
        return impl
    if impl != "auto":
        return impl
    if not against_triton(query, key, value, problem):
        return "triton"
    if not _against_sdpa(query, key, value, problem):
        return "sdpa"
    return "reference" if _against_chunked(query, key, value, problem) else "chunked"


def reasons_of(
    impl: str, query: Tensor, key: Tensor, value: Tensor, problem: Problem
) -> Explanation:
    """What `choose` would say, with the reasons of every engine."""
    call = query, key, value, problem
    cannot = {engine: why(*call) for engine, why in _WHY_NOT.items()}
    if impl != "auto":
        engine = "none" if cannot.get(impl) else impl
        others = {name: cannot.get(name) or [f"impl is {impl!r}"] for name in ENGINES[1:]}
        others[impl] = cannot.get(impl) or ["asked for"]
        return Explanation(engine, {name: tuple(why) for name, why in others.items()})
    reasons = {
        "reference": ["it keeps all scores in memory: for what no other engine can run"],
        "chunked": _against_chunked(*call)
        or ["it runs any call, and none that another one runs faster"],
        "triton": against_triton(*call),
        "sdpa": _against_sdpa(*call),
    }
    engine = choose("auto", *call)
    if engine == "triton":
        reasons["triton"] = ["chosen: fused kernels have all of this call"]
        reasons["sdpa"] = reasons["sdpa"] or ["fused kernels come first"]
    elif engine == "sdpa":
        reasons["sdpa"] = ["chosen: the weights are a softmax, and torch's kernel is faster"]
    elif engine == "reference":
        reasons["reference"] = ["chosen: it is plain torch, which keeps all scores in memory"]
    else:
        reasons["chunked"] = ["chosen: it runs any call"]
    return Explanation(engine, {name: tuple(why) for name, why in reasons.items()})


def run(engine: str, query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """The output of a prepared call by an engine."""
    if engine == "reference":
        return reference.attention(query, key, value, problem)[0]
    if engine == "chunked":
        return _chunked(query).attention(query, key, value, problem)
    if engine == "sdpa":
        return sdpa.attention(query, key, value, problem)
    return fused.attention(query, key, value, problem)


def weights_and_stats(
    query: Tensor, key: Tensor, problem: Problem, want_weights: bool, want_stats: bool
) -> tuple[Tensor | None, RowStats | None]:
    """Dense weights as applied and row statistics of a prepared call, without a gradient."""
    if _against_chunked(query, key, key, problem):
        return reference.weights_and_stats(query, key, problem, want_weights, want_stats)
    return _chunked(query).weights_and_stats(query, key, problem, want_weights, want_stats)


def _chunked(query: Tensor) -> Any:
    """The chunked engine, as operators where a call is recorded or has shapes alone."""
    recorded = context.recorded() or context.shapes_alone(query)
    return chunked_ops if recorded else chunked


def _against_chunked(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> list[str]:
    """Why the chunked engine cannot run a call."""
    reason = context.plain_torch_alone(query, key, value, *_tensors(problem))
    return [] if reason is None else [reason]


def _tensors(problem: Problem) -> list[Tensor | None]:
    return [problem.bias, problem.slopes, *problem.learned.values()]


def against_triton(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> list[str]:
    """Why "auto" does not take the fused kernels."""
    if query.device.type != "cuda":
        # the interpreter is for tests
        return [f"query is on {query.device.type} and the kernels need cuda"]
    return _not_kernels(query, key, value, problem)


def _against_sdpa(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> list[str]:
    """Why "auto" does not take SDPA."""
    reasons = sdpa.why_not(query, key, value, problem)
    reasons = reasons or _against_chunked(query, key, value, problem)
    if reasons:
        return reasons
    size = sdpa.mask_size(problem)
    if query.device.type == "cuda":
        return [f"a mask of {size} scores would have to be built"] if size > _MASK_SCORES else []
    if query.device.type != "cpu":
        return [f"on {query.device.type} it has not been measured"]
    # there it was measured faster for plain calls, and not for others
    if query.dtype not in (torch.float32, torch.float64):
        reasons.append(f"on a CPU query is {query.dtype}")
    if problem.keep is not None or problem.bias is not None or size:
        reasons.append("on a CPU the call is more than causal: it needs a mask")
    if query.shape[3] != value.shape[3]:
        reasons.append("on a CPU query and value differ in head_dim")
    if not key.shape[2]:
        reasons.append("there are no keys")
    return reasons


def _not_kernels(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> list[str]:
    """Why the fused kernels cannot run a call."""
    reasons = fused.why_not(query, key, value, problem)
    beyond = context.beyond_operators(query, key, value, *_tensors(problem))
    return reasons if beyond is None else [*reasons, beyond]


def _not_sdpa(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> list[str]:
    """Why torch's SDPA cannot run a call."""
    reasons = sdpa.why_not(query, key, value, problem)
    # compiled, it is an operator of torch like any other
    compiling = torch.compiler.is_compiling()
    beyond = None if compiling else context.beyond_operators(query, key, value, *_tensors(problem))
    return reasons if beyond is None else [*reasons, beyond]


_WHY_NOT: dict[str, Callable[[Tensor, Tensor, Tensor, Problem], list[str]]] = {
    "chunked": _against_chunked,
    "triton": _not_kernels,
    "sdpa": _not_sdpa,
}
