"""Learned attention sinks: of each head a logit that joins the softmax and attends to nothing.

With it a row of weights sums to Z / (Z + e^sink) < 1, where Z is the sum of its other exponentials:
the softmax without the sink, times sigmoid(log Z - sink). The sink is no key, so it is outside the
window, is not counted among the visible keys, and dropout does not drop it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnvariants
from attnvariants.geometry import Geometry
from attnvariants.problem import build, prepare
from attnvariants.registry import Variant, get_variant


def why_not(variant: Variant, biased: bool = False) -> str:
    """Why a variant cannot have sinks, as a clause; empty if it can.

    Args:
        biased: the model adds a bias to the scores besides.
    """
    if not variant.softmax_scores:
        return f"its attention sinks are logits of a softmax, which mean nothing to {variant.name}"
    if biased and variant.prepare is not None:
        return (
            "it has attention sinks and a position bias, which only the variant 'softmax' can "
            "have together"
        )
    return ""


def attention_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    *,
    dropout_p: float,
    impl: str,
    return_weights: bool,
    **call: Any,
) -> Any:
    """As `attention`, with sinks.

    Args:
        sinks: `[heads]`, or `[batch, heads, q_len, 1]`, a logit a row.
        call: keyword arguments of `attention`, its variant one that `why_not` has nothing against.

    Raises:
        ValueError: the variant or a softcap cannot be combined with sinks.
    """
    variant = get_variant(call["variant"])
    reason = why_not(variant, call.get("bias") is not None)
    if not reason and call.get("softcap"):
        reason = "it has attention sinks and a softcap, which cannot be combined"
    if reason:
        raise ValueError(f"{variant.name} cannot replace this attention: {reason}.")
    sinks = sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks
    run: dict[str, Any] = {"dropout_p": dropout_p, "impl": impl, "return_weights": return_weights}
    if call.get("bias") is not None:
        return _as_key(query, key, value, sinks, run, call)
    out, *weights, stats = attnvariants.attention(
        query, key, value, return_stats=True, **run, **call
    )
    lse = stats.lse.unsqueeze(-1)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        lse = lse + _no_change(query, key, variant, impl, call).to(lse.dtype)
    share = torch.sigmoid(lse - sinks.to(lse.dtype))
    out = out * share.to(out.dtype)
    return (out, weights[0] * share) if return_weights else out


def _no_change(
    query: Tensor, key: Tensor, variant: Variant, impl: str, call: dict[str, Any]
) -> Tensor:
    """0 with the gradient of log sum exp of the scores, `[batch, heads, q_len, 1]`.

    That gradient is the weights: the one of sum_j w_ij s_ij with the weights held, and that is
    scale q_i . (sum_j w_ij k_j).
    """
    options = {name: value for name, value in call.items() if name in variant.options}
    shared: dict[str, Any] = {
        name: call.get(name) for name in ("attn_mask", "causal", "window_size")
    }
    problem = build(
        query,
        key,
        key,
        variant,
        options,
        scale=call.get("scale"),
        position=call.get("position"),
        **shared,
    )
    query, key = prepare(query, key, problem)
    mean = attnvariants.attention(
        query.detach(), key.detach(), key, "softmax", scale=problem.scale, impl=impl, **shared
    )
    score = problem.scale * (query * mean).sum(-1, keepdim=True)
    return score - score.detach()


def _as_key(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, run: dict, call: dict[str, Any]
) -> Any:
    """With the sink as one more key before the others, of value 0, whose bias is the logit."""
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    bias, mask, window = call["bias"], call.get("attn_mask"), call.get("window_size")
    shape = (*torch.broadcast_shapes(bias.shape[:3], sinks.shape[:3]), kv_len)
    sinks = sinks.to(bias.dtype).expand(*shape[:3], 1)
    call = {**call, "bias": torch.cat([sinks, bias.expand(shape)], -1), "position": None}
    if window is not None:
        left, right = (None if side < 0 else side for side in window)
        geometry = Geometry(q_len, kv_len, kv_len - q_len, left, right)
        inside = geometry.keep(slice(0, q_len), slice(0, kv_len), query.device)[None, None]
        if mask is None or mask.dtype == torch.bool:
            mask = inside if mask is None else mask & inside
        else:
            mask = mask.masked_fill(~inside, torch.finfo(mask.dtype).min)
        call["window_size"] = None
    if mask is not None:
        visible = mask.new_full((*mask.shape[:3], 1), mask.dtype == torch.bool)
        call["attn_mask"] = torch.cat([visible, mask.expand(*mask.shape[:3], kv_len)], -1)
    nothing = key.new_zeros(batch, key.shape[1], 1, 1)
    key, value = (torch.cat([nothing.expand(-1, -1, 1, t.shape[3]), t], 2) for t in (key, value))
    result = attnvariants.attention(query, key, value, **run, **call)
    if run["return_weights"]:
        return result[0], result[1][..., 1:]
    return result
