"""Keys that a model picks for each query, which its own eager attention finds in the mask.

For operators other than its eager and sdpa ones, a model hands over the indices of those keys and
leaves them out of the mask.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf.lazy import LazyMask
from attnvariants.hf.names import IMPLEMENTATION

_KEYS = re.compile(r"\.scatter\(\s*-1,\s*topk_indices\.long\(\),\s*False\s*\)")
_BLOCKS = "self.indexer.build_block_mask("
NAMES = ("indices", "block_indices")


def understood(source: str) -> bool:
    """Whether a forward, by its source, means by its indices what `picked` makes of them."""
    own_mask = _KEYS.search(source) or _BLOCKS in source
    return bool(own_mask) and f'{IMPLEMENTATION} in ("eager", "sdpa")' in source


def picked(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | LazyMask | None, kwargs: dict
) -> Any:
    """The mask with all keys hidden that were not picked; as it is if none were.

    Args:
        module: the attention module that calls.
        mask: its mask, `[batch, 1, q_len, kv_len]`; the indices go with one.
        kwargs: the keyword arguments of the call.
    """
    indices: Any = kwargs.get("indices")
    blocks = kwargs.get("block_indices")
    if indices is None and blocks is None:
        return mask
    mask = mask.tensor() if isinstance(mask, LazyMask) else mask
    if mask is None:
        raise ValueError(
            f"{type(module).__name__} picks keys and passes no attention mask to hide the others "
            "in; leave attention_mask to transformers."
        )
    if blocks is not None:
        positions = kwargs.get("position_ids")
        return module.indexer.build_block_mask(  # type: ignore[union-attr, operator]
            blocks, mask, key.shape[2], query.dtype, query.device, positions
        )
    hidden = indices.new_ones(*indices.shape[:2], key.shape[2], dtype=torch.bool)
    hidden = hidden.scatter(-1, indices.long(), False).unsqueeze(1)
    if mask.dtype == torch.bool:
        return mask[..., : key.shape[2]] & ~hidden
    return mask[..., : key.shape[2]].masked_fill(hidden, torch.finfo(mask.dtype).min)
