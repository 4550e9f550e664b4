"""Errors against float64, beside those of plain PyTorch in the same low precision."""

from __future__ import annotations

import math

import torch

from attnvariants import Rows, attention, get_variant
from bench import gpu_inputs

NAMES = ("out", "dq", "dk", "dv")


def _shown(variant, options, q, k, causal, scale):
    """Scores with hidden ones replaced, and what the variant may know of the rows."""
    q_len, kv_len = q.shape[2], k.shape[2]
    visible = torch.full((q_len,), float(kv_len), device=q.device)
    if causal:
        visible = torch.arange(1, q_len + 1, device=q.device).float() + (kv_len - q_len)
    rows = Rows(visible.view(1, 1, -1, 1), q_len, kv_len, kv_len - q_len)
    if variant.prepare is not None:
        dtype = q.dtype
        q, k = (t.to(dtype) for t in variant.prepare(q.float(), k.float(), rows, **options))
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        future = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device)
        future = future.triu(1 + kv_len - q_len)
        scores = scores.masked_fill(future, variant.hidden_score(options))
    return scores, rows


def plain(q, k, v, variant, *, causal=False, scale=None, **options):
    """The variant's own formula, densely, every matrix of the tensors' dtype."""
    variant = get_variant(variant)
    heads, dtype = q.shape[1], q.dtype
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    options = {
        name: value.view(-1, 1, 1) if torch.is_tensor(value) else value
        for name, value in variant.resolve(options).items()
    }
    if scale is None:
        scale = q.shape[-1] ** -0.5 if variant.scale is None else variant.scale
    scores, rows = _shown(variant, options, q, k, causal, scale)
    numerator, denominator = variant.ratio(scores, rows, **options)
    weights = numerator
    if denominator is not None:
        weights = numerator / denominator.masked_fill(denominator == 0, 1.0)
    return weights.to(dtype) @ v


def run(call, leaves, grad, options=None):
    """out and the gradients of all leaves, learned options among them."""
    tensors = [t.detach().clone().requires_grad_() for t in leaves]
    learned = {n: t.detach().clone().requires_grad_() for n, t in (options or {}).items()}
    out = call(*tensors, **learned)
    wanted = [*tensors, *learned.values()]
    grads = torch.autograd.grad(out, wanted, grad.to(out.dtype))
    return [t.detach() for t in (out, *grads)]


def times_plain(got, low, true, floor=0.0):
    """How many times the error of `low` that of `got` is, the worse of maximum and RMS.

    `floor` is an error that counts as plain PyTorch's whatever it makes.
    """
    true = true.double()
    worst = 0.0
    for size in (lambda t: float(t.abs().max()), lambda t: float(t.square().mean().sqrt())):
        mine, plain_error = size(got.double() - true), size(low.double() - true)
        if not math.isfinite(mine):
            return math.inf
        if math.isfinite(plain_error):
            worst = max(worst, mine / (plain_error + floor + 1e-6 * size(true) + 1e-30))
    return worst


def relative(got, true):
    """RMS error over the RMS of the truth, None where it is not finite."""
    error = float((got.double() - true.double()).square().mean().sqrt())
    size = float(true.double().square().mean().sqrt())
    return error / max(size, 1e-30) if math.isfinite(error) else None


def learned_of(variant, heads, device):
    """Values for the variant's default learned options, one a head."""
    names = get_variant(variant).default_learned
    return {n: torch.linspace(0.6, 1.1, heads, device=device) for n in names}


def checked(job):
    """Errors of out and every gradient, and whether two runs are bitwise equal."""
    case, shape = job.case, job.shape
    dtype = getattr(torch, job.dtype)
    *qkv, grad = gpu_inputs.make(shape, job.device, dtype, case.scores, seed=1)
    learned = learned_of(case.variant, shape.heads, job.device)
    call = {"variant": case.variant, "causal": shape.causal, **case.options}

    def ours(*tensors, **more):
        return attention(*tensors, **call, **more, impl=job.impl)

    def exact(*tensors, **more):
        return attention(*tensors, **call, **more, impl="reference")

    got = run(ours, qkv, grad, learned)
    again = run(ours, qkv, grad, learned)
    low = run(lambda *t, **more: plain(*t, **call, **more), qkv, grad, learned)
    doubles = {n: t.double() for n, t in learned.items()}
    true = run(exact, [t.double() for t in qkv], grad.double(), doubles)
    names = (*NAMES, *(f"d{name}" for name in learned))
    tensors = {
        name: {
            "relative_error": relative(mine, real),
            "plain_relative_error": relative(rough, real),
            "times_plain": times_plain(mine, rough, real),
        }
        for name, mine, rough, real in zip(names, got, low, true, strict=True)
    }
    return {
        **job.labels(),
        "dtype": job.dtype,
        "tensors": tensors,
        "worst": max(entry["times_plain"] for entry in tensors.values()),
        "repeatable": all(torch.equal(one, two) for one, two in zip(got, again, strict=True)),
    }
