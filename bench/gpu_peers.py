"""Calls of the packages that `bench.gpu` compares with; none is imported before it is needed."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench import gpu_cases


class NotThisShape(Exception):
    """The peer cannot express the call; the message says why."""


class Peer(NamedTuple):
    """`make(shape, device)` gives `call(q, k, v)`; tokens_first is [batch, tokens, heads, dim]."""

    make: Any
    tokens_first: bool = False


def sdpa(backend):
    def make(shape, device):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)

        def call(q, k, v):
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

        return call

    return make


def flex(ssmax):
    def make(shape, device):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def past(b, h, i, j):
            return i >= j

        def growing(score, b, h, i, j):
            return score * torch.log((i + 1).to(torch.float32))

        def constant(score, b, h, i, j):
            return score * math.log(shape.length)

        score_mod = (growing if shape.causal else constant) if ssmax else None
        mask = None
        if shape.causal:
            mask = create_block_mask(past, None, None, shape.length, shape.length, device=device)
        run = flex_attention
        if device == "cuda":
            # a count of recompilations from earlier shapes would end in the eager fallback
            torch._dynamo.reset()
            run = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: run(q, k, v, score_mod=score_mod, block_mask=mask)

    return make


def _causal_only(shape):
    if not shape.causal:
        raise NotThisShape("causal only")


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def flash_attn(module):
    def make(shape, device):
        function = importlib.import_module(module).flash_attn_func
        return lambda q, k, v: _first(function(q, k, v, causal=shape.causal))

    return make


def fla(shape, device):
    _causal_only(shape)
    parallel_attn = importlib.import_module("fla.ops.attn").parallel_attn
    return lambda q, k, v: _first(parallel_attn(q, k, v))


# The authors publish a file and a branch of FLA, under the one name or the other.
_SOFTPICK_HOMES = (
    "flash_softpick_attn",
    "fla.ops.softpick_attn.parallel",
    "fla.ops.softpick_attn",
    "softpick",
)


def softpick(shape, device):
    _causal_only(shape)
    for home in _SOFTPICK_HOMES:
        try:
            function = importlib.import_module(home).parallel_softpick_attn
        except (ImportError, AttributeError):
            continue
        return lambda q, k, v: _first(function(q, k, v))
    raise ModuleNotFoundError(f"no parallel_softpick_attn in any of {', '.join(_SOFTPICK_HOMES)}")


def adasplash_1(shape, device):
    function = importlib.import_module("adasplash").adasplash_v1
    return lambda q, k, v: function(q, k, v, alpha=2.0, is_causal=shape.causal)


def adasplash_2(shape, device):
    _causal_only(shape)
    return importlib.import_module("adasplash").adasplash_v2


def triton_sigmoid(shape, device):
    function = importlib.import_module("triton_sigmoid").sigmoid_attention
    return lambda q, k, v: function(q, k, v, is_causal=shape.causal, sigmoid_bias=0.0)


PEERS = {
    gpu_cases.FLASH: Peer(sdpa("FLASH_ATTENTION")),
    gpu_cases.CUDNN: Peer(sdpa("CUDNN_ATTENTION")),
    gpu_cases.ORIGINAL_SOFTPICK: Peer(softpick, tokens_first=True),
    "flash-attn 2": Peer(flash_attn("flash_attn"), tokens_first=True),
    "flash-attn 3": Peer(flash_attn("flash_attn_interface"), tokens_first=True),
    "FLA": Peer(fla, tokens_first=True),
    "triton-sigmoid": Peer(triton_sigmoid, tokens_first=True),
    "adasplash-2 entmax 1.5": Peer(adasplash_2),
    "adasplash-1 sparsemax": Peer(adasplash_1),
    "FlexAttention": Peer(flex(ssmax=False)),
    "FlexAttention ssmax": Peer(flex(ssmax=True)),
}
