"""Diagnostics against their definitions, computed from dense weights row by row in float64."""

import json
import math

import pytest
import torch

from attnvariants import attention
from attnvariants.api import iter_weights
from attnvariants.diagnostics import (
    DEFINITIONS,
    AttentionSums,
    activation_metrics,
    attention_metrics,
    diagnose,
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


def visible(shape, causal=False, window_size=None, attn_mask=None, **_):
    """[batch, heads, q_len, kv_len] bool, from the definition."""
    _, _, q_len, kv_len = shape
    distance = torch.arange(kv_len) - (torch.arange(q_len)[:, None] + kv_len - q_len)
    keep = torch.ones(shape, dtype=torch.bool)
    if causal:
        keep &= distance <= 0
    if window_size is not None:
        keep &= distance >= -window_size[0]
    return keep if attn_mask is None else keep & attn_mask


def brute_force(weights, keep, out=None, query_mask=None, threshold=0.3):
    """Every figure from its sentence, with loops."""
    batch, heads, q_len, _ = weights.shape
    figures = {name: [] for name in (
        "sink_rate", "sink_rate_without_query_0", "sink_rate_proportional", "sink_share",
        "sink_weight", "row_mass", "dead_rows", "entropy", "sparsity", "dead_tokens", "dead_head",
    )}  # fmt: skip

    def mean(numbers):
        return sum(numbers) / len(numbers) if numbers else 0.0

    for h in range(heads):
        sinks, choosing, proportional, alphas = [], [], [], []
        on_sink = over_all = 0.0
        masses, dead, entropies, zeros, silent = [], [], [], [], []
        for b in range(batch):
            rows = [
                i for i in range(q_len)
                if keep[b, h, i].any() and (query_mask is None or query_mask[b, i])
            ]  # fmt: skip
            if not rows:
                continue
            token_0 = min(int(keep[b, h, i].nonzero()[0]) for i in rows)
            seeing = [i for i in rows if keep[b, h, i, token_0]]
            later = [i for i in seeing if keep[b, h, i].sum() > 1]
            alpha = mean([float(weights[b, h, i, token_0]) for i in seeing])
            alphas.append(alpha)
            sinks.append(alpha > threshold)
            if later:
                choosing.append(mean([float(weights[b, h, i, token_0]) for i in later]) > threshold)
            shares = []
            for i in rows:
                w = weights[b, h, i]
                total = float(w.abs().sum())
                masses.append(float(w.sum()))
                dead.append(total < 1e-6)
                zeros += [float(x) == 0.0 for x in w[keep[b, h, i]]]
                if i in later:
                    on_sink += abs(float(w[token_0]))
                    over_all += total
                if total >= 1e-6:
                    p = [abs(float(x)) / total for x in w]
                    entropies.append(-sum(x * math.log(x) for x in p if x > 0))
                    if i in seeing:
                        shares.append(p[token_0])
                if out is not None:
                    silent.append(float(out[b, h, i].abs().max()) < 1e-6)
            proportional.append(mean(shares) > threshold)
        for name, value in (
            ("sink_rate", mean(sinks)),
            ("sink_rate_without_query_0", mean(choosing)),
            ("sink_rate_proportional", mean(proportional)),
            ("sink_share", on_sink / over_all if over_all else 0.0),
            ("sink_weight", mean(alphas)),
            ("row_mass", mean(masses)),
            ("dead_rows", mean(dead)),
            ("entropy", mean(entropies)),
            ("sparsity", mean(zeros)),
            ("dead_tokens", mean(silent)),
            ("dead_head", float(bool(silent) and mean(silent) >= 0.95)),
        ):
            figures[name].append(value)
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def check(found, expected, tolerance=1e-10):
    for name, value in found.figures().items():
        assert value.dtype == torch.float64
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


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


# Models


def llama(**changes):
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        vocab_size=50, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def ids(batch=4, tokens=16):
    return torch.randint(1, 50, (batch, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("build", [llama, gpt2, bert])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_diagnose_against_eager_weights(build, padding):
    model, batch = build(), ids()
    mask = torch.ones_like(batch)
    if padding != "none":
        mask[1, slice(0, 5) if padding == "left" else slice(-5, None)] = 0
    report = diagnose(model, batch, attention_mask=mask, sink_threshold=0.15, batch_size=3)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(batch, attention_mask=mask, output_attentions=True,
                        output_hidden_states=True)  # fmt: skip
    tokens = mask.bool()
    keep = visible(outputs.attentions[0].shape, causal=build is not bert)
    keep = keep & tokens[:, None, None, :]
    for layer, weights in zip(report.layers, outputs.attentions, strict=True):
        assert layer.variant == "softmax"
        expected = brute_force(weights.double() * keep, keep, None, tokens, threshold=0.15)
        for name, value in layer.metrics.figures().items():
            if not name.startswith("dead_"):
                torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5, msg=name)
    assert len(report.hidden) == len(outputs.hidden_states)
    for metrics, states in zip(report.hidden.values(), outputs.hidden_states, strict=True):
        expected = activation_metrics(states, tokens)
        for name, value in metrics.figures().items():
            assert value == pytest.approx(expected.figures()[name], rel=1e-3), name
    assert report.tokens == int(mask.sum())


def test_diagnose_leaves_the_model_as_it_was():
    model = llama().train()
    model.model.layers[0].eval()
    before = set(model.state_dict()), model.config._attn_implementation
    modes = [module.training for module in model.modules()]
    diagnose(model, ids())
    assert (set(model.state_dict()), model.config._attn_implementation) == before
    assert [module.training for module in model.modules()] == modes
    assert not hasattr(model.config, "attn_variants")

    from attnvariants.hf import dispatch

    assert dispatch.observers == []


def test_diagnose_of_a_patched_model():
    from attnvariants import patch

    model, batch = llama(), ids()
    with patch(model, "softpick", layers=[1]) as handle:
        report = diagnose(model, batch)
        assert handle.active
        assert hasattr(model.model.layers[1].self_attn, "attn_variant")
        assert not hasattr(model.model.layers[0].self_attn, "attn_variant")
    assert report.variants == ("softmax", "softpick")
    assert report.layers[0].metrics.row_mass.sub(1).abs().max() < 1e-5
    assert report.layers[1].metrics.row_mass.max() < 0.99
    with patch(model, "ssmax", s=torch.tensor([0.0, 0.1, 1.0, 5.0])):
        entropy = diagnose(model, batch).layers[0].metrics.entropy
    assert entropy[0] > entropy[3]


def test_report():
    model, batch = llama(), ids()
    seen = []
    report = diagnose(model, batch, batch_size=3, progress=lambda *done: seen.append(done))
    assert seen == [(3, 4), (4, 4)]
    rows = report.rows()
    assert len(rows) == 8
    assert rows[5]["layer"] == "model.layers.1.self_attn"
    assert rows[5]["head"] == 1
    summary = report.summary()
    rates = [row["sink_rate"] for row in rows]
    assert summary["sink_rate"] == pytest.approx(sum(rates) / 8)
    assert set(summary) - {"dead_heads"} <= set(DEFINITIONS)
    with torch.no_grad():
        loss = model(batch, labels=batch).loss
    assert summary["loss"] == pytest.approx(loss.item(), rel=1e-4)
    with torch.no_grad():
        states = torch.stack(model(batch, output_hidden_states=True).hidden_states).double()
    d = states - states.mean()
    pooled = float((d**4).mean() / (d**2).mean() ** 2)
    assert summary["kurtosis_pooled"] == pytest.approx(pooled, rel=1e-3)
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["definitions"] == DEFINITIONS
    assert record["layers"][1]["heads"]["entropy"][2] == pytest.approx(rows[6]["entropy"])


def test_table_and_picture(tmp_path):
    console = pytest.importorskip("rich.console")
    pytest.importorskip("matplotlib")
    report = diagnose(llama(), ids())
    screen = console.Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(report.table())
    screen.print(report.hidden_table())
    text = screen.export_text()
    assert "model.layers.*.self_attn" in text
    assert "…" not in text
    report.plot(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 10_000


def test_shared_layers_are_reported_by_call():
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        hidden_size=32, embedding_size=16, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=50, intermediate_size=32,
    )  # fmt: skip
    report = diagnose(transformers.AlbertModel(config), ids(), batch_size=2)
    assert [layer.name.rpartition(" ")[2] for layer in report.layers][1:] == ["#2", "#3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": [1, 2]}, "batch must be token ids"),
        ({"batch": torch.ones(0, 4, dtype=torch.int64)}, "must not be empty"),
        ({"batch": ids(), "attention_mask": torch.ones(4, 3)}, "attention_mask must have shape"),
        ({"batch": ids(), "batch_size": 0}, "batch_size must be a positive integer"),
        ({"batch": ids(), "sink_threshold": 0}, "sink_threshold must be a number"),
    ],
)
def test_diagnose_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnose(llama(), **arguments)


def test_diagnose_refuses_what_cannot_be_patched():
    with pytest.raises(ValueError, match="no attention module"):
        diagnose(torch.nn.Linear(2, 2), ids())
    with pytest.raises(ValueError, match="takes a torch model"):
        diagnose("gpt2", ids())


def test_numbers_that_are_not_finite_are_named():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn cannot be measured: att"):
        diagnose(model, ids())
    with pytest.raises(ValueError, match="hidden states hold NaN"):
        activation_metrics(torch.full((1, 2, 3), torch.inf))


def test_loss_leaves_padding_out():
    model, batch = llama(), ids(2)
    mask = torch.ones_like(batch)
    mask[1, -6:] = 0
    report = diagnose(model, batch, attention_mask=mask)
    labels = batch.masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = model(batch, attention_mask=mask, labels=labels).loss
    assert report.loss == pytest.approx(expected.item(), rel=1e-4)
