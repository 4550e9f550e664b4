"""Every variant x every part of the contract x every engine, against row-by-row oracles."""

import oracles
import pytest
import torch
from engines import ENGINES, most

import attnvariants
from attnvariants import attention, blocks
from attnvariants.testing import CASES, make_inputs, random, refused

# engine: dtypes and the errors that they may have
BUDGETS = {
    "reference": {torch.float64: 1e-9},
    "chunked": {torch.float64: 1e-9, torch.float32: 2e-5},
    "triton": {torch.float32: 1e-5},
}
SETTINGS = {
    "softmax": [{}],
    "ssmax": [{"learn": True}, {"s": 0.4, "b": 0.3}],
    "softpick": [{}, {"eps": 1e-3}],
    "lssa": [{}],
    "lssar": [{}, {"p": 3.0}, {"p": 2.0, "offset": 0.5}, {"p": 1.5, "offset": 0.0}],
    "sa_softmax": [{}, {"form": "x"}, {"detach_minmax": True}],
    "relu": [
        {}, {"act": "relu2"}, {"act": "softplus", "length": "kv"}, {"act": "gelu", "length": 7},
        {"act": "sigmoid", "power": 0.5}, {"act": "silu"}, {"act": "relu6"}, {"act": "identity"},
    ],
    "sparsemax": [{}],
    "cosformer": [{}, {"max_len": 64}],
}  # fmt: skip
CELLS = [(name, options) for name, settings in SETTINGS.items() for options in settings]
# One for each shape of hooks.
SHAPES = [(name, {}) for name in ("softmax", "softpick", "relu", "sparsemax", "cosformer")]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in o.items()) or 'default'}" for name, o in CELLS]


def test_every_variant_is_covered():
    assert set(SETTINGS) == set(attnvariants.list_variants())


def visible(q_len, kv_len, causal=False, window_size=None):
    """[q_len, kv_len], by definition, bottom-right aligned."""
    keep = torch.ones(q_len, kv_len, dtype=torch.bool)
    left, right = window_size or (-1, -1)
    for i in range(q_len):
        for j in range(kv_len):
            position = i + kv_len - q_len
            if causal and j > position:
                keep[i, j] = False
            if left >= 0 and j < position - left:
                keep[i, j] = False
            if right >= 0 and j > position + right:
                keep[i, j] = False
    return keep


def call_of(name, options, sizes, call):
    """Leaves (query, key, value, bias, slopes, learned) and the two calls over them."""
    q, k, v = make_inputs(**sizes)
    leaves = {"query": q, "key": k, "value": v}
    options = dict(options)
    heads = q.shape[1]
    if options.pop("learn", False):
        leaves["s"] = random(heads, seed=7) * 0.2 + 0.7
        leaves["b"] = random(heads, seed=8) * 0.2
    for extra in ("bias", "alibi_slopes"):
        if extra in call:
            leaves[extra] = call[extra]
    rest = {k: v for k, v in call.items() if k not in leaves}
    return {k: v.clone().requires_grad_() for k, v in leaves.items()}, {**rest, **options}


def by_oracle(name, leaves, rest):
    q, k, v = leaves["query"], leaves["key"], leaves["value"]
    shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    rest = dict(rest)
    keep = visible(*shape[2:], rest.pop("causal", False), rest.pop("window_size", None))
    bias, mask = leaves.get("bias"), rest.pop("attn_mask", None)
    if mask is not None and mask.dtype != torch.bool:
        keep, bias, mask = keep & (mask > -torch.inf), mask, None
    if mask is not None:
        keep = keep & mask
    slopes = leaves.get("alibi_slopes")
    learned = {name: leaves[name] for name in ("s", "b") if name in leaves}
    return oracles.attention(
        q, k, v, name, keep=keep.expand(shape),
        bias=None if bias is None else bias.expand(shape),
        slopes=None if slopes is None else slopes.expand(shape[0], shape[1]), **learned, **rest,
    )  # fmt: skip


def assert_close(got, want, tolerance, what):
    error = float((got.detach().double() - want.detach()).abs().max()) if want.numel() else 0.0
    size = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
    assert torch.isfinite(got).all(), f"{what} is not finite"
    assert error <= tolerance * size, f"{what}: {error:.2e} over {size:.2e}"


@pytest.mark.parametrize(("name", "options"), most(CELLS, SHAPES), ids=IDS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(name, options, case, monkeypatch):
    # small blocks, so that every call has several of them in every direction
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 2)
    monkeypatch.setattr(blocks, "_THREAD_SCORES", 48)
    sizes, call = CASES[case]
    leaves, rest = call_of(name, options, sizes, call)
    if refused(attnvariants.get_variant(name), call):
        with pytest.raises(ValueError, match="takes no"):
            attention(**leaves, variant=name, **rest)
        return
    want = by_oracle(name, leaves, rest)
    grad_out = random(*want.shape, seed=9)
    # retain zeros where an input plays no part, e.g. a single key
    wanted = torch.autograd.grad(want, list(leaves.values()), grad_out, allow_unused=True)
    for impl in ENGINES:
        for dtype, budget in BUDGETS[impl].items():
            check(name, impl, dtype, budget, leaves, rest, [want, *wanted], grad_out)


def check(name, impl, dtype, budget, leaves, rest, wanted, grad_out):
    def cast(item):
        return item.to(dtype) if torch.is_tensor(item) and item.is_floating_point() else item

    inputs = {key: cast(tensor).detach().requires_grad_() for key, tensor in leaves.items()}
    got = attention(
        **inputs, variant=name, impl=impl, **{key: cast(item) for key, item in rest.items()}
    )
    assert got.dtype == dtype
    assert got.shape == wanted[0].shape
    grads = torch.autograd.grad(got, list(inputs.values()), cast(grad_out), allow_unused=True)
    for what, found, expected in zip(("out", *inputs), (got, *grads), wanted, strict=True):
        expected = torch.zeros_like(leaves[what]) if expected is None else expected
        found = torch.zeros_like(inputs[what]) if found is None else found
        assert_close(found, expected, budget, f"{impl} {dtype} {what}")
