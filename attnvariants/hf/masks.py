"""The mask functions registered with transformers, and what becomes of the masks they make.

Without a mask function of its own, transformers hands a registered attention function no mask at
all: padding, windows and packing are lost without a word. So both registries get the same keys.
"""

from __future__ import annotations

import functools
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnvariants.hf import names
from attnvariants.hf.source import text_of
from attnvariants.recorded import KEY

if TYPE_CHECKING:
    from attnvariants.hf.find import Target

MODES = ("lazy", "bool")

# The config names one of these: what a mask is when it arrives, and in which form it is read.
LAZY, LAZY_FLOAT = KEY, f"{KEY}_lazy_float"
BOOL, FLOAT = f"{KEY}_bool", f"{KEY}_float"
# Bool, or None for "causal as the module says": for transformers too old for lazy masks.
IMPLICIT = f"{KEY}_implicit"
KEYS = (LAZY, LAZY_FLOAT, BOOL, FLOAT, IMPLICIT)

_TELLS_MASKS_APART = re.compile(r"isinstance\(\s*\w*mask\w*\s*,[^)]*\b(Tensor|BlockMask)\b")


def register() -> None:
    """Register the attention function and its mask functions with transformers.

    Raises:
        ImportError: transformers is missing or older than 4.56.
    """
    from attnvariants.hf.dispatch import attention_forward, find_collector
    from attnvariants.hf.lazy import describe

    helpers = names.masking()
    find_collector()

    def always(function):
        def mask_function(*args, **kwargs):
            kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
            return function(*args, **kwargs)

        return mask_function

    def implicit(*args, **kwargs):
        return helpers.sdpa(*args, **kwargs)

    def lazy(*args, **kwargs):
        return describe("bool", *args, **kwargs)

    def lazy_float(*args, **kwargs):
        return describe("float", *args, **kwargs)

    functions = {
        LAZY: lazy,
        LAZY_FLOAT: lazy_float,
        BOOL: always(helpers.sdpa),
        FLOAT: always(helpers.eager),
        IMPLICIT: implicit,
    }
    names.register(attention_forward, functions)


def check_mode(mode: Any) -> None:
    """Whether `mode` is one that works here; None is the best there is.

    Raises:
        ValueError: there is no such mode, or transformers is too old for it.
    """
    if mode is None:
        return
    if mode not in MODES:
        raise ValueError(f"masks must be 'lazy' or 'bool', got {mode!r}.")
    if mode == "lazy" and not _has_lazy():
        import transformers

        raise ValueError(
            "masks='lazy' needs transformers >= 5.5, this is "
            f"{transformers.__version__}; upgrade it, or leave masks out."
        )


def key_of(config: Any, previous: str, targets: list[Target], mode: str | None) -> str:
    """The key that suits every module which reads a config, or gets masks that it describes.

    Whatever else reads a mask gets it in the form it had before, additive or bool, and code that
    tells mask types apart gets a tensor, whatever was asked for.

    Args:
        previous: the attention implementation that the config named before.
    """
    served = [target for target in targets if any(config is other for other in target.configs)]
    additive = previous == "eager" or any(target.eager_only for target in served)
    if mode == "bool" or any(_tells_apart(name) for t in served for name in t.sources):
        return FLOAT if additive else BOOL
    if _has_lazy():
        return LAZY_FLOAT if additive else LAZY
    if additive:
        return FLOAT
    causal = all(getattr(t.module, "is_causal", None) is True for t in served if t.dispatches)
    return IMPLICIT if causal else BOOL


@functools.cache
def _has_lazy() -> bool:
    return names.masks_know_offsets()


@functools.cache
def _tells_apart(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and bool(_TELLS_MASKS_APART.search(text_of(module)))


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
