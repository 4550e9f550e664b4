"""The functional call: one contract for every variant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnvariants import checks, chunked, reference
from attnvariants.autocast import autocast_inputs, no_autocast
from attnvariants.dropout import Dropout
from attnvariants.geometry import Geometry
from attnvariants.problem import Problem, compute_dtype, pick
from attnvariants.registry import Variant, get_variant, suggest

ENGINES = ("auto", "reference", "chunked")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: str | Variant = "softmax",
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    impl: str = "auto",
    return_weights: bool = False,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """Attention with any normaliser in place of the softmax.

        s_ij = softcap(scale q_i . k_j) - slope |i + kv_len - q_len - j| + bias_ij
        out_i = sum_j w_ij v_j,    w_i. = variant(s_i. over the visible keys)

    where softcap(x) = c tanh(x / c). A row that sees no key gives 0 and takes no gradient.

    Args:
        query: `[batch, heads, q_len, head_dim]`, floating point, any strides.
        key: `[batch, kv_heads, kv_len, head_dim]`; heads is a multiple of kv_heads (GQA, MQA).
        value: `[batch, kv_heads, kv_len, value_dim]`.
        variant: a name from `list_variants()` or a `Variant`.
        attn_mask: bool, True = visible, or float, added to the scores as in PyTorch's SDPA, its
            entries at or below half its dtype's minimum (-inf included) hidden; broadcasts to
            [batch, heads, q_len, kv_len].
        bias: float, added to the scores, with a gradient; broadcasts likewise; -inf hides.
        causal: hide the future; the last query is aligned with the last key (bottom right).
        window_size: (left, right), keys within `position - left .. position + right`; -1 is
            unlimited, as in flash-attn.
        alibi_slopes: `[heads]` or `[batch, heads]`, with a gradient (Press et al., 2021,
            arXiv:2108.12409).
        softcap: cap c of the scores; None or 0 is off.
        scale: score multiplier; the default is 1/sqrt(head_dim), or the variant's own.
        dropout_p: probability of dropping a weight; kept ones are divided by 1 - p.
        generator: source of the dropout's seed; the mask is the same in every engine.
        impl: "reference" (dense), "chunked" (row blocks, O(tokens) memory) or "auto".
        return_weights: also return the weights as applied, `[batch, heads, q_len, kv_len]`;
            differentiable with impl="reference" alone.
        return_stats: also return the rows' `RowStats`.
        **options: the variant's own, numbers or, where learned, tensors `[heads]` that get their
            gradient.

    Returns:
        `[batch, heads, q_len, value_dim]` in value's dtype, or a tuple of it and what else was
        asked for, weights before statistics. Half precision is computed in float32.

    Raises:
        ValueError: an argument is out of the contract, or means nothing for the variant.
    """
    return _attention(
        query,
        key,
        value,
        get_variant(variant),
        options,
        impl=_engine(impl),
        attn_mask=attn_mask,
        bias=bias,
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=scale,
        dropout_p=dropout_p,
        generator=generator,
        return_weights=return_weights,
        return_stats=return_stats,
    )


def _engine(impl: str) -> str:
    if impl == "triton":
        raise ValueError(
            "impl='triton' cannot run this call: (1) this version has no Triton kernels yet. "
            "Use impl='chunked', which runs on any device, or impl='auto'."
        )
    if impl not in ENGINES:
        raise ValueError(f"unknown impl {impl!r}; {suggest(str(impl), ENGINES)}")
    return "chunked" if impl == "auto" else impl


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: Variant,
    options: dict[str, Any],
    *,
    impl: str = "chunked",
    return_weights: bool = False,
    return_stats: bool = False,
    **call: Any,
) -> Any:
    query, key, value = autocast_inputs(query, key, value)
    with no_autocast(query):
        query, key, problem = prepare(query, key, value, variant, options, **call)
        if impl == "reference":
            out, weights, stats = reference.attention(query, key, value, problem, return_stats)
        else:
            out = chunked.attention(query, key, value, problem)
            weights, stats = None, None
            if return_weights or return_stats:
                weights, stats = chunked.weights_and_stats(
                    query, key, problem, return_weights, return_stats
                )
    extra: list[Any] = [weights] if return_weights else []
    extra += [stats] if return_stats else []
    return (out, *extra) if extra else out


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: Variant,
    options: dict[str, Any],
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    offset: int | None = None,
) -> tuple[Tensor, Tensor, Problem]:
    """Validate a call; query and key as the variant prepares them, and the rest as a `Problem`.

    `offset` is the alignment of `Geometry`, bottom-right if None.
    """
    checks.check_qkv(query, key, value)
    batch, heads, q_len, head_dim = query.shape
    kv_len, device, dtype = key.shape[2], query.device, compute_dtype(query)
    shape = batch, heads, q_len, kv_len

    left, right = checks.check_window(window_size)
    right = 0 if checks.check_flag("causal", causal) else right
    geometry = Geometry(q_len, kv_len, kv_len - q_len if offset is None else offset, left, right)
    keep, bias = _visibility(attn_mask, bias, shape, device)
    slopes = None
    if alibi_slopes is not None:
        slopes = checks.check_slopes(alibi_slopes, batch, heads, device).to(dtype)
    cap = 0.0 if softcap is None else checks.check_number("softcap", softcap, low=0.0)
    if scale is None:
        scale = head_dim**-0.5 if variant.scale is None else variant.scale
    scale = checks.check_number("scale", scale)
    p = checks.check_number("dropout_p", dropout_p, 0.0, 1.0)

    given = {"bias": bias is not None, "alibi_slopes": slopes is not None, "softcap": bool(cap)}
    for feature, reason in variant.refuses.items():
        if given.get(feature):
            raise ValueError(f"{variant.name} takes no {feature}: {reason}.")

    full_options = {
        name: _per_head(variant, name, value, heads, device).to(dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in variant.resolve(options).items()
    }
    visible, any_blind = _count(geometry, keep, device)
    problem = Problem(
        variant=variant,
        options=full_options,
        geometry=geometry,
        scale=scale,
        softcap=cap,
        visible=visible,
        keep=keep,
        bias=None if bias is None else bias.to(dtype),
        slopes=slopes,
        dropout=Dropout(p, _seed(generator, device), heads, q_len, kv_len) if p else None,
        any_blind=any_blind,
    )
    rows = problem.rows(slice(0, batch), slice(0, heads), slice(0, q_len), dtype)
    if variant.check is not None:
        variant.check(rows, full_options, scale)
    if variant.prepare is not None:
        query, key = variant.prepare(query.to(dtype), key.to(dtype), rows, **full_options)
    return query, key, problem


def _visibility(
    attn_mask: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Visibility (bool or None) and additive bias (or None) of the two arguments together."""
    keep: Tensor | None = None
    total: Tensor | None = None
    for name, tensor in (("attn_mask", attn_mask), ("bias", bias)):
        if tensor is None:
            continue
        tensor = checks.broadcastable(name, tensor, shape, device)
        if not tensor.requires_grad:
            tensor = checks.collapse(tensor)
        visible: Tensor | None
        finite: Tensor | None
        if tensor.dtype == torch.bool and name == "attn_mask":
            visible, finite = tensor, None
        elif tensor.is_floating_point():
            visible, finite = checks.split_mask(tensor)
            # a mask of zeros and -inf adds nothing, whatever the variant makes of a bias
            if name == "attn_mask" and not tensor.requires_grad and not finite.any():
                finite = None
        else:
            wanted = "bool (True = visible) or floating point" if name == "attn_mask" else "float"
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}; convert it.")
        if visible is not None:
            keep = visible if keep is None else keep & visible
        if finite is not None:
            total = finite if total is None else total + finite
    return keep, total


def _per_head(
    variant: Variant, name: str, value: Tensor, heads: int, device: torch.device
) -> Tensor:
    if value.numel() not in (1, heads):
        raise ValueError(
            f"{variant.name}'s {name} must have shape [] or [{heads}], one for each query head, "
            f"got {list(value.shape)}."
        )
    if value.device != device:
        raise ValueError(
            f"{variant.name}'s {name} must be on query's device {device}, got {value.device}; "
            "move it."
        )
    return value.view(-1, 1, 1)


def _count(geometry: Geometry, keep: Tensor | None, device: torch.device) -> tuple[Tensor, bool]:
    """Visible keys of each row, and whether some row sees none."""
    if keep is None:
        visible = geometry.counts(device).view(1, 1, -1)
        ends = geometry.columns(0, 1), geometry.columns(geometry.q_len - 1, geometry.q_len)
        # counts rise, stay and fall along the rows, so the first and the last row are the poorest
        return visible, any(end.start == end.stop for end in ends) and geometry.q_len > 0
    if geometry.unlimited and keep.shape[2] == 1 and keep.shape[3] == geometry.kv_len:
        visible = keep.sum(-1).expand(*keep.shape[:2], geometry.q_len)
        return visible, bool((visible == 0).any())
    counts = []
    for start in range(0, geometry.q_len, 256):
        rows = slice(start, min(start + 256, geometry.q_len))
        cols = geometry.columns(rows.start, rows.stop)
        part = pick(pick(keep, 2, rows), 3, cols)
        counts.append((part & geometry.keep(rows, cols, device)).sum(-1))
    visible = torch.cat(counts, -1) if counts else keep.new_zeros(1, 1, 0, dtype=torch.int64)
    return visible, bool((visible == 0).any())


def _seed(generator: torch.Generator | None, device: torch.device) -> int:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    on = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=on))


def iter_weights(
    query: Tensor,
    key: Tensor,
    variant: str | Variant = "softmax",
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    **options: Any,
) -> Iterator[chunked.WeightBlock]:
    """The weights of a call block by block, never all at once and without a gradient.

    Args:
        As `attention`'s.

    Yields:
        `WeightBlock`s that cover every row that sees a key; the weights of all others are 0.

    Raises:
        ValueError: as `attention`, at the call.
    """
    query, key = autocast_inputs(query, key)
    with torch.no_grad(), no_autocast(query):
        query, key, problem = prepare(
            query,
            key,
            key,
            get_variant(variant),
            options,
            attn_mask=attn_mask,
            bias=bias,
            causal=causal,
            window_size=window_size,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            scale=scale,
        )
    return chunked.weight_blocks(query, key, problem)
