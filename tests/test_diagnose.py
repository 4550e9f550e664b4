"""Diagnostics of whole models against the weights that transformers' eager attention returns."""

import io
import json

import pytest
import torch
from figures import brute_force, visible

from attnvariants.diagnostics import DEFINITIONS, activation_metrics, diagnose

transformers = pytest.importorskip("transformers")


ENCODERS_DISPATCH = pytest.mark.skipif(
    transformers.__version__ < "5",
    reason="transformers 4 computes the attention of BERT and ALBERT itself, which patch refuses",
)


def llama(**changes):
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
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        vocab_size=50, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def ids(batch=4, tokens=16):
    return torch.randint(1, 50, (batch, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("build", [llama, gpt2, pytest.param(bert, marks=ENCODERS_DISPATCH)])
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


@pytest.mark.parametrize("family", ["Mistral", "Gemma2"])
@pytest.mark.parametrize("padding", [0, 4])
def test_diagnose_models_with_windows_and_softcap(family, padding):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=50, max_position_embeddings=64,
        initializer_range=0.5, sliding_window=5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, batch = getattr(transformers, f"{family}ForCausalLM")(config).eval(), ids()
    mask = torch.ones_like(batch)
    mask[2, :padding] = 0
    report = diagnose(model, batch, attention_mask=mask, sink_threshold=0.15)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(batch, attention_mask=mask, output_attentions=True).attentions
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 2
    for layer, weights, kind in zip(report.layers, attentions, kinds, strict=True):
        window = (4, 0) if kind == "sliding_attention" else None
        keep = visible(weights.shape, causal=True, window_size=window)
        keep = keep & mask.bool()[:, None, None, :]
        expected = brute_force(weights.double() * keep, keep, None, mask.bool(), threshold=0.15)
        for name, value in layer.metrics.figures().items():
            if not name.startswith("dead_"):
                torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5, msg=name)


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
    screen = console.Console(width=80, record=True, file=io.StringIO())
    screen.print(report.table())
    screen.print(report.hidden_table())
    text = screen.export_text()
    assert "model.layers.*.self_attn" in text
    assert "…" not in text
    report.plot(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 10_000


@ENCODERS_DISPATCH
def test_shared_layers_are_reported_by_call():
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
        ({"batch": ids(), "batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch": ids(), "batch_size": "x"}, "batch_size must be an integer >= 1, got 'x'"),
        ({"batch": ids().float()}, "batch must be token ids of int32 or int64, got torch.float32"),
        ({"batch": ids() + 10**6}, r"batch must be token ids 0 \.\. .* all that the model knows"),
        ({"batch": ids().to("meta")}, "batch must have values"),
        ({"batch": ids().to_sparse()}, "batch must be dense"),
        ({"batch": ids(), "attention_mask": [[1]]}, "attention_mask must be a torch.Tensor, got"),
        (
            {"batch": ids(), "attention_mask": torch.full_like(ids(), -10_000)},
            "attention_mask must hold 1 or True for tokens and 0 or False",
        ),
        ({"batch": ids(), "progress": 3}, "progress must be a function"),
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
