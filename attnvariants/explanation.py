"""Why a call runs on the engine it runs on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnvariants import engines
from attnvariants.autocast import autocast_inputs, no_autocast
from attnvariants.engines import Explanation
from attnvariants.problem import build
from attnvariants.registry import CALL_ARGUMENTS, Variant, get_variant
from attnvariants.scalars import check_flag
from attnvariants.varlen import bounds_of, pack, packed_problem, sequence

_PACKED = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
_RETURNS = "return_weights", "return_stats"


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: str | Variant = "softmax",
    *,
    impl: str = "auto",
    **call: Any,
) -> Explanation:
    """Which engine a call of `attention` or `attention_varlen` runs on, and why; runs nothing.

    Args:
        query: as the call's.
        key: as the call's.
        value: as the call's.
        variant: as the call's.
        impl: as the call's.
        **call: all else of the call, options of the variant too; with `cu_seqlens_q` and
            `cu_seqlens_k` it is a packed one.

    Returns:
        The engine, and of every engine the reasons for or against it; print it to read them. Of
        packed sequences that run one by one, the explanation is that of the longest.

    Raises:
        ValueError: as the call itself, but for an engine that cannot run it: that is explained.
    """
    chosen, described = get_variant(variant), {k: call.pop(k) for k in _PACKED if k in call}
    options = {k: v for k, v in call.items() if k not in CALL_ARGUMENTS}
    known = {k: v for k, v in call.items() if k in CALL_ARGUMENTS}
    engines.check_impl(impl)
    if described and not all(name in described for name in _PACKED[:2]):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k describe packed sequences together, got "
            f"{' and '.join(described)} alone; pass both, as to attention_varlen."
        )
    # a seed of one's own: an explanation must not move the generator
    known["seed"] = 0
    extras = [check_flag(name, known.pop(name, False)) for name in _RETURNS]
    query, key, value = autocast_inputs(query, key, value)
    with torch.no_grad(), no_autocast(query):
        if described:
            packed = pack(query, key, value, **described)
            whole = packed_problem(query, key, value, chosen, options, packed, **known)
            together = engines.reasons_of(impl, *whole)
            if together.engine == "triton" and not any(extras) and not known.get("dropout_p"):
                return together
            # all others take the sequences one by one: what a longest one runs on
            bounds_q, bounds_k = bounds_of(packed.cu_q, query), bounds_of(packed.cu_k, key)
            lengths = [stop - start for start, stop in pairwise(bounds_q)]
            first = lengths.index(max(lengths))
            query, key, value = (
                sequence(tensor, slice(*bounds[first : first + 2]))
                for tensor, bounds in ((query, bounds_q), (key, bounds_k), (value, bounds_k))
            )
            slopes = known.get("alibi_slopes")
            if slopes is not None and slopes.dim() == 2:
                known["alibi_slopes"] = slopes[min(first, slopes.shape[0] - 1)]
        problem = build(query, key, value, chosen, options, **known)
        return engines.reasons_of(impl, query, key, value, problem)
