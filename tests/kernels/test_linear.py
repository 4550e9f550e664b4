"""The linear kernels against the dense formula in float64, written from its definition."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from engines import kernels_compile as compiles
from engines import kernels_run as runs

from attnvariants_kernels import linear, linear_plan
from attnvariants_kernels._triton import INTERPRETED, why_not

DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
EPS = 1e-6


def make(batch=1, heads=1, kv_heads=1, q_len=40, kv_len=40, features=16, value_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        normal(batch, heads, q_len, features).relu() + 0.1,
        normal(batch, kv_heads, kv_len, features).relu() + 0.1,
        normal(batch, kv_heads, kv_len, value_dim),
        normal(batch, heads, q_len, value_dim),
    )


def dense(q, k, v, causal, scale, offset=None, key_mask=None):
    """Mask the products, then divide what they sum up by their sum."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    products = scale * (q @ k.transpose(2, 3))
    q_len, kv_len = products.shape[2:]
    offset = kv_len - q_len if offset is None else offset
    if causal:
        seen = torch.ones(q_len, kv_len, dtype=torch.bool).tril(offset)
        products = products.masked_fill(~seen, 0)
    if key_mask is not None:
        products = products.masked_fill(~key_mask.bool()[:, None, None, :], 0)
    return (products @ v) / products.sum(-1, keepdim=True).clamp(min=EPS)


def expected(q, k, v, grad, **call):
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = dense(*leaves, **call)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def found(q, k, v, grad, **call):
    q, k, v, grad = (tensor.to(DEVICE) for tensor in (q, k, v, grad))
    call = {"eps": EPS, "offset": k.shape[2] - q.shape[2], **call}
    if call.get("key_mask") is not None:
        call["key_mask"] = call["key_mask"].to(DEVICE)
    out, norm = linear.forward(q, k, v, **call)
    grads = linear.backward(grad, q, k, v, out, norm, **call)
    return [tensor.cpu() for tensor in (out, *grads)]


def error(actual, wanted):
    """Of all elements together, relative, or absolute where they cancel to less than 1."""
    if wanted.numel() == 0:
        return 0.0
    assert torch.isfinite(actual).all()
    return ((actual.double() - wanted).norm() / wanted.norm().clamp(min=1)).item()


def agree(actual, wanted, within=1e-5):
    for name, one, other in zip(("out", "dq", "dk", "dv"), actual, wanted, strict=True):
        assert one.shape == other.shape
        assert error(one, other) <= within, name


def float32(tensors):
    return [tensor.float() for tensor in tensors]


CASES = {
    "chunks": {"q_len": 70, "kv_len": 70},
    "grouped heads": {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 37, "kv_len": 37},
    "one key head": {"heads": 2, "q_len": 65, "kv_len": 65},
    "odd widths": {"features": 22, "value_dim": 5, "q_len": 33, "kv_len": 33},
    "wide values": {"features": 18, "value_dim": 40},
    "long prefix": {"q_len": 9, "kv_len": 101},
    "prefix and chunks": {"q_len": 50, "kv_len": 83},
    "blind rows": {"q_len": 75, "kv_len": 35},
    "one query": {"q_len": 1, "kv_len": 66},
    "one key": {"q_len": 34, "kv_len": 1},
    "one token": {"q_len": 1, "kv_len": 1},
    "no query": {"q_len": 0, "kv_len": 5},
    "no key": {"q_len": 5, "kv_len": 0},
    "no batch": {"batch": 0},
}


@runs
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(case, causal):
    tensors = make(**CASES[case])
    wanted = expected(*tensors, causal=causal, scale=0.7)
    agree(found(*float32(tensors), causal=causal, scale=0.7), wanted)


@runs
@pytest.mark.parametrize("offset", [0, -20, 50])
def test_any_alignment(offset):
    tensors = make(q_len=38, kv_len=70)
    wanted = expected(*tensors, causal=True, scale=1.0, offset=offset)
    agree(found(*float32(tensors), causal=True, scale=1.0, offset=offset), wanted)


@runs
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_padding(causal):
    tensors = make(batch=2, heads=2, q_len=41, kv_len=66)
    mask = torch.rand(2, 66, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[1] = False
    wanted = expected(*tensors, causal=causal, scale=1.0, key_mask=mask)
    q, k, v, grad = float32(tensors)
    hidden = ~mask[:, None, :, None]
    k, v = k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("nan"))
    mask = mask if causal else mask.to(torch.uint8)
    agree(found(q, k, v, grad, causal=causal, scale=1.0, key_mask=mask), wanted)


LENGTHS = [(5, 9), (0, 3), (40, 40), (70, 37), (3, 0), (33, 66)]


def pack(tensors, lengths, features):
    """Sequences side by side, tokens first in memory; also boundaries and the longest."""
    q_lens, k_lens = zip(*lengths, strict=True)
    rows = [sum(q_lens), sum(k_lens), sum(k_lens), sum(q_lens)]
    packed = [
        torch.cat([one.transpose(1, 2)[0] for one in parts]).transpose(0, 1).unsqueeze(0).float()
        for parts in zip(*tensors, strict=True)
    ]
    assert [tensor.shape[2] for tensor in packed] == rows
    bounds = [torch.tensor([0, *lens]).cumsum(0).int().to(DEVICE) for lens in (q_lens, k_lens)]
    names = dict(zip(("cu_q", "cu_k"), bounds, strict=True))
    return packed, {**names, "max_q": max(q_lens), "max_k": max(k_lens)}


@runs
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_packed(causal):
    parts = [
        make(heads=2, q_len=q_len, kv_len=kv_len, seed=seed)
        for seed, (q_len, kv_len) in enumerate(LENGTHS)
    ]
    packed, call = pack(parts, LENGTHS, 16)
    actual = found(*packed, causal=causal, scale=1.0, **call)
    for index, part in enumerate(parts):
        wanted = expected(*part, causal=causal, scale=1.0)
        spans = [slice(*list(pairwise(call[name].tolist()))[index]) for name in ("cu_q", "cu_k")]
        cut = [spans[0], spans[0], spans[1], spans[1]]
        agree([x[:, :, span] for x, span in zip(actual, cut, strict=True)], wanted)


@runs
def test_tf32_rounds_to_nearest():
    tensors = make(q_len=70, kv_len=70)
    wanted = expected(*tensors, causal=True, scale=1.0)
    actual = found(*float32(tensors), causal=True, scale=1.0, precision="tf32")
    agree(actual, wanted, 2e-3)
    assert error(actual[0], wanted[0]) > 1e-5


@runs
def test_any_strides():
    tensors = make(heads=2, kv_heads=2, q_len=33, kv_len=33)
    wanted = expected(*tensors, causal=True, scale=1.0)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in float32(tensors)]
    agree(found(*tokens_first, causal=True, scale=1.0), wanted)
    width_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in float32(tensors)]
    agree(found(*width_first, causal=True, scale=1.0), wanted)


@runs
def test_clamped_norms_have_no_gradient():
    q, k, v, grad = make(q_len=35, kv_len=35)
    q[:, :, ::2] *= 1e-8
    wanted = expected(q, k, v, grad, causal=True, scale=1.0)
    actual = found(*float32((q, k, v, grad)), causal=True, scale=1.0)
    agree(actual, wanted)
    # what is not clamped, which is small beside the rest
    odd = [x[:, :, 1::2] for x in (actual[0], actual[1], wanted[0], wanted[1])]
    assert error(odd[0], odd[2]) <= 1e-5
    assert error(odd[1], odd[3]) <= 1e-5


@runs
def test_equal_values_leave_no_gradient_of_the_features():
    q, k, v, grad = float32(make(q_len=40, kv_len=40))
    _, dq, dk, _ = found(q, k, torch.ones_like(v), grad, causal=True, scale=1.0)
    assert dq.abs().max() <= 1e-5
    assert dk.abs().max() <= 1e-5


@runs
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_bitwise_repeatable(causal):
    tensors = float32(make(heads=4, kv_heads=2, q_len=41, kv_len=41))
    first, second = (found(*tensors, causal=causal, scale=1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@runs
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0], ids=["small", "usual", "large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_as_good_as_plain_torch(dtype, size):
    q, k, v, grad = (tensor.to(dtype) for tensor in make(q_len=97, kv_len=97, heads=2))
    q = q * size
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    plain = dense(*leaves, causal=True, scale=1.0)
    plain = [plain.detach(), *torch.autograd.grad(plain, leaves, grad)]
    wanted = expected(*(x.double() for x in (q, k, v, grad)), causal=True, scale=1.0)
    actual = found(q, k, v, grad, causal=True, scale=1.0)
    for one, other, exact in zip(actual, plain, wanted, strict=True):
        assert one.dtype == dtype
        assert error(one, exact) <= 2 * error(other, exact)


@runs
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tiles_that_ship(monkeypatch, dtype, causal):
    monkeypatch.setattr(linear_plan, "INTERPRETED", False)
    monkeypatch.setattr(linear_plan, "_fitting", {})
    tensors = make(heads=2, q_len=300, kv_len=300, features=160, value_dim=80)
    tensors = [tensor.to(dtype) for tensor in tensors]
    wanted = expected(*(x.double() for x in tensors), causal=causal, scale=1.0)
    actual = found(*tensors, causal=causal, scale=1.0)
    agree(actual, wanted, 1e-5 if dtype == torch.float32 else 1e-2)


@runs
@pytest.mark.parametrize("prefill", [0, 35, 64])
def test_decoding_goes_on_from_prefill(prefill):
    length = prefill + 3
    q, k, v, _ = float32(make(batch=2, heads=4, kv_heads=2, q_len=length, kv_len=length))
    q, k, v = (tensor.to(DEVICE) for tensor in (q, k, v))
    call = {"causal": True, "offset": 0, "eps": EPS, "scale": 0.7}
    whole, _, last = linear.forward(q, k, v, return_state=True, **call)
    start = [tensor[:, :, :prefill] for tensor in (q, k, v)]
    out, _, state = linear.forward(*start, return_state=True, **call)
    parts = [out]
    for i in range(prefill, length):
        token = [tensor[:, :, i : i + 1] for tensor in (q, k, v)]
        out, state = linear.decode_step(*token, state, eps=EPS, scale=0.7)
        parts.append(out)
    assert error(torch.cat(parts, 2), whole.double()) <= 1e-6
    for one, other in zip(state, last, strict=True):
        assert error(one, other.double()) <= 1e-6


@runs
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_state_of_packed_and_padded_keys(causal):
    parts = [
        make(heads=2, q_len=q_len, kv_len=kv_len, seed=seed)
        for seed, (q_len, kv_len) in enumerate(LENGTHS)
    ]
    (q, k, v, _), names = pack(parts, LENGTHS, 16)
    call = {"causal": causal, "offset": 0, "eps": EPS, "scale": 1.0, "return_state": True}
    _, _, state = linear.forward(*(x.to(DEVICE) for x in (q, k, v)), **names, **call)
    for index, (_, k, v, _) in enumerate(parts):
        assert error(state.memory[index].cpu(), (k.transpose(2, 3) @ v)[0]) <= 1e-6
        assert error(state.total[index].cpu(), k.sum(2)[0]) <= 1e-6

    q, k, v, _ = make(kv_len=70)
    mask = torch.arange(70)[None] % 3 > 0
    tensors = (tensor.to(DEVICE) for tensor in float32((q, k, v)))
    *_, state = linear.forward(*tensors, key_mask=mask.to(DEVICE), **call)
    k = k * mask[:, None, :, None]
    assert error(state.memory.cpu(), k.transpose(2, 3) @ v) <= 1e-6


def test_decoding_takes_one_token():
    q, k, v, _ = float32(make(q_len=2, kv_len=2))
    state = linear.State(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16))
    with pytest.raises(ValueError, match="one token at a time, got 2 queries"):
        linear.decode_step(q, k, v, state, eps=EPS, scale=1.0)


def plans(tokens, causal, head_dim=64, architecture=None, dtype=torch.bfloat16, **call):
    def meta(*shape, dtype=dtype):
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    q, k = meta(4, tokens, 2 * head_dim), meta(2, tokens, 2 * head_dim)
    v, out = meta(2, tokens, head_dim), meta(4, tokens, head_dim)
    norm = meta(4, tokens, dtype=torch.float32)
    call = {"causal": causal, "offset": 0, "eps": EPS, "scale": 1.0, **call}
    call["architecture"] = architecture
    forward = linear.plan_forward(q, k, v, **call)
    backward = linear.plan_backward(out, q, k, v, out, norm, **call)
    return [*forward.values(), *backward.values()]


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "never")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_memory_is_linear_in_the_tokens(causal, packed):
    def elements(tokens):
        call = {}
        if packed:
            bounds = torch.empty(tokens // 4 + 1, dtype=torch.int32, device="meta")
            call = {"cu_q": bounds, "cu_k": bounds, "max_q": tokens, "max_k": tokens}
        tensors = {
            id(value): value.numel()
            for launch in plans(tokens, causal, **call)
            for value in launch.arguments.values()
            if isinstance(value, torch.Tensor)
        }
        return sum(tensors.values())

    few, many = elements(4096), elements(8192)
    assert 1.9 * few <= many + 10**5
    assert many <= 2 * few
    # out, norm, the gradients, g and delta are already 3.5 of these
    assert many <= 8 * 8192 * (6 * 128 + 2 * 64)


SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@compiles
@pytest.mark.aot
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("architecture", SHARED)
def test_compiles_ahead_of_time(architecture, head_dim, causal):
    for launch in plans(4096, causal, head_dim, architecture):
        assert launch.compile(architecture).metadata.shared <= SHARED[architecture]
