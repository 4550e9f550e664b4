"""The choice of an engine, its explanation, and torch's own kernels as one of them."""

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_conformance
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnvariants
from attnvariants import attention, attention_varlen, engines, explain, fused, sdpa
from attnvariants.problem import build


def qkv(batch=2, heads=4, kv_heads=2, q_len=7, kv_len=7, dim=8, value_dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, value_dim)
    return [
        torch.randn(batch, *size, generator=generator).to(dtype).requires_grad_() for size in sizes
    ]


@pytest.mark.parametrize("options", [{}, {"learn": True}], ids=["softmax", "ssmax"])
@pytest.mark.parametrize("case", test_conformance.CASES)
def test_sdpa_is_the_reference(case, options):
    name = "ssmax" if options else "softmax"
    sizes, call = test_conformance.CASES[case]
    leaves, rest = test_conformance.call_of(name, options, sizes, call)
    if call.get("softcap"):
        with pytest.raises(ValueError, match=r"impl='sdpa' cannot run this call: \(1\) softcap"):
            attention(**leaves, variant=name, impl="sdpa", **rest)
        return
    results = []
    for impl in ("sdpa", "reference"):
        out = attention(**leaves, variant=name, impl=impl, **rest)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, leaves.values(), grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["mask", "bias", "geometry", "nothing"])
def test_sdpa_rows_that_see_nothing(kind):
    q, k, v = qkv(q_len=9, kv_len=0 if kind == "nothing" else 7)
    keep = torch.ones(9, 7, dtype=torch.bool)
    keep[3] = False
    call = {
        "mask": {"attn_mask": keep},
        "bias": {"bias": torch.zeros(9, 7).masked_fill(~keep, -torch.inf)},
        "geometry": {"causal": True},
        "nothing": {},
    }[kind]
    rows = {"mask": [3], "bias": [3], "geometry": [0, 1], "nothing": range(9)}[kind]
    out = attention(q, k, v, impl="sdpa", **call)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == (2, 4, 9, 8)
    for tensor in (out, dq, dk, dv):
        assert torch.isfinite(tensor).all()
    for row in range(9):
        assert (out[:, :, row] == 0).all() == (row in rows)
        if row in rows:
            assert (dq[:, :, row] == 0).all()
    # a blind row is shown everything on the way; nothing of that may reach keys and values
    for grad, want in zip(
        (dk, dv), torch.autograd.grad(attention(q, k, v, impl="reference", **call).sum(), (k, v)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(grad, want)


def test_sdpa_gets_no_row_without_a_key(monkeypatch):
    """Backends differ in what they make of one, NaN included."""
    given = []
    sdpa_of_torch = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        given.append(kwargs["attn_mask"])
        return sdpa_of_torch(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = qkv(q_len=9)
    keep = torch.ones(9, 7, dtype=torch.bool)
    keep[3] = False
    attention(q, k, v, impl="sdpa", attn_mask=keep, causal=True)
    attention(q, k, v, impl="sdpa", attn_mask=keep, bias=torch.randn(9, 7))
    assert given[0].any(-1).all()
    assert (given[1] > -torch.inf).any(-1).all()


def test_sdpa_half_precision_keeps_a_bias_exact():
    q, k, v = qkv(q_len=64, kv_len=64, dtype=torch.bfloat16)
    slopes = torch.full((4,), 0.37)
    # slopes and distances of this size are off by whole units in bfloat16
    bias = torch.full((64, 64), 1000.0) + torch.randn(64, 64)
    for call in ({"alibi_slopes": slopes}, {"bias": bias}):
        out = attention(q, k, v, impl="sdpa", **call)
        want = attention(*(t.double() for t in (q, k, v)), impl="reference", **call)
        assert out.dtype == torch.bfloat16
        assert float((out - want).detach().abs().max()) < 0.02


def test_weights_and_statistics_beside_any_engine():
    q, k, v = qkv()
    want = attention(q, k, v, impl="chunked", return_weights=True, return_stats=True)
    got = attention(q, k, v, impl="sdpa", return_weights=True, return_stats=True)
    torch.testing.assert_close(got, want)


def test_refusals_list_every_reason():
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="cannot run this call") as caught:
        attention(q, q, q, "softpick", impl="sdpa", dropout_p=0.5, softcap=2.0)
    assert str(caught.value) == (
        "impl='sdpa' cannot run this call: (1) softpick is not a softmax of its scores; (2) "
        "dropout_p would draw another mask than the other engines do; (3) softcap has no place in "
        "scaled_dot_product_attention. Use impl='chunked', which runs any, or impl='auto'."
    )
    wide = torch.randn(1, 2, 5, 320, dtype=torch.float64)
    unknown = attnvariants.Variant(doc="", ratio=lambda scores, rows: (scores, None))
    with pytest.raises(ValueError, match=r"impl='triton' cannot run this call: \(1\)") as caught:
        attention(wide, wide, wide, unknown, impl="triton")
    for reason in ("no kernels", "needs cuda", "float64", "head_dim 320", "Use impl='chunked'"):
        assert reason in str(caught.value)
    assert len(re.findall(r"\(\d\) ", str(caught.value))) >= 5


def test_missing_triton_is_said_at_the_call(monkeypatch):
    from attnvariants_kernels import _triton

    monkeypatch.setattr(_triton, "_problem", "Triton >= 3.6 is needed, found 2.0")
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match=r"\(1\) Triton >= 3.6 is needed, found 2.0; \(2\)"):
        attention(q, q, q, impl="triton")


CHOICES = {
    "plain": ({}, {}, "sdpa"),
    "causal": ({}, {"causal": True}, "sdpa"),
    "double": ({"dtype": torch.float64}, {}, "sdpa"),
    "ssmax": ({}, {"variant": "ssmax", "s": torch.ones(4)}, "sdpa"),
    "more_keys": ({"kv_len": 9}, {}, "sdpa"),
    "decode": ({"q_len": 1}, {"causal": True}, "sdpa"),
    "cache": ({"kv_len": 9}, {"causal": True}, "chunked"),
    "half": ({"dtype": torch.bfloat16}, {}, "chunked"),
    "value_dim": ({"value_dim": 4}, {}, "chunked"),
    "no_keys": ({"kv_len": 0}, {}, "chunked"),
    "mask": ({}, {"attn_mask": torch.ones(7, 7).bool()}, "chunked"),
    "window": ({}, {"window_size": (2, 0)}, "chunked"),
    "alibi": ({}, {"alibi_slopes": torch.ones(4)}, "chunked"),
    "bias": ({}, {"bias": torch.ones(7, 7)}, "chunked"),
    "softcap": ({}, {"softcap": 2.0}, "chunked"),
    "dropout": ({}, {"dropout_p": 0.1}, "chunked"),
    "softpick": ({}, {"variant": "softpick"}, "chunked"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_auto_on_a_cpu(case, monkeypatch):
    from attnvariants_kernels import _triton

    # the interpreter never runs unasked
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    sizes, call, engine = CHOICES[case]
    inputs = qkv(**sizes)
    explanation = explain(*inputs, **call)
    assert explanation.engine == engine
    assert set(explanation.reasons) == {"reference", "chunked", "triton", "sdpa"}
    assert all(explanation.reasons.values())
    taken = []
    monkeypatch.setattr(
        engines, "run", lambda name, q, k, v, problem: taken.append(name) or torch.zeros(())
    )
    attention(*inputs, **call)
    assert taken == [engine]


def on_device(value, device):
    """A fake tensor like `value`, if it is one."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=device)


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "window", "softcap", "softpick"])
@pytest.mark.parametrize("kernels", [True, False])
def test_auto_on_cuda(case, kernels, monkeypatch):
    monkeypatch.setattr(fused, "why_not", lambda *call: [] if kernels else ["none"])
    _, call, _ = CHOICES[case]
    with FakeTensorMode():
        inputs = [
            torch.empty(2, heads, 7, 8, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)
        ]
        moved = {k: on_device(v, "cuda") for k, v in call.items()}
        engine = explain(*inputs, **moved).engine
        long = [t.expand(-1, -1, -1, 8).repeat(1, 1, 2000, 1) for t in inputs]
        for_long = explain(*long, **moved).engine if case != "mask" else None
    if kernels:
        assert {engine, for_long} <= {"triton", None}
        return
    assert engine == ("chunked" if case in ("softcap", "softpick") else "sdpa")
    if case == "window":
        # a dense mask of 14,000 x 14,000 would have to be built
        assert for_long == "chunked"


def test_explanations_read_well_and_run_nothing():
    q, k, v = qkv()
    state = torch.get_rng_state()
    text = str(explain(q, k, v, "softpick", causal=True, dropout_p=0.5, eps=1e-3))
    assert torch.equal(torch.get_rng_state(), state)
    assert text.split("\n")[0] == "engine: chunked"
    assert "triton    query is on cpu" in text
    assert "softpick is not a softmax" in text
    refused = explain(q, k, v, "softpick", impl="sdpa", softcap=1.0)
    assert refused.engine == "none"
    assert len(refused.reasons["sdpa"]) == 2
    assert explain(q, k, v, impl="reference").engine == "reference"
    with pytest.raises(ValueError, match="unknown impl 'sdp'; did you mean 'sdpa'"):
        explain(q, k, v, impl="sdp")
    with pytest.raises(ValueError, match="softmax takes no options; got 'eps'"):
        explain(q, k, v, eps=1)


def test_explanation_of_a_packed_call(monkeypatch):
    from attnvariants_kernels import _triton

    q, k = torch.randn(12, 4, 16), torch.randn(12, 2, 16)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    call = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "causal": True}
    assert explain(q, k, k, **call).engine == "sdpa"
    slopes = torch.ones(2, 4)
    assert explain(q, k, k, "relu", **call, alibi_slopes=slopes).engine == "chunked"
    assert explain(q, k, k, impl="triton", **call).engine == "none"
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    monkeypatch.setattr(_triton, "_problem", "")
    assert explain(q, k, k, impl="triton", **call).engine == "triton"
    assert attention_varlen(q, k, k, cu, cu, impl="sdpa").shape == (12, 4, 16)


@pytest.mark.parametrize(
    "call",
    [
        {"causal": True},
        {"window_size": (2, 1), "softcap": 1.5},
        {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "scale": 0.3},
    ],
    ids=["causal", "window", "alibi"],
)
def test_flash_attn_gets_the_same_call(call, monkeypatch):
    """With our own drop-in in flash-attn's place, whose signature is the same."""

    def flash_attn_func(*args, **kwargs):
        return attnvariants.flash_attn_func(*args, impl="reference", **kwargs)

    module = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(sdpa, "_by_flash", lambda *call: True)
    q, k, v = qkv(q_len=5, kv_len=9)
    torch.testing.assert_close(
        attention(q, k, v, "ssmax", impl="sdpa", **call),
        attention(q, k, v, "ssmax", impl="reference", **call),
    )


def test_when_flash_attn_is_used(monkeypatch):
    monkeypatch.setattr(sdpa, "FLASH_ATTN", True)

    def used(
        dtype=torch.bfloat16, device="cuda", dim=64, value_dim=64, learned=False, **call
    ):  # fmt: skip
        with FakeTensorMode():
            q, v = (torch.empty(1, 2, 8, d, device=device, dtype=dtype) for d in (dim, value_dim))
            moved = {k: on_device(v, device) for k, v in call.items()}
            problem = build(q, q, v, attnvariants.get_variant("softmax"), {}, **moved)
            if learned:
                problem = replace(problem, slopes=problem.slopes.requires_grad_())
            return sdpa._by_flash(q, q, v, problem)

    assert used()
    assert used(causal=True, window_size=(3, 0), softcap=3.0, alibi_slopes=torch.ones(2))
    assert not used(device="cpu")
    assert not used(dtype=torch.float32)
    assert not used(value_dim=32)
    assert not used(dim=60, value_dim=60)
    assert not used(attn_mask=torch.ones(8, 8).bool())
    assert not used(offset=2)
    assert not used(alibi_slopes=torch.ones(2), learned=True)


def test_sdpa_compiles_in_one_graph():
    def run(q, k, v, mask, impl):
        return attention(q, k, v, "ssmax", causal=True, attn_mask=mask, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (7, 12):
        q, k, v = qkv(q_len=length, kv_len=length)
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
        mask[0, ..., :3] = False
        for given, impl in ((mask, "sdpa"), (None, "sdpa"), (None, "auto")):
            out = compiled(q, k, v, given, impl)
            torch.testing.assert_close(out, run(q, k, v, given, "chunked"), rtol=1e-5, atol=1e-5)
            grads = torch.autograd.grad(out.sum(), (q, k, v))
            assert all(torch.isfinite(grad).all() for grad in grads)


def test_cu_seqlens_are_read_once_a_tensor(monkeypatch):
    from attnvariants import checks

    reads = []

    class Boundaries(torch.Tensor):
        device = torch.device("cuda")

        def tolist(self):
            reads.append(1)
            return torch.Tensor.tolist(self)

    cu = torch.tensor([0, 3, 5], dtype=torch.int32).as_subclass(Boundaries)
    for _ in range(3):
        assert checks.check_cu_seqlens("cu_seqlens_q", cu, 5, "query") == [0, 3, 5]
    assert len(reads) == 1
    cu[1] = 4
    assert checks.check_cu_seqlens("cu_seqlens_q", cu, 5, "query") == [0, 4, 5]
    assert len(reads) == 2


def test_variants_load_while_a_call_is_compiled():
    code = """
import torch
from attnvariants import attention
def run(q):
    return attention(q, q, q, "softmax", impl="sdpa") + attention(q, q, q, "ssmax", impl="sdpa")
q = torch.randn(1, 2, 5, 8)
got = torch.compile(run, fullgraph=True, backend="eager")(q)
torch.testing.assert_close(got, run(q))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("impl", ["auto", "sdpa"])
def test_scales_of_zero_and_below(scale, impl):
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    got = attnvariants.attention(q, k, v, causal=True, scale=scale, impl=impl)
    want = attnvariants.attention(q, k, v, causal=True, scale=scale, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
