"""Source of the classes of a model, and whether they call transformers' attention interface."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from attnvariants.hf.names import REGISTRY


@functools.cache
def text_of(thing: Any) -> str:
    """Source of a class, function or module, or an empty string."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def source_of(function: Callable[..., Any]) -> str:
    """Source of a function through its decorators, or an empty string."""
    return text_of(inspect.unwrap(function))


def own_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward that does the work, following `super().forward` up the classes."""
    for base in cls.__mro__:
        if "forward" not in base.__dict__:
            continue
        source = source_of(base.__dict__["forward"])
        if REGISTRY in source or not re.search(r"super\([^)]*\)\.forward\(", source):
            return inspect.unwrap(base.__dict__["forward"])
    return cls.forward


def forward_source(cls: type[nn.Module]) -> str:
    """Source of `own_forward`, or an empty string."""
    return source_of(own_forward(cls))


def dispatches(cls: type[nn.Module]) -> bool:
    """Whether the class calls attention through transformers' attention interface."""
    return REGISTRY in forward_source(cls)
