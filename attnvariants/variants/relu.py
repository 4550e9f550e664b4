"""ReLU divided by length, and its pointwise siblings: no normaliser over the row.

    w_j = h(s_j) / L^power

h is `act`; L is the number of visible keys of the row (`length="visible"`, the same in prefill and
in cached decoding), the number of keys of the call ("kv", the paper's), or a fixed number.
Rows sum to anything. With "visible" the first rows of a causal model divide by 1, 2, ... and can
grow large; a fixed number avoids that.
Source: Wortsman et al., 2023, arXiv:2309.08586.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from attnvariants.registry import Option, Variant
from attnvariants.variants._pointwise import hooks


def _softplus(x):
    return F.softplus(x, threshold=40)


# name: (function, its in-place form, score of a hidden key)
ACTIVATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
    "relu": (F.relu, F.relu_, 0.0),
    "relu2": (lambda x: F.relu(x).square(), lambda x: F.relu_(x).square_(), 0.0),
    "relu6": (F.relu6, lambda x: x.clamp_(0, 6), 0.0),
    "softplus": (_softplus, _softplus, -math.inf),
    "sigmoid": (torch.sigmoid, torch.sigmoid_, -math.inf),
    "gelu": (F.gelu, F.gelu, 0.0),
    "silu": (F.silu, F.silu, 0.0),
    "identity": (lambda x: x, lambda x: x, 0.0),
}


def length_power(rows, length, power):
    if length == "visible":
        return rows.visible.clamp(min=1) ** power
    size = rows.kv_len if length == "kv" else length
    if not isinstance(size, torch.Tensor):
        size = rows.visible.new_full((), torch.sym_float(size))
    return size.to(rows.visible.dtype) ** power


def ratio(scores, rows, *, act, length, power):
    return ACTIVATIONS[act][0](scores), length_power(rows, length, power)


def fused(scores, rows, *, act, length, power):
    out_of_place, in_place, _ = ACTIVATIONS[act]
    apply = out_of_place if scores.requires_grad else in_place
    return apply(scores), length_power(rows, length, power)


def theta(options, case):
    length = {"visible": 0, "kv": case.kv_len}.get(options["length"], options["length"])
    return float(length), float(options["power"])


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    hidden=lambda options: ACTIVATIONS[options["act"]][2],
    nonnegative=False,
    hooks=hooks,
    theta=theta,
    options={
        "act": Option("relu", "pointwise function", choices=tuple(ACTIVATIONS), number=False),
        "length": Option("visible", "what to divide by", choices=("visible", "kv"), above=0.0),
        "power": Option(1.0, "exponent of the length"),
    },
)
