"""Hostile input, half precision, gradcheck and edge sizes, for every variant and engine."""

import signal
from contextlib import contextmanager

import pytest
import torch
from engines import ENGINES, most, torch_engines
from torch._subclasses.fake_tensor import FakeTensorMode

import attnvariants
from attnvariants import attention

VARIANTS = attnvariants.list_variants()
DTYPES = [torch.float32] if "triton" in ENGINES else [torch.float32, torch.float64]
LEVELS = [1e4, -1e4, 30.0, -12.0, -30.0, -45.0, -55.0, -90.0, -200.0, 1e-6]
FORMS = [(name, {}) for name in VARIANTS] + [("sa_softmax", {"form": "x"}), ("lssar", {"p": 2.5})]


def leaves(*shapes, dtype=torch.float32, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(*shape, generator=generator, dtype=torch.float64) * size)
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize(("name", "options"), FORMS)
@pytest.mark.parametrize("level", most(LEVELS, [1e4, -55.0, 1e-6]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_size_are_finite(name, options, level, impl, dtype):
    q, k, v = leaves((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4), dtype=dtype)
    with torch.no_grad():
        # all scores near the level, with both signs around 0 for the smallest
        q[..., 0], k[..., 0] = abs(level) ** 0.5, level / abs(level) ** 0.5
    out = attention(q, k, v, name, causal=True, impl=impl, scale=1.0, **options)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    for tensor in (out, *grads):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", VARIANTS)
def test_mixed_extremes_are_finite(name, impl):
    q, k, v = leaves((1, 1, 40, 4), (1, 1, 40, 4), (1, 1, 40, 4), size=80.0)
    out = attention(q, k, v, name, impl=impl)
    for tensor in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("impl", ENGINES)
def test_softpick_first_block_far_below_zero(impl):
    # the published kernel loses such rows at -88 and gives NaN from -101 on
    q = torch.ones(1, 1, 1, 1, dtype=torch.float32)
    k = torch.cat([torch.full((96,), -150.0), torch.tensor([2.0, 1.0])]).view(1, 1, -1, 1)
    v = torch.arange(98.0).view(1, 1, -1, 1)
    got = attention(q, k, v, "softpick", scale=1.0, impl=impl)
    want = attention(q.double(), k.double(), v.double(), "softpick", scale=1.0, impl="reference")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_softpick_keeps_its_digits_near_zero(size, impl):
    q, k, v = leaves((1, 1, 8, 4), (1, 1, 8, 4), (1, 1, 8, 4), size=size)
    v = torch.ones_like(v)
    options = {"scale": 1.0, "eps": 1e-30}
    got = attention(q, k, v, "softpick", impl=impl, **options)
    want = attention(q.double(), k.double(), v.double(), "softpick", impl="reference", **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", VARIANTS)
def test_rows_that_see_nothing(name, impl):
    q, k, v = leaves((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 3))
    keep = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    keep[0, :, 1] = False
    keep[1] = False
    out, weights, stats = attention(
        q, k, v, name, attn_mask=keep, impl=impl, return_weights=True, return_stats=True
    )
    assert (out[0, :, 1] == 0).all()
    assert (out[1] == 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][0, :, 1] == 0).all()
    assert all((grad[1] == 0).all() for grad in grads)
    assert (weights[1] == 0).all()
    assert (stats.visible[1] == 0).all()
    assert (stats.mass[1] == 0).all()
    assert (stats.lse[1] == -torch.inf).all()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1), (1, 3, 1)]
)
def test_empty_and_single(name, batch, q_len, kv_len, impl):
    q, k, v = leaves((batch, 2, q_len, 4), (batch, 2, kv_len, 4), (batch, 2, kv_len, 3))
    out, weights, stats = attention(
        q, k, v, name, causal=True, impl=impl, return_weights=True, return_stats=True
    )
    assert out.shape == (batch, 2, q_len, 3)
    assert weights.shape == (batch, 2, q_len, kv_len)
    assert stats.mass.shape == (batch, 2, q_len)
    assert torch.isfinite(out).all()
    for leaf, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == leaf.shape
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", ["lssa", "lssar"])
def test_zero_vectors_have_no_direction(name, impl):
    q, k, v = leaves((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4))
    with torch.no_grad():
        q[:, :, 2] = 0
        k[:, :, 3] = 0
    out = attention(q, k, v, name, causal=True, impl=impl)
    dq, dk, _ = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.isfinite(out).all()
    assert (dq[:, :, 2] == 0).all()
    assert (dk[:, :, 3] == 0).all()


@torch_engines
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck(name, impl):
    q, k, v = leaves((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2), dtype=torch.float64, seed=3)
    learned = {n: torch.tensor([0.8, 1.1], dtype=torch.float64, requires_grad=True)
               for n in attnvariants.get_variant(name).learned}  # fmt: skip

    def call(q, k, v, *values):
        options = dict(zip(learned, values, strict=True))
        return attention(q, k, v, name, causal=True, impl=impl, **options)

    assert torch.autograd.gradcheck(call, (q, k, v, *learned.values()))


@torch_engines
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_within_twice_plain_torch(name, dtype):
    exact = leaves((1, 2, 33, 16), (1, 2, 33, 16), (1, 2, 33, 16), dtype=dtype, seed=4)
    grad_out = torch.randn(1, 2, 33, 16, generator=torch.Generator().manual_seed(5)).to(dtype)

    def run(tensors, **kwargs):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        out = attention(*tensors, name, causal=True, **kwargs)
        return [out, *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))]

    want = run([t.double() for t in exact], impl="reference")
    got = run(exact, impl="chunked")
    variant = attnvariants.get_variant(name)
    for what, mine, true in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert mine.dtype == dtype
        # one rounding of the result is what plain low-precision torch cannot avoid either
        rounding = (true - true.to(dtype).double()).abs().max()
        error = (mine.double() - true).abs().max()
        assert error <= 2 * rounding + 1e-6, (variant.name, what)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", VARIANTS)
def test_strides_do_not_matter(name, impl):
    # [batch, tokens, heads, 2 * dim], seen as every second number of a transposed layout
    q, k, v = leaves((2, 6, 3, 16), (2, 6, 3, 16), (2, 6, 3, 16))
    grad_out = torch.randn(2, 3, 6, 8)
    results = []
    for contiguous in (False, True):
        tensors = [t.transpose(1, 2)[..., ::2] for t in (q, k, v)]
        assert not tensors[0].is_contiguous()
        if contiguous:
            tensors = [t.contiguous() for t in tensors]
        out = attention(*tensors, name, causal=True, impl=impl)
        results.append([out, *torch.autograd.grad(out, (q, k, v), grad_out)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", ENGINES)
def test_autocast_casts_like_sdpa(impl):
    q, k, v = leaves((1, 1, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, "lssa", impl=impl)
    assert out.dtype == torch.bfloat16
    # only the inputs are rounded, and what is computed from those is the same
    want = attention(*(t.bfloat16() for t in (q, k, v)), "lssa", impl=impl)
    assert torch.equal(out, want)
    torch.autograd.grad(out.sum(), (q, k, v))
    if impl == "triton":
        return
    with torch.autocast("cpu", torch.bfloat16):
        exact, w = attention(
            q.double(), k.double(), v.double(), "lssa", impl=impl, return_weights=True
        )
    assert exact.dtype == w.dtype == torch.float64


@contextmanager
def deadline(seconds):
    def ring(*_):
        raise TimeoutError(f"still running after {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("impl", ENGINES)
def test_sparsemax_ends_on_scores_that_round_onto_the_threshold(impl):
    for seed in range(6):
        torch.manual_seed(seed)
        q, k, v = (torch.randint(-2, 3, (1, 1, 64, 36)).float().sign() for _ in range(3))
        with deadline(20):
            got = attention(q, k, v, "sparsemax", causal=True, impl=impl)
        want = attention(q.double(), k.double(), v.double(), "sparsemax", causal=True)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"p": 2.5}])
def test_lssar_gives_tied_rows_nothing(impl, dtype, options):
    x = torch.randn(1, 1, 1, 8, dtype=dtype).expand(1, 1, 40, 8)
    v = torch.randn(1, 1, 40, 8, dtype=dtype)
    out = attention(x, x, v, "lssar", causal=True, impl=impl, **options)
    assert (out[:, :, 3:] == 0).all()
    # the first three rows have no offset, so ties share them
    torch.testing.assert_close(out[:, :, 2], v[:, :, :3].mean(2))
    near = (x + 1e-7 * torch.randn(1, 1, 40, 8, dtype=dtype)).float().requires_grad_()
    out = attention(near, near, v.float(), "lssar", causal=True, impl=impl, **options)
    assert torch.isfinite(torch.autograd.grad(out.sum(), near)[0]).all()


def test_softpick_engines_agree_at_a_score_of_zero():
    q, k, v = leaves((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4))
    with torch.no_grad():
        k[:, :, 2] = 0
    grads = [
        torch.autograd.grad(attention(q, k, v, "softpick", impl=impl).sum(), (q, k, v))
        for impl in {"reference": 0, **dict.fromkeys(ENGINES)}
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", VARIANTS)
def test_nan_is_not_swallowed(name, impl):
    q, k, v = leaves((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4))
    with torch.no_grad():
        q[:, :, 4] = torch.nan
    out = attention(q, k, v, name, impl=impl)
    assert torch.isnan(out[:, :, 4]).all()
    assert torch.isfinite(out[:, :, [0, 1, 2, 3, 5]]).all()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", VARIANTS)
def test_nan_of_a_key_reaches_the_queries_that_see_it(name, impl):
    q, k, v = leaves((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4))
    with torch.no_grad():
        k[:, :, 4] = torch.nan
    out = attention(q, k, v, name, causal=True, impl=impl)
    assert torch.isnan(out[:, :, 4:]).all()
    assert torch.isfinite(out[:, :, :4]).all()


@pytest.mark.parametrize("impl", ENGINES)
def test_learned_numbers_of_another_dtype(impl):
    q, k, v = leaves((1, 4, 6, 4), (1, 4, 6, 4), (1, 4, 6, 4))
    s = torch.ones(4, dtype=torch.float64, requires_grad=True)
    out = attention(q, k, v, "ssmax", s=s, impl=impl)
    assert out.dtype == torch.float32
    assert torch.autograd.grad(out.sum(), s)[0].dtype == torch.float64


def test_changing_a_bias_before_the_backward_is_noticed():
    q, k, v = leaves((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4))
    bias = torch.zeros(6, 6, requires_grad=True)
    out = attention(q, k, v, bias=bias)
    with torch.no_grad():
        bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_output_may_be_changed_in_place():
    q, k, v = leaves((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4))
    want = torch.autograd.grad(attention(q, k, v, "softpick", impl="chunked").sum(), q)
    out = attention(q, k, v, "softpick", impl="chunked")
    out += 1
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], want[0])


@pytest.mark.parametrize("impl", ENGINES)
def test_odd_corners(impl):
    q, k, v = leaves((2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 4))
    mask = torch.ones(3, 0, dtype=torch.bool)
    assert (attention(q, k, v, attn_mask=mask, impl=impl) == 0).all()
    q, k, v = leaves((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 0))
    assert attention(q, k, v, impl=impl).shape == (2, 2, 3, 0)
    wide = torch.rand(2, 1, 1, 5).gt(0.5).expand(2, 2, 3, 5)
    got = attention(q, k, k, attn_mask=wide, impl=impl)
    torch.testing.assert_close(got, attention(q, k, k, attn_mask=wide.contiguous(), impl=impl))


def test_fake_tensors_leave_no_trace():
    with FakeTensorMode():
        attention(*(torch.randn(1, 1, 6, 4) for _ in range(3)), causal=True)
    q, k, v = leaves((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4))
    assert torch.isfinite(attention(q, k, v, causal=True)).all()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("form", ["x", "minmax0"])
def test_hidden_keys_take_no_share_of_an_extreme_score_of_0(form, impl):
    q, k, v = (torch.rand(1, 1, 6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k[0, 0, 0] = 0.0
    shown = torch.arange(6) < 3
    grads = []
    for keys, mask in ((k, shown.view(1, 1, 1, 6)), (k[:, :, :3], None)):
        key = keys.clone().requires_grad_()
        values = v[:, :, : keys.shape[2]]
        out = attention(q, key, values, "sa_softmax", attn_mask=mask, form=form, impl=impl)
        grads.append(torch.autograd.grad(out.square().sum(), key)[0][:, :, :3])
    torch.testing.assert_close(*grads)
