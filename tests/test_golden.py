"""The committed float64 vectors: outputs and all gradients, every engine."""

import json
from pathlib import Path

import pytest
import torch
from engines import ENGINES
from safetensors.torch import load_file

from attnvariants import attention

FOLDER = Path(__file__).parent / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())
INPUTS = load_file(FOLDER / "inputs.safetensors")
CALLS = {
    "lssar_p3": ("lssar", {"p": 3.0}),
    "lssar_p15": ("lssar", {"p": 15.0}),
    "sa_softmax_x": ("sa_softmax", {"form": "x"}),
    "sa_softmax_minmax0": ("sa_softmax", {"form": "minmax0"}),
    "relu_visible": ("relu", {}),
    "relu_kv": ("relu", {"length": "kv"}),
    "relu2_visible": ("relu", {"act": "relu2"}),
    "cosformer_M64": ("cosformer", {"max_len": 64}),
}


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", INDEX)
def test_golden(name, impl):
    stored = load_file(FOLDER / f"{name}.safetensors")
    dtype, budget = (torch.float32, 1e-5) if impl == "triton" else (torch.float64, 1e-9)
    variant, options = CALLS.get(name, (name, {}))
    for case in INDEX[name]["cases"]:
        leaves = [INPUTS[f"{case}/{n}"].to(dtype).clone().requires_grad_() for n in "qkv"]
        learned = {
            p: stored[f"{case}/{p}"].to(dtype).clone().requires_grad_()
            for p in INDEX[name]["params"]
        }
        out = attention(
            *leaves,
            variant,
            causal=case in ("causal", "left_pad", "decode"),
            attn_mask=INPUTS.get(f"{case}/mask"),
            impl=impl,
            **options,
            **learned,
        )
        close(out, stored[f"{case}/out"], budget)
        d_out = INPUTS[f"{case}/dout"].to(dtype)
        grads = torch.autograd.grad(out, [*leaves, *learned.values()], d_out)
        for what, grad in zip(["q", "k", "v", *learned], grads, strict=True):
            # that of a learned number sums all roundings up: the float32 reference is 2e-5 off
            more = 3 if what in learned and impl == "triton" else 1
            close(grad, stored[f"{case}/d{what}"], more * budget)


def close(found, stored, budget):
    assert torch.isfinite(found).all()
    assert float((found - stored).abs().max()) <= budget * max(1.0, float(stored.abs().max()))
