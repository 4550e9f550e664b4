"""Inputs from 1e-20 to 1e30: finite where float64 is, and as exact as plain torch."""

import magnitudes
import pytest
import torch
from engines import torch_engines

from attnvariants import attention, get_variant, list_variants
from attnvariants.api import iter_weights

pytestmark = torch_engines

SIZES = [
    (1e30, 1e30, 1.0),
    (1e30, 1e30, 1e30),
    (1e-20, 1e-20, 1e-20),
    (1e-20, 1e20, 1e20),
    (1.0, 1e-20, 1.0),
    (1e-3, 1e-3, 1.0),
    (1e5, 1e5, 1.0),
    (1.0, 1.0, 1e30),
]
HALF = [(1e-7, 1e-7, 1.0), (1e-3, 1e-3, 1e-3), (3e2, 3e2, 1.0), (8e3, 8e3, 8e3), (1e-7, 1.0, 1.0)]


def sweep(form, impl, dtype, unit=None):
    name, options = form
    for size in HALF if dtype == torch.float16 else SIZES:
        assert magnitudes.faults(name, options, impl, dtype, size, unit=unit) == [], size


@pytest.mark.parametrize("dtype", magnitudes.DTYPES)
@pytest.mark.parametrize("form", magnitudes.FORMS, ids=magnitudes.identifier)
def test_chunked_at_every_magnitude(form, dtype):
    sweep(form, "chunked", dtype)


@pytest.mark.parametrize("name", list_variants())
def test_reference_at_every_magnitude(name):
    sweep((name, {}), "reference", torch.float32)


@pytest.mark.parametrize("dtype", magnitudes.DTYPES)
@pytest.mark.parametrize("name", ["softmax", "ssmax"])
def test_sdpa_at_every_magnitude(name, dtype):
    sweep((name, {}), "sdpa", dtype, None if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("name", [n for n in list_variants() if get_variant(n).row_sum == "one"])
def test_weights_of_scores_beyond_float32_sum_to_one(name, impl):
    q, k, v = (magnitudes.numbers((1, 2, 6, 4), torch.float32, 1e25, i).float() for i in range(3))
    _, weights, stats = attention(
        q, k, v, name, causal=True, impl=impl, return_weights=True, return_stats=True
    )
    assert weights.dtype == stats.mass.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6))
    torch.testing.assert_close(stats.mass, torch.ones(1, 2, 6))
    for block in iter_weights(q, k, name, causal=True):
        assert block.weights.dtype == torch.float32
        torch.testing.assert_close(block.weights.sum(-1), torch.ones(1, 2, 6))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_dropout_beyond_float32_drops_what_it_drops_within(impl):
    q, k, v = (magnitudes.numbers((1, 1, 8, 4), torch.float32, 1.0, i).float() for i in range(3))
    drawn = [
        attention(
            size * q, size * k, v, "relu", impl=impl, dropout_p=0.5, return_weights=True,
            generator=torch.Generator().manual_seed(1),
        )[1]
        for size in (1.0, 1e10)
    ]  # fmt: skip
    torch.testing.assert_close(drawn[1] / 1e20, drawn[0])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("name", ["lssa", "lssar"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e20, 1e30])
def test_directions_of_vectors_of_any_length(name, size, impl):
    q, k, v = (magnitudes.numbers((1, 1, 8, 4), torch.float32, 1.0, i).float() for i in range(3))
    want = attention(q, k, v, name, impl=impl)
    # one row alone, so that the others are ordinary
    q[:, :, 3] *= size
    k[:, :, 5] *= size
    q.requires_grad_()
    out = attention(q, k, v, name, impl=impl)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert not grad.isnan().any()
    assert grad[:, :, :3].isfinite().all()


@pytest.mark.parametrize("name", ["softmax", "ssmax", "softpick", "lssa", "sa_softmax"])
@pytest.mark.parametrize("offset", [-3e4, -1e3, 1e3, 3e4])
@pytest.mark.parametrize("impl", ["chunked", "sdpa"])
def test_an_offset_of_the_row_costs_no_digits(name, offset, impl):
    if impl == "sdpa" and not get_variant(name).softmax_scores:
        return
    # what float32 makes of scores and offset together is what both get
    form = name, {"form": "x"} if name == "sa_softmax" else {}
    shape = 1, 2, 8, 8
    whole = magnitudes.numbers(shape, torch.float32, 1.0, 3).mul(64).round() / 64 + offset
    call = magnitudes.call_of(*form, torch.float32, (1.0, 1.0, 1.0), tokens=8)
    call.leaves["query"].zero_()
    call.leaves["bias"] = whole.float().double()
    wanted, found = call.run("reference", torch.float64), call.run(impl, torch.float32)
    largest = wanted["out"].abs().max()
    assert (found["out"] - wanted["out"]).abs().max() <= 2e-6 * largest


def test_softcap_has_its_slope_where_it_is_nearly_flat():
    call = magnitudes.call_of("softmax", {}, torch.float32, (4.0, 4.0, 1.0), softcap=1.0)
    wanted, found = call.run("reference", torch.float64), call.run("chunked", torch.float32)
    for name in ("query", "key"):
        row = wanted[name].abs().amax(-1, keepdim=True)
        assert ((found[name] - wanted[name]).abs() <= 1e-4 * row + 1e-12).all()


def test_half_precision_masks_add_up_in_float32():
    q, k, v = (magnitudes.numbers((1, 1, 4, 4), torch.float16, 1.0, i).half() for i in range(3))
    mask, bias = torch.full((4, 4), 2048.0).half(), torch.ones(4).half()
    mask[:, 1], bias[1] = 2047.0, 2.0
    # 2048 + 1 is not a number of float16
    got = attention(q, k, v, attn_mask=mask, bias=bias, impl="chunked")
    torch.testing.assert_close(got, attention(q, k, v, impl="chunked"), rtol=0, atol=2e-3)


def test_a_temperature_may_leave_the_range_of_float16():
    q, k, v = (magnitudes.numbers((1, 1, 6, 8), torch.float16, 1.0, i).half() for i in range(3))
    inputs = 2e4 * q, 1e-3 * k, v
    got = attention(*inputs, "ssmax", s=9.0, impl="sdpa")
    want = attention(*(x.double() for x in inputs), "ssmax", s=9.0, impl="reference")
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3)
