"""`pytest -m gpu`: the fused kernels on a CUDA device against float64, every part of the contract.

ATTNVARIANTS_GPU_TESTS="cpu:chunked" rehearses the tests themselves on a CPU with that engine.
"""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import attnvariants
from attnvariants import attention, attention_varlen

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
try:
    from bench.gpu_accuracy import plain, times_plain
finally:
    sys.path.pop(0)

DEVICE, IMPL = os.environ.get("ATTNVARIANTS_GPU_TESTS", "cuda:triton").split(":")
ON_GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_kernels = pytest.mark.skipif(not ON_GPU, reason="is about compiled kernels")
needs_operators = pytest.mark.skipif(IMPL != "triton", reason="is about the kernels' operators")

# label: (variant, options); tensors are learned and of one number a head
SETTINGS = {
    "softmax": ("softmax", {}),
    "ssmax": ("ssmax", {"s": (0.6, 1.1), "b": (-0.2, 0.3)}),
    "softpick": ("softpick", {}),
    "lssa": ("lssa", {}),
    "lssar": ("lssar", {}),
    "sa_softmax-x": ("sa_softmax", {"form": "x"}),
    "sa_softmax-minmax0": ("sa_softmax", {}),
    "relu": ("relu", {}),
    "relu-sigmoid": ("relu", {"act": "sigmoid", "length": 100}),
    "sparsemax": ("sparsemax", {}),
    "cosformer": ("cosformer", {"max_len": 4096}),
}
LISTED = {variant for variant, _ in SETTINGS.values()}
SETTINGS |= {name: (name, {}) for name in attnvariants.list_variants() if name not in LISTED}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote is NaN; torch's own switch reaches what kernels allocate."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed, dtype=torch.float64):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return numbers.to(DEVICE)


def make(setting, q_len=200, kv_len=None, batch=2, heads=4, kv_heads=2, dim=64, value_dim=None,
         dtype=torch.float32):  # fmt: skip
    """Leaves by name, rounded to dtype, and the plain options."""
    variant, options = SETTINGS[setting]
    kv_len = q_len if kv_len is None else kv_len
    leaves = {
        "query": normal(batch, heads, q_len, dim, seed=0).to(dtype),
        "key": normal(batch, kv_heads, kv_len, dim, seed=1).to(dtype),
        "value": normal(batch, kv_heads, kv_len, value_dim or dim, seed=2).to(dtype),
    }
    for name, value in options.items():
        if isinstance(value, tuple):
            leaves[name] = torch.linspace(*value, heads, device=DEVICE)
    rest = {n: v for n, v in options.items() if not isinstance(v, tuple)}
    return leaves, {"variant": variant, **rest}


def run(call, leaves, grad_out, cast=None):
    """out and the gradient of every leaf, by name."""
    tensors = {n: (t if cast is None else t.to(cast)).detach().clone().requires_grad_()
               for n, t in leaves.items()}  # fmt: skip
    out = call(**tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), grad_out.to(out.dtype))
    named = {f"gradient of {n}": grad for n, grad in zip(tensors, grads, strict=True)}
    return {"out": out.detach(), **named}


def fused(leaves, **call):
    """A call of the engine under test; skipped where it says that it does not do that."""
    try:
        return attention(**leaves, impl=IMPL, **call)
    except ValueError as error:
        if "cannot run this call" in str(error):
            pytest.skip(str(error))
        raise


def compare(call, leaves, tolerance=1e-4, engine=attention):
    """float32 of the engine under test against the float64 reference."""

    def ours(**tensors):
        return fused(tensors, **call) if engine is attention else engine(**tensors, impl=IMPL)

    def exact(**tensors):
        wide = {n: t.double() if torch.is_tensor(t) and t.dtype == torch.float32 else t
                for n, t in call.items()}  # fmt: skip
        return engine(**tensors, impl="reference", **(wide if engine is attention else {}))

    with torch.no_grad():
        shape = exact(**{n: t.double() for n, t in leaves.items()}).shape
    grad_out = normal(*shape, seed=9).float()
    got = run(ours, leaves, grad_out)
    want = run(exact, leaves, grad_out, torch.float64)
    for name, true in want.items():
        close(got[name], true, tolerance, name)


def close(got, want, tolerance, name):
    assert got.shape == want.shape, name
    assert torch.isfinite(got).all(), f"{name} is not finite"
    if want.numel():
        error, size = float((got.double() - want).abs().max()), float(want.abs().max())
        assert error <= tolerance * size + 1e-6, f"{name}: {error:.2e} of {size:.2e}"


def half_rule(setting, dtype, causal=True, **sizes):
    """Errors of out and all gradients at most twice those of plain PyTorch in the same dtype."""
    leaves, options = make(setting, dtype=dtype, **sizes)
    call = {**options, "causal": causal}
    grad_out = normal(*leaves["query"].shape, seed=9).to(dtype)
    got = run(lambda **t: fused(t, **call), leaves, grad_out)
    low = run(lambda **t: plain(t.pop("query"), t.pop("key"), t.pop("value"), **t, **call),
              leaves, grad_out)  # fmt: skip
    want = run(lambda **t: attention(**t, **call, impl="reference"), leaves, grad_out,
               torch.float64)  # fmt: skip
    for name, true in want.items():
        assert got[name].dtype == low[name].dtype
        # a gradient that is exactly 0, as with a single key, may come as a rounding of its terms
        times = times_plain(got[name], low[name], true, floor=1e-5)
        assert times <= 2.0, f"{name}: {times:.2f} times plain PyTorch's error"


def left_padding(batch, kv_len):
    keep = torch.ones(batch, 1, 1, kv_len, dtype=torch.bool, device=DEVICE)
    keep[0, ..., : kv_len // 3] = False
    return keep


def dead_rows(q_len, kv_len):
    keep = normal(2, 4, q_len, kv_len, seed=5) > 0
    keep[0, 0, 3] = False
    keep[1, :, 0] = False
    return keep


# name: (sizes, call, extra leaves)
FEATURES = {
    "causal": ({}, {"causal": True}, {}),
    "full": ({"kv_heads": 4}, {}, {}),
    "mqa": ({"kv_heads": 1}, {"causal": True}, {}),
    "cache": ({"q_len": 70, "kv_len": 300}, {"causal": True}, {}),
    "decode": ({"q_len": 1, "kv_len": 300}, {"causal": True}, {}),
    "more_queries": ({"q_len": 150, "kv_len": 40}, {"causal": True}, {}),
    "window": ({"q_len": 260}, {"causal": True, "window_size": (70, 0)}, {}),
    "window_both": ({"q_len": 130, "kv_len": 190}, {"window_size": (40, 30)}, {}),
    "padding": ({}, {"causal": True, "attn_mask": lambda: left_padding(2, 200)}, {}),
    "mask": ({}, {"attn_mask": lambda: dead_rows(200, 200)}, {}),
    "bias": ({"q_len": 140}, {"causal": True}, {"bias": lambda: normal(1, 4, 140, 140, seed=6)}),
    "alibi": ({"q_len": 140}, {"causal": True},
              {"alibi_slopes": lambda: normal(4, seed=7).abs() / 8}),
    "softcap": ({}, {"causal": True, "softcap": 3.0}, {}),
    "value_dim": ({"dim": 64, "value_dim": 40}, {"causal": True}, {}),
    "odd_head_dim": ({"dim": 24, "q_len": 131}, {"causal": True}, {}),
    "scale": ({}, {"scale": 0.3}, {}),
}  # fmt: skip


@every_setting
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(setting, dtype, causal):
    half_rule(setting, dtype, causal, q_len=333)


@every_setting
@pytest.mark.parametrize("feature", FEATURES)
def test_float32_against_float64(setting, feature):
    sizes, call, extra = FEATURES[feature]
    leaves, options = make(setting, **sizes)
    refuses = attnvariants.get_variant(options["variant"]).refuses
    if refuses.keys() & {*call, *extra}:
        pytest.skip(f"{options['variant']} gives it no meaning")
    call = {n: value() if callable(value) else value for n, value in call.items()}
    leaves |= {n: value().float() for n, value in extra.items()}
    compare({**options, **call}, leaves)


@every_setting
def test_strides(setting):
    leaves, options = make(setting, q_len=130)
    leaves = {
        n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t
        for n, t in leaves.items()
    }
    got = fused(leaves, causal=True, **options)
    dense = {n: t.contiguous() for n, t in leaves.items()}
    assert torch.equal(got, fused(dense, causal=True, **options))


@every_setting
@pytest.mark.parametrize("length", [1, 17, 127, 1031])
def test_lengths(setting, length):
    half_rule(setting, torch.bfloat16, q_len=length)


@every_setting
def test_empty(setting):
    for q_len, kv_len in ((0, 40), (40, 0)):
        leaves, options = make(setting, q_len=q_len, kv_len=kv_len)
        grad_out = torch.ones(2, 4, q_len, 64, device=DEVICE)
        found = run(lambda options=options, **t: fused(t, **options), leaves, grad_out)
        assert all((tensor == 0).all() for tensor in found.values())


@every_setting
def test_packed(setting):
    bounds = [0, 100, 101, 229, 229, 300]
    leaves, options = make(setting, q_len=300, batch=1)
    for name in ("query", "key", "value"):
        leaves[name] = leaves[name][0].transpose(0, 1).contiguous()
    cu = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def packed(impl, **tensors):
        try:
            return attention_varlen(
                **tensors, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=128, max_seqlen_k=128,
                causal=True, impl=impl, **options,
            )  # fmt: skip
        except ValueError as error:
            if "cannot run this call" in str(error):
                pytest.skip(str(error))
            raise

    compare({}, leaves, engine=packed)


@every_setting
def test_dropout_is_that_of_the_chunked_engine(setting):
    leaves, options = make(setting, q_len=150)
    grad_out = normal(2, 4, 150, 64, seed=9).float()

    def call(impl):
        def dropped(**tensors):
            generator = torch.Generator().manual_seed(4)
            more = {"causal": True, "dropout_p": 0.3, "generator": generator, **options}
            if impl == IMPL:
                return fused(tensors, **more)
            return attention(**tensors, impl=impl, **more)

        return dropped

    got, want = (run(call(impl), leaves, grad_out) for impl in (IMPL, "chunked"))
    for name, expected in want.items():
        close(got[name], expected.double(), 1e-4, name)


@every_setting
@pytest.mark.parametrize("level", [1e4, -1e4], ids=["high", "low"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_huge_scores_are_finite(setting, dtype, level):
    leaves, options = make(setting, q_len=160, dtype=dtype)
    leaves["query"][..., 0], leaves["key"][..., 0] = 100.0, level / 100.0
    scaled = {} if options["variant"] in ("lssa", "lssar") else {"scale": 1.0}
    grad_out = normal(2, 4, 160, 64, seed=9).to(dtype)
    found = run(lambda **t: fused(t, causal=True, **options, **scaled), leaves, grad_out)
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), name


@every_setting
def test_token_by_token_is_the_prefill(setting):
    leaves, options = make(setting, q_len=140)
    whole = fused(leaves, causal=True, **options)
    for position in (0, 1, 77, 139):
        seen = slice(0, position + 1)
        step = {n: t[:, :, seen] if n in ("key", "value") else t for n, t in leaves.items()}
        step["query"] = leaves["query"][:, :, position : position + 1]
        out = fused(step, causal=True, **options)
        close(out[:, :, 0], whole[:, :, position].double(), 1e-4, f"token {position}")


@every_setting
def test_backward_is_bitwise_repeatable(setting):
    torch.use_deterministic_algorithms(False)
    leaves, options = make(setting, q_len=1031, heads=8, dim=128, dtype=torch.bfloat16)
    grad_out = normal(*leaves["query"].shape, seed=9).bfloat16()

    def call(**tensors):
        return fused(tensors, causal=True, **options)

    first, second = (run(call, leaves, grad_out) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@needs_operators
@every_setting
def test_compiles_whole_and_once_for_all_lengths(setting):
    torch._dynamo.reset()

    def call(options, **tensors):
        return attention(**tensors, causal=True, impl=IMPL, **options)

    def any_length(tensors):
        for tensor in (tensors[name] for name in ("query", "key", "value")):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
        return tensors

    compiled = torch.compile(call, fullgraph=True)
    stances = ["default", "fail_on_recompile"]
    for stance, q_len in zip(stances, (150, 201), strict=True):
        leaves, options = make(setting, q_len=q_len, dtype=torch.bfloat16)
        grad_out = normal(2, 4, q_len, 64, seed=9).bfloat16()
        eager = run(lambda options=options, **t: fused(t, causal=True, **options), leaves, grad_out)
        with torch.compiler.set_stance(stance):
            got = run(
                lambda options=options, **t: compiled(options, **any_length(t)), leaves, grad_out
            )
        for name, tensor in eager.items():
            # a compiler may contract what goes before the kernel, never more than a rounding
            close(got[name], tensor.double(), 2e-2, name)


@needs_kernels
@every_setting
def test_a_new_length_compiles_no_kernel(setting, monkeypatch):
    import triton

    compiled = []

    def seen(*_, repr="", **__):
        compiled.append(repr)

    def call(q_len):
        leaves, options = make(setting, q_len=q_len, dtype=torch.bfloat16)
        grad_out = normal(2, 4, q_len, 64, seed=9).bfloat16()
        run(lambda **t: fused(t, causal=True, **options), leaves, grad_out)

    call(517)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", seen)
    for q_len in (600, 768, 1000, 1301):
        call(q_len)
        assert not compiled, f"{q_len} tokens"


@needs_kernels
@pytest.mark.parametrize("setting", ["softmax", "softpick", "lssar", "sparsemax", "cosformer"])
def test_too_little_shared_memory_takes_a_smaller_configuration(setting, monkeypatch):
    from triton.runtime.errors import OutOfResources

    refused = []

    class TooLarge(NamedTuple):
        launch: Any

        def run(self):
            refused.append(self.launch.config)
            raise OutOfResources(10**6, 10**5, "shared memory")

    def refusing(run_first):
        def first_does_not_fit(make, configs):
            # a kernel with one configuration needs next to no shared memory
            first = configs[0] if len(configs) > 1 else None
            return run_first(
                lambda config: [
                    TooLarge(launch) if config == first else launch for launch in make(config)
                ],
                configs,
            )

        return first_does_not_fit

    half_rule(setting, torch.bfloat16, q_len=300)
    for name, module in list(sys.modules.items()):
        if name.startswith("attnvariants_kernels.") and hasattr(module, "_fitting"):
            monkeypatch.setattr(module, "run_first", refusing(module.run_first))
            # what fitted before must not decide, nor what is found here stay
            monkeypatch.setattr(module, "_fitting", {})
    half_rule(setting, torch.bfloat16, q_len=300)
    assert refused


@every_setting
@pytest.mark.parametrize("dim", [16, 80, 96, 192, 256])
def test_head_dims(setting, dim):
    half_rule(setting, torch.bfloat16, q_len=200, dim=dim)
