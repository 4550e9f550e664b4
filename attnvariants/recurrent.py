"""Decoding with a state of fixed size in place of the keys and values, for linear variants.

Where weights are the scores themselves over their sum, as cosFormer's (Qin et al., 2022,
arXiv:2202.08791), a sum over keys is all that a query needs of them. With q and k the features
that the variant prepares:

    S_i = S_{i-1} + k_i v_i^T,    z_i = z_{i-1} + k_i
    out_i = scale q_i S_i / max(scale q_i . z_i, eps)

    out, state = prefill(query, key, value, max_len=4096)
    out, state = step(query, key, value, state)

Together they give what `attention(..., "cosformer", causal=True, max_len=4096)` of the whole gives,
each step in time and memory that do not grow with the tokens before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants import checks, engines
from attnvariants.autocast import autocast_inputs, no_autocast
from attnvariants.context import transformed
from attnvariants.problem import Problem, build, compute_dtype, prepare
from attnvariants.registry import Rows, Variant, get_variant
from attnvariants.scalars import check_integer, in_words

# Tokens whose products are formed at once.
_CHUNK = 128


class State(NamedTuple):
    """What all tokens so far leave behind, and the call they belong to.

    For beam search: `state._replace(memory=state.memory[beams], total=state.total[beams])`.

    Attributes:
        memory: sum_j k_j v_j^T, `[batch, kv_heads, features, value_dim]`; float32, or float64 for
            float64 tensors.
        total: sum_j k_j, `[batch, kv_heads, features]`, likewise.
        position: where the next token stands, hidden ones counted.
        max_len: how many tokens there may be in all.
        variant: whose features they are.
        options: the variant's own.
        scale: multiplies the products.
    """

    memory: Tensor
    total: Tensor
    position: int
    max_len: int
    variant: Variant
    options: Mapping[str, Any]
    scale: float


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: str | Variant = "cosformer",
    *,
    max_len: int,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    **options: Any,
) -> tuple[Tensor, State]:
    """Causal attention of sequences from their first token, and the state to go on from.

    Args:
        query: `[batch, heads, tokens, head_dim]`, floating point, any strides; no tokens at all
            give an empty state.
        key: `[batch, kv_heads, tokens, head_dim]`; heads is a multiple of kv_heads (GQA, MQA).
        value: `[batch, kv_heads, tokens, value_dim]`.
        variant: one with `linear_eps`.
        max_len: how many tokens there will be at most, prefill and steps together. Features of
            cosFormer's depend on it (its option of that name), so it cannot grow later.
        key_mask: bool `[batch, tokens]`, True = visible: padding, usually on the left. Padded
            tokens count as positions, of which only differences matter.
        scale: score multiplier; the default is the variant's own, or 1/sqrt(head_dim).
        impl: as in `attention`: "triton" runs the linear kernels, which have no gradient here, any
            other engine plain torch, which has.
        **options: the variant's own.

    Returns:
        `[batch, heads, tokens, value_dim]` in value's dtype, and the `State`.

    Raises:
        ValueError: an argument is out of the contract, the variant is not linear, there are more
            tokens than max_len, or impl="triton" cannot run the call.
    """
    variant, impl = get_variant(variant), engines.check_impl(impl)
    if variant.linear_eps is None:
        raise ValueError(
            f"{variant.name or 'this variant'} cannot be decoded with a state: its weights are not "
            "its scores over their sum, as cosformer's are; use attention with all keys."
        )
    most = ", the most tokens that prefill and steps will come to"
    max_len = check_integer("max_len", max_len, 1, most)
    if "max_len" in variant.options:
        options["max_len"] = max_len
    query, key, value = autocast_inputs(query, key, value)
    with no_autocast(query):
        checks.check_qkv(query, key, value)
        tokens = _same_tokens(query, key)
        _within(0, tokens, max_len)
        mask = None if key_mask is None else _padding(key_mask, key)
        problem = build(
            query, key, value, variant, options, attn_mask=mask, causal=True, scale=scale
        )
        engine = engines.choose(impl, query, key, value, problem)
        if engine == "triton" and _wants_gradient(query, key, value):
            if impl == "triton":
                raise ValueError(
                    "impl='triton' gives a state no gradient; call prefill under torch.no_grad(), "
                    "or with impl='chunked' for the gradient."
                )
            engine = "chunked"
        query, key = prepare(query, key, problem)
        run = _by_kernels if engine == "triton" else _from_nothing
        out, memory, total = run(query, key, value, problem)
    state = State(memory, total, tokens, max_len, variant, problem.options, problem.scale)
    return out, state


def step(
    query: Tensor, key: Tensor, value: Tensor, state: State, *, key_mask: Tensor | None = None
) -> tuple[Tensor, State]:
    """Attention of the next token, or tokens, and the state behind them.

    Args:
        query: `[batch, heads, tokens, head_dim]`, tokens mostly 1.
        key: `[batch, kv_heads, tokens, head_dim]`.
        value: `[batch, kv_heads, tokens, value_dim]`.
        state: behind all earlier tokens; left as it is.
        key_mask: bool `[batch, tokens]`, as `prefill`'s, of these tokens.

    Returns:
        `[batch, heads, tokens, value_dim]` in value's dtype, and the `State` behind them.

    Raises:
        ValueError: sizes, dtype or device differ from the prefill's, or the tokens go past the
            state's max_len.
    """
    if not isinstance(state, State):
        raise ValueError(f"state must be the State of a prefill, got {in_words(state)}.")
    query, key, value = autocast_inputs(query, key, value)
    with no_autocast(query):
        checks.check_qkv(query, key, value)
        tokens, dtype = _same_tokens(query, key), compute_dtype(query)
        _within(state.position, tokens, state.max_len)
        _fits(key, value, state)
        variant, stop = state.variant, state.position + tokens
        if variant.prepare is not None:
            visible = torch.arange(state.position + 1, stop + 1, dtype=dtype, device=query.device)
            rows = Rows(
                visible.view(1, 1, -1, 1), tokens, stop, state.position, first_key=state.position
            )
            query, key = variant.prepare(query.to(dtype), key.to(dtype), rows, **state.options)
        if key_mask is not None:
            shown = _padding(key_mask, key)[..., None].squeeze(2)
            key, value = key.where(shown, 0.0), value.where(shown, 0.0)
        out, memory, total = _advance(query, key, value, state.memory, state.total, state)
    return out, state._replace(memory=memory, total=total, position=stop)


def _advance(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor, total: Tensor, call: State | Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, memory and total, chunk after chunk; differentiable."""
    eps = call.variant.linear_eps
    outs = []
    heads = key.shape[1], query.shape[1] // key.shape[1]
    parts = (tensor.to(memory.dtype).split(_CHUNK, 2) for tensor in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        # [batch, kv_heads, group, tokens, features]
        q = q.unflatten(1, heads) * call.scale
        before, summed = memory, total
        memory = memory + k.mT @ v
        total = total + k.sum(2)
        if q.shape[3] == 1:
            weighted, norm = q @ memory.unsqueeze(2), q @ total[:, :, None, :, None]
        else:
            products = (q @ k.unsqueeze(2).mT).tril()
            weighted = products @ v.unsqueeze(2) + q @ before.unsqueeze(2)
            norm = products.sum(-1, keepdim=True) + q @ summed[:, :, None, :, None]
        outs.append((weighted / norm.clamp(min=eps)).flatten(1, 2).to(value.dtype))
    return torch.cat(outs, 2), memory, total


def _from_nothing(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_advance`, from the first token, hidden keys left out."""
    if problem.keep is not None:
        shown = problem.keep[:, 0, 0, :, None].unsqueeze(1)
        key, value = key.where(shown, 0.0), value.where(shown, 0.0)
    total = key.new_zeros(key.shape[0], key.shape[1], key.shape[3], dtype=compute_dtype(value))
    memory = total.new_zeros(*total.shape, value.shape[3])
    return _advance(query, key, value, memory, total, problem)


def _by_kernels(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_from_nothing`, by the linear kernels."""
    from attnvariants.linear_ops import facts, kernel_call
    from attnvariants_kernels import linear

    mask = None if problem.keep is None else problem.keep[:, 0, 0]
    call = kernel_call(key, mask, None, None, *facts(problem))
    query, key = query.to(value.dtype), key.to(value.dtype)
    out, _, state = linear.forward(query, key, value, return_state=True, **call)
    return out, state.memory, state.total


def _same_tokens(query: Tensor, key: Tensor) -> int:
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "query and key must have as many tokens, those that are new, "
            f"got {query.shape[2]} and {key.shape[2]}."
        )
    return key.shape[2]


def _within(position: int, tokens: int, max_len: int) -> None:
    if position + tokens > max_len:
        go = "token from position {} on goes" if tokens == 1 else "tokens from position {} on go"
        raise ValueError(
            f"{tokens} {go.format(position)} past max_len {max_len}, which a state keeps; prefill "
            f"with max_len >= {position + tokens}."
        )


def _fits(key: Tensor, value: Tensor, state: State) -> None:
    sizes = (*key.shape[:2], key.shape[3] * state.variant.width_factor, value.shape[3])
    wanted = sizes, key.device, compute_dtype(key)
    memory = state.memory
    if wanted != (tuple(memory.shape), memory.device, memory.dtype):
        raise ValueError(
            "key and value must be as at the prefill, with a memory [batch, kv_heads, features, "
            f"value_dim] = {list(memory.shape)} of {memory.dtype} on {memory.device}; these have "
            f"one of {list(sizes)}, {wanted[2]} on {wanted[1]}."
        )


def _padding(key_mask: Tensor, key: Tensor) -> Tensor:
    shape = key.shape[0], key.shape[2]
    if checks.dense("key_mask", key_mask).dtype != torch.bool:
        raise ValueError(
            "key_mask must be a bool tensor [batch, tokens], True = visible, "
            f"got {key_mask.dtype}; convert it."
        )
    if key_mask.device != key.device:
        raise ValueError(
            f"key_mask must be on key's device {key.device}, got {key_mask.device}; move it."
        )
    if tuple(key_mask.shape) != shape:
        raise ValueError(
            f"key_mask must have shape [batch, tokens] = {list(shape)}, got {list(key_mask.shape)}."
        )
    return key_mask[:, None, None]


def _wants_gradient(*tensors: Tensor) -> bool:
    # within a transform nothing tells whether a gradient will be asked for
    return transformed() or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )
