"""The mask functions registered with transformers, and what becomes of the masks they make.

Without a mask function of its own, transformers hands a registered attention function no mask at
all: padding, windows and packing are lost without a word. So both registries get the same keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Causality may stay implicit: None means "causal as the module says".
IMPLICIT = "attnvariants"
# Causality is always in the mask: for configs that also serve modules that are not causal.
EXPLICIT = "attnvariants_explicit"
KEYS = (IMPLICIT, EXPLICIT)


def register() -> None:
    """Register the attention function and its mask functions with transformers.

    Raises:
        ImportError: transformers is missing or older than 4.56.
    """
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(
            "patching models needs transformers >= 4.56; pip install 'attnvariants[hf]'."
        ) from error

    from attnvariants.hf.dispatch import attention_forward, find_collector

    find_collector()

    def implicit_mask(*args, **kwargs):
        return sdpa_mask(*args, **kwargs)

    def explicit_mask(*args, **kwargs):
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, **kwargs)

    mask_interface = type(ALL_MASK_ATTENTION_FUNCTIONS)
    for key, mask_function in ((IMPLICIT, implicit_mask), (EXPLICIT, explicit_mask)):
        if key not in AttentionInterface._global_mapping:
            AttentionInterface.register(key, attention_forward)
        if key not in mask_interface._global_mapping:
            mask_interface.register(key, mask_function)


def is_causal(module: torch.nn.Module, kwargs: dict) -> bool:
    """Whether a call without a mask is causal; the argument wins over the module."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", False) if given is None else given)


def causal_keep(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """`[1, 1, q_len, kv_len]` bool, aligned to the upper left as transformers does."""
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril()[None, None]


def document_keep(cu_q: Tensor, cu_k: Tensor, q_len: int, kv_len: int, causal: bool) -> Tensor:
    """`[1, 1, q_len, kv_len]` bool: True within a document, for packed batches of one row.

    Args:
        cu_q: `[documents + 1]` int, cumulative query lengths from 0.
        cu_k: `[documents + 1]` int, cumulative key lengths from 0.
        causal: each document is causal, aligned to its lower right.
    """
    rows = torch.arange(q_len, device=cu_q.device)
    cols = torch.arange(kv_len, device=cu_q.device)
    row_doc = torch.bucketize(rows, cu_q[1:], right=True)
    col_doc = torch.bucketize(cols, cu_k[1:].to(cu_q.device), right=True)
    keep = row_doc[:, None] == col_doc
    if causal:
        last = cu_q.numel() - 1
        distance_q = cu_q[1:][row_doc.clamp(max=last - 1)] - rows
        distance_k = cu_k[1:].to(cu_q.device)[col_doc.clamp(max=last - 1)] - cols
        keep &= distance_k >= distance_q[:, None]
    return keep[None, None]


def to_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the additive one of eager attention."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)
