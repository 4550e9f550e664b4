"""The streaming kernels in plain torch, for tests of everything around them."""

import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import attnvariants_kernels
from attnvariants import get_variant, registry
from attnvariants_kernels import _triton

SOFTMAX = SimpleNamespace(kind="softmax", saves=1, needs_n=False)
# relu(s) / n^power, with an extra saved row that nothing reads
RELU = SimpleNamespace(kind="relu", saves=2, needs_n=True)

calls: list["Call"] = []


class Call(NamedTuple):
    """As the kernels' own."""

    scale: float
    softcap: float = 0.0
    offset: int = 0
    left: int | None = None
    right: int | None = None
    mask: Any = None
    bias: Any = None
    slopes: Any = None
    visible: Any = None
    cu_q: Any = None
    cu_k: Any = None
    max_q: int = 0
    max_k: int = 0
    dropout_p: float = 0.0
    seed: int = 0
    precision: str = "ieee"
    theta: tuple[float, ...] = ()


def random(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def leaf(tensor):
    return tensor.clone().requires_grad_()


def relu_hooks(options, case):
    return {"relu": RELU}[options["act"]]


def install(monkeypatch):
    """Put this module in the kernels' place, with variants whose hooks it understands."""
    torch._dynamo.reset()
    calls.clear()
    this = sys.modules[__name__]
    monkeypatch.setattr(attnvariants_kernels, "streaming", this, raising=False)
    monkeypatch.setitem(sys.modules, "attnvariants_kernels.streaming", this)
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    monkeypatch.setattr(_triton, "_problem", "")
    named = {
        name: replace(get_variant(name), hooks=SOFTMAX) for name in ("softmax", "ssmax", "lssa")
    }
    # cosine scores under softmax weights: a formula for lssa's `prepare`, not lssa
    named["lssa"] = replace(named["lssa"], ratio=named["softmax"].ratio, fused=None)
    named["relu"] = replace(
        get_variant("relu"), hooks=relu_hooks, theta=lambda options, case: (options["power"],)
    )
    monkeypatch.setattr(registry, "_registered", named)


def _parts(q, k, call):
    """(queries, keys, call) of each sequence; of a call that is not packed the one call."""
    if call.cu_q is None:
        return [(slice(0, q.shape[2]), slice(0, k.shape[2]), call)]
    parts = []
    bounds = zip(pairwise(call.cu_q.tolist()), pairwise(call.cu_k.tolist()), strict=True)
    for index, (of_q, of_k) in enumerate(bounds):
        rows, cols = slice(*of_q), slice(*of_k)
        assert rows.stop - rows.start <= call.max_q
        assert cols.stop - cols.start <= call.max_k
        slopes = None if call.slopes is None else call.slopes[index : index + 1]
        offset = (cols.stop - cols.start) - (rows.stop - rows.start)
        own = call._replace(cu_q=None, cu_k=None, slopes=slopes, offset=offset)
        parts.append((rows, cols, own))
    return parts


def _weights(q, k, call, hooks):
    """Weights after dropout, the same before, scores, slope of the softcap, distance, keep."""
    assert call.mask is None or call.mask.dtype == torch.uint8
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1).float()
    s = call.scale * (q.float() @ k.mT)
    slope = torch.ones_like(s)
    if call.softcap:
        t = torch.tanh(s / call.softcap)
        s, slope = call.softcap * t, 1 - t * t
    position = torch.arange(q.shape[2]).unsqueeze(-1) + call.offset
    distance = torch.arange(k.shape[2]) - position
    if call.slopes is not None:
        s = s - call.slopes[..., None, None] * distance.abs()
    if call.bias is not None:
        s = s + call.bias
    keep = torch.ones_like(s, dtype=torch.bool)
    if call.left is not None:
        keep = keep & (distance >= -call.left)
    if call.right is not None:
        keep = keep & (distance <= call.right)
    if call.mask is not None:
        keep = keep & (call.mask != 0)
    if hooks.kind == "softmax":
        w = s.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
    else:
        n = keep.sum(-1) if call.visible is None else call.visible
        w = s.relu() * keep / n.clamp(min=1).unsqueeze(-1) ** call.theta[0]
    factor = torch.ones_like(w)
    if call.dropout_p:
        from attnvariants.dropout import Dropout

        drop = Dropout(call.dropout_p, call.seed, q.shape[1], q.shape[2], k.shape[2])
        factor = drop.factor(*(slice(0, size) for size in w.shape), like=w)
    return w, s, slope, distance.abs(), keep, factor


def forward(q, k, v, call, hooks):
    """Output and saved rows."""
    calls.append(call)
    out = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=v.dtype)
    for rows, cols, part in _parts(q, k, call):
        w, *_, factor = _weights(q[:, :, rows], k[:, :, cols], part, hooks)
        full = v[:, :, cols].repeat_interleave(q.shape[1] // v.shape[1], 1).float()
        out[:, :, rows] = ((w * factor) @ full).to(v.dtype)
    return out, torch.zeros(hooks.saves, *q.shape[:3])


def backward(grad_out, q, k, v, out, saved, call, hooks, wants_bias=False, wants_slopes=False):
    """As the kernels': the gradients of bias by entry and of slopes by row, in float32."""
    assert saved.shape == (hooks.saves, *q.shape[:3])
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dbias = torch.zeros(*q.shape[:3], k.shape[2]) if wants_bias else None
    dslopes = torch.zeros(q.shape[:3]) if wants_slopes else None
    for rows, cols, part in _parts(q, k, call):
        qs, ks, vs = q[:, :, rows].float(), k[:, :, cols].float(), v[:, :, cols].float()
        g = grad_out[:, :, rows].float()
        w, s, slope, distance, keep, factor = _weights(qs, ks, part, hooks)
        dp = g @ vs.repeat_interleave(group, 1).mT * factor
        if hooks.kind == "softmax":
            ds = w * (dp - (w * dp).sum(-1, keepdim=True))
        else:
            n = keep.sum(-1) if part.visible is None else part.visible
            ds = (s > 0) * keep * dp / n.clamp(min=1).unsqueeze(-1) ** part.theta[0]
        if dbias is not None:
            dbias[:, :, rows, cols] = ds
        if dslopes is not None:
            dslopes[:, :, rows] = -(ds * distance).sum(-1)
        ds = ds * slope * part.scale

        def shared(full, width=group):
            return full.unflatten(1, (-1, width)).sum(2)

        dq[:, :, rows] = (ds @ ks.repeat_interleave(group, 1)).to(q.dtype)
        dk[:, :, cols] = shared(ds.mT @ qs).to(k.dtype)
        dv[:, :, cols] = shared((w * factor).mT @ g).to(v.dtype)
    return dq, dk, dv, dbias, dslopes
