"""Softmax replacements for attention: one registry, one call, a Hugging Face patcher, diagnostics.

from attnvariants import attention, patch
out = attention(query, key, value, "softpick", causal=True)
handle = patch(model, "ssmax", preset="retrofit")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# importing it registers its operators
from attnvariants import linear_ops  # noqa: F401
from attnvariants._version import __version__
from attnvariants.api import attention
from attnvariants.compat import (
    flash_attn_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
)
from attnvariants.engines import Explanation
from attnvariants.explanation import explain
from attnvariants.problem import RowStats
from attnvariants.recorded import watch as _watch
from attnvariants.registry import Option, Rows, Variant, get_variant, list_variants, register
from attnvariants.varlen import attention_varlen

if TYPE_CHECKING:
    from attnvariants import diagnostics, recurrent
    from attnvariants.hf import Patch, from_pretrained, patch, save_pretrained, unpatch


__all__ = [
    "Explanation",
    "Option",
    "Patch",
    "RowStats",
    "Rows",
    "Variant",
    "__version__",
    "attention",
    "attention_varlen",
    "diagnostics",
    "explain",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "from_pretrained",
    "get_variant",
    "list_variants",
    "patch",
    "recurrent",
    "register",
    "save_pretrained",
    "scaled_dot_product_attention",
    "unpatch",
]

_watch()

_LAZY = dict.fromkeys(("Patch", "from_pretrained", "patch", "save_pretrained", "unpatch"), "hf")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"attnvariants.{_LAZY[name]}"), name)
    if name in ("diagnostics", "recurrent"):
        return importlib.import_module(f"attnvariants.{name}")
    raise AttributeError(f"module 'attnvariants' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
