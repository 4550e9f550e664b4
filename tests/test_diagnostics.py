"""Diagnostics against their definitions, computed from dense weights row by row in float64."""

import math

import pytest
import torch
from figures import brute_force, check, visible

from attnvariants import attention
from attnvariants.api import iter_weights
from attnvariants.diagnostics import (
    DEFINITIONS,
    AttentionSums,
    activation_metrics,
    attention_metrics,
)
from attnvariants.diagnostics.activations import Moments

CALLS = {
    "causal": {"causal": True},
    "bidirectional": {},
    "window": {"causal": True, "window_size": (7, 0)},
    "softcap": {"causal": True, "softcap": 2.0},
}
VARIANTS = {
    "softmax": {},
    "softpick": {},
    "relu": {"act": "sigmoid"},
    "sa_softmax": {"form": "x"},
    "sparsemax": {},
    "lssar": {},
    "ssmax": {"s": torch.tensor([0.3, 0.5, 1.0, 2.0], dtype=torch.float64)},
}


def inputs(seed, batch=3, heads=4, kv_heads=2, q_len=23, kv_len=23, dim=8):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, length):
        return 2 * torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)

    return draw(heads, q_len), draw(kv_heads, kv_len), draw(kv_heads, kv_len)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_dense(variant, call):
    query, key, value = inputs(len(variant) + len(call))
    call, options = CALLS[call], VARIANTS[variant]
    out, weights = attention(
        query, key, value, variant, impl="reference", return_weights=True, **call, **options
    )
    found = attention_metrics(query, key, value, variant, sink_threshold=0.12, **call, **options)
    keep = visible(weights.shape, **call)
    check(found, brute_force(weights, keep, out, threshold=0.12))


@pytest.mark.parametrize("variant", ["softmax", "softpick", "relu"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding(variant, side, causal):
    query, key, value = inputs(5)
    tokens = torch.ones(3, 23, dtype=torch.bool)
    tokens[0, slice(0, 6) if side == "left" else slice(-6, None)] = False
    tokens[2, slice(0, 22) if side == "left" else slice(1, None)] = False
    call = {"causal": causal, "attn_mask": tokens[:, None, None, :]}
    out, weights = attention(
        query, key, value, variant, impl="reference", return_weights=True, **call
    )
    found = attention_metrics(query, key, value, variant, query_mask=tokens, **call)
    check(found, brute_force(weights, visible(weights.shape, **call), out, tokens))


def test_padding_on_the_left_is_as_without():
    query, key, value = inputs(6, batch=1)
    plain = attention_metrics(query, key, value, causal=True)
    pad = torch.zeros(1, 1, 5, 8, dtype=torch.float64)
    padded = [torch.cat([pad.expand(-1, x.shape[1], -1, -1), x], 2) for x in (query, key, value)]
    tokens = torch.arange(28)[None] >= 5
    found = attention_metrics(*padded, causal=True, attn_mask=tokens[:, None, None, :])
    check(found, plain.figures())


@pytest.mark.parametrize("shape", [(5, 23), (1, 9), (30, 7)])
def test_other_lengths(shape):
    q_len, kv_len = shape
    query, key, value = inputs(7, q_len=q_len, kv_len=kv_len)
    out, weights = attention(
        query, key, value, "softpick", impl="reference", return_weights=True, causal=True
    )
    found = attention_metrics(query, key, value, "softpick", causal=True)
    check(found, brute_force(weights, visible(weights.shape, causal=True), out))


def test_bias_alibi_and_scale():
    query, key, value = inputs(8)
    call = {
        "causal": True,
        "scale": 0.1,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64),
        "bias": torch.randn(1, 4, 23, 23, dtype=torch.float64),
    }
    out, weights = attention(query, key, value, impl="reference", return_weights=True, **call)
    found = attention_metrics(query, key, value, sink_threshold=0.1, **call)
    keep = visible(weights.shape, causal=True)
    check(found, brute_force(weights, keep, out, threshold=0.1))


def test_by_hand():
    # scores ln 3 and 0 for query 1: weights 3/4 and 1/4
    query = torch.tensor([[[[0.0], [1.0]]]])
    key = torch.tensor([[[[math.log(3)], [0.0]]]])
    found = attention_metrics(query, key, causal=True, scale=1.0)
    assert found.dead_head is None
    expected = {
        "sink_rate": 1.0,
        "sink_rate_without_query_0": 1.0,
        "sink_rate_proportional": 1.0,
        "sink_share": 0.75,
        "sink_weight": (1 + 0.75) / 2,
        "row_mass": 1.0,
        "dead_rows": 0.0,
        "entropy": -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2,
        "sparsity": 0.0,
    }
    for name, value in found.figures().items():
        assert value.item() == pytest.approx(expected[name], abs=1e-6), name


def test_query_0_alone_makes_no_sink_without_it():
    # ReLU over the visible count: query 0 gives token 0 the weight 8, every other query none
    key = torch.zeros(1, 1, 8, 8)
    key[..., 0, 0] = 8.0
    query = torch.zeros(1, 1, 8, 8)
    query[..., 0, 0] = 1.0
    found = attention_metrics(query, key, variant="relu", causal=True, scale=1.0)
    assert found.sink_rate.item() == 1.0
    assert found.sink_weight.item() == 1.0
    assert found.sink_rate_without_query_0.item() == 0.0
    assert found.sink_share.item() == 0.0
    assert found.dead_rows.item() == 7 / 8
    assert found.sink_rate_proportional.item() == 1.0


def test_rows_without_mass_are_dead_and_nothing_is_nan():
    query, key, value = inputs(9, heads=2, kv_heads=1)
    query, key = query.abs(), -key.abs()
    found = attention_metrics(query, key, value, "softpick", causal=True)
    assert found.dead_rows.tolist() == [1.0, 1.0]
    assert found.dead_head.tolist() == [1.0, 1.0]
    assert found.sparsity.tolist() == [1.0, 1.0]
    for name in ("sink_rate_proportional", "entropy", "row_mass", "sink_share"):
        assert getattr(found, name).tolist() == [0.0, 0.0], name


def test_rows_of_next_to_no_mass_are_dead():
    # sigmoids of -20: weights of 2e-9, all alike, of which neither share nor entropy is a finding
    query, key = torch.full((1, 1, 6, 4), -1.0), torch.full((1, 1, 6, 4), 5.0)
    options = {"act": "sigmoid", "scale": 1.0}
    found = attention_metrics(query, key, variant="relu", causal=True, **options)
    assert found.dead_rows.item() == 1.0
    assert found.entropy.item() == 0.0
    assert found.sink_rate_proportional.item() == 0.0
    assert found.sparsity.item() == 0.0
    assert found.sink_share.item() > 0.0


def test_nothing_visible_is_zero():
    query, key, value = inputs(10)
    hidden = torch.zeros(1, 1, 1, 23, dtype=torch.bool)
    found = attention_metrics(query, key, value, attn_mask=hidden)
    assert all(not figure.any() for figure in found.figures().values())


def test_batches_add_up():
    query, key, value = inputs(11, batch=5)
    whole = attention_metrics(query, key, value, "softpick", causal=True)
    sums = AttentionSums()
    for part in (slice(0, 2), slice(2, 5)):
        out = attention(query[part], key[part], value[part], "softpick", causal=True)
        blocks = iter_weights(query[part], key[part], "softpick", causal=True)
        sums.add(blocks, tuple(query[part].shape[:3]), out=out)
    check(sums.metrics(), whole.figures(), 1e-12)


def test_half_precision():
    query, key, value = (x.bfloat16() for x in inputs(12))
    found = attention_metrics(query, key, value, causal=True)
    exact = attention_metrics(query.double(), key.double(), value.double(), causal=True)
    check(found, exact.figures(), 1e-5)


def test_long_sequences_come_in_blocks():
    query, key = torch.randn(1, 1, 8192, 4), torch.randn(1, 1, 8192, 4)
    sizes = [block.weights.numel() for block in iter_weights(query, key, causal=True)]
    assert max(sizes) * 32 < 8192 * 8192
    found = attention_metrics(query, key, causal=True)
    assert found.row_mass.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sink_threshold": 1.5}, "sink_threshold must be a number between 0 and 1, got 1.5"),
        ({"query_mask": torch.ones(2, 2, dtype=torch.bool)}, r"query_mask must be bool"),
        ({"query_mask": torch.ones(3, 23)}, r"query_mask must be bool"),
        ({"variant": "softpik"}, "did you mean 'softpick'"),
        ({"eps": 1.0}, "softmax takes no options; got 'eps'"),
    ],
)
def test_bad_arguments(change, message):
    query, key, _ = inputs(1)
    with pytest.raises(ValueError, match=message):
        attention_metrics(query, key, **change)


def test_sums_refuse_what_does_not_fit():
    query, key, _ = inputs(1)
    sums = AttentionSums()
    with pytest.raises(ValueError, match="holds no batch"):
        sums.metrics()
    with pytest.raises(ValueError, match="out must have shape"):
        sums.add(iter_weights(query, key), (3, 4, 23), out=query[:1])
    sums.add(iter_weights(query, key), (3, 4, 23))
    with pytest.raises(ValueError, match="must have 4 heads, got 2"):
        sums.add(iter_weights(query[:, :2], key), (3, 2, 23))


def test_every_figure_is_defined():
    query, key, value = inputs(1)
    figures = attention_metrics(query, key, value).figures()
    activations = activation_metrics(torch.randn(2, 3, 4)).figures()
    assert set(figures) | set(activations) | {"loss", "dead_heads"} == set(DEFINITIONS)
    for name, definition in DEFINITIONS.items():
        assert definition.endswith("."), name


def test_kurtosis_by_definition():
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 7, dtype=torch.float64) ** 3 + 0.5
    found = activation_metrics(hidden)
    per_sequence = []
    for states in hidden:
        d = states.flatten() - states.mean()
        per_sequence.append(float((d**4).mean() / (states.std() ** 4 + 1e-6)))
    d = hidden - hidden.mean()
    assert found.kurtosis == pytest.approx(sum(per_sequence) / 3, rel=1e-12)
    assert found.kurtosis_pooled == pytest.approx(float((d**4).mean() / (d**2).mean() ** 2))
    assert found.max_abs == pytest.approx(float(hidden.abs().amax((1, 2)).mean()))
    assert found.largest == float(hidden.abs().max())
    norms = hidden.norm(dim=-1)
    ratio = (norms[:, 0] / norms[:, 1:].amax(-1)).mean()
    assert found.first_token_ratio == pytest.approx(float(ratio))


def test_kurtosis_of_a_normal_distribution_and_of_a_constant():
    torch.manual_seed(1)
    found = activation_metrics(torch.randn(4, 100, 500))
    assert found.kurtosis == pytest.approx(3.0, abs=0.05)
    assert found.kurtosis_pooled == pytest.approx(3.0, abs=0.05)
    constant = activation_metrics(torch.ones(2, 3, 4))
    assert constant.kurtosis == constant.kurtosis_pooled == 0.0
    assert activation_metrics(torch.zeros(1, 1, 4)).first_token_ratio == 0.0


def test_massive_activations():
    hidden = torch.full((2, 10, 10), 0.05)
    hidden[0, 0, 3] = 150.0
    hidden[0, 4, 4] = -101.0
    hidden[1, 0, 3] = 99.0
    assert activation_metrics(hidden).massive == 1.0
    # 150 is over 100, but not 1,000 times the median
    assert activation_metrics(hidden + 1.0).massive == 0.0
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 0] = False
    assert activation_metrics(hidden, mask).massive == 0.5


def test_moments_merge():
    torch.manual_seed(2)
    x = torch.randn(1000, dtype=torch.float64).exp()
    merged = Moments()
    for part in x.split([1, 10, 489, 500]):
        merged = merged.merge(Moments.of(part))
    whole = Moments.of(x)
    assert merged.kurtosis == pytest.approx(whole.kurtosis, rel=1e-10)
    assert merged.third == pytest.approx(whole.third, rel=1e-10)


@pytest.mark.parametrize(
    ("hidden", "mask", "message"),
    [
        (torch.ones(2, 3), None, r"hidden must be floating point with shape"),
        (torch.ones(2, 3, 4).long(), None, r"hidden must be floating point"),
        (torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), "token_mask must be bool"),
        (torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), "holds no sequence"),
    ],
)
def test_bad_hidden_states(hidden, mask, message):
    with pytest.raises(ValueError, match=message):
        activation_metrics(hidden, mask)
