"""Tiny models of many architectures against themselves, and the table made of all of them."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from attnvariants.hf import check, masks  # noqa: E402
from attnvariants.hf.architectures import compare, hidden, sweep, tiny  # noqa: E402
from attnvariants.hf.architectures.table import models_markdown  # noqa: E402
from attnvariants.hf.names import registered_masks  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"

# One of each feature, and what the self-test measures of it.
TYPES = {
    "llama": "leak padding right_padding hidden cache packed",
    "gpt2": "leak padding",
    "gpt_neox": "leak padding",
    "opt": "leak padding",
    "mistral": "leak padding",
    "phi3": "leak padding",
    "cohere2": "leak padding",
    "gemma2": "leak padding",
    "gemma3_text": "leak padding",
    "gpt_oss": "leak padding",
    "kosmos_2_5_text_model": "leak padding cache",
    "llama4_text": "leak padding",
    "deepseek_v3": "leak padding",
    "deepseek_v32": "leak",
    "qwen3_moe": "leak padding",
    "jamba": "leak padding cache",
    "recurrent_gemma": "leak",
    "doge": "leak",
    "bert": "padding right_padding hidden",
    "roberta": "padding",
    "modernbert": "padding",
    "splinter": "padding",
    "layoutlm": "padding",
    "t5": "leak padding right_padding hidden cache",
    "bart": "leak right_padding hidden cache",
    "t5gemma": "leak padding",
    "longt5": "leak padding",
    "bigbird_pegasus": "leak",
    "whisper": "leak right_padding hidden cache",
    "moonshine": "leak",
    "wav2vec2": "",
    "vit": "",
    "swin": "",
    "pixtral": "",
    "clip": "leak padding",
    "siglip": "padding",
    "llava": "leak padding",
    "qwen2_vl": "leak padding",
    "gemma3": "leak padding right_padding hidden cache",
    "paligemma": "",
    "mllama": "leak padding",
    "bloom": "leak padding",
    "gptj": "leak padding",
}
# Until transformers lets them call its attention interface, as gptj does since 5.24.
BY_HOOK = {"bloom", "gptj"}
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def need(model_type):
    if model_type not in sweep.all_types():
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")


@pytest.mark.parametrize("model_type", TYPES)
def test_identical(model_type):
    need(model_type)
    outcome = compare.drive(model_type)
    if VERSION < (5, 20) and outcome.verdict in ("refused", "no attention", "not driven"):
        pytest.skip(f"transformers {transformers.__version__}: {outcome.note or 'not found'}")
    assert outcome.verdict in ("identical", "by hook" if model_type in BY_HOOK else ""), outcome
    assert outcome.difference <= 1e-4
    assert outcome.reached >= 1
    for name in TYPES[model_type].split():
        assert getattr(outcome, name) is not None, outcome


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "bert", "t5", "whisper"])
def test_identical_at_other_sizes(model_type):
    need(model_type)
    sizes = tiny.Sizes(hidden=96, heads=6, kv_heads=3, head_dim=24, layers=3, window=7)
    if model_type in ("bert", "t5", "whisper"):
        sizes = tiny.Sizes(hidden=96, heads=3, head_dim=32, layers=1, inner=50, vocab=140)
    outcome = compare.drive(model_type, sizes)
    if VERSION < (5, 20) and outcome.verdict == "refused":
        pytest.skip(f"transformers {transformers.__version__}: {outcome.note}")
    assert outcome.verdict == "identical", outcome


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", sweep.all_types())
def test_no_type_differs(model_type):
    assert compare.drive(model_type).verdict not in ("different", compare.COUNTED)


def test_a_wrong_mask_is_different(monkeypatch):
    registry = registered_masks()
    masks.register()
    for key in masks.KEYS:
        monkeypatch.setitem(registry, key, lambda *args, **kwargs: None)
    outcome = compare.drive("llama")
    assert outcome.verdict == "different"
    assert outcome.difference > 0.01


# of windows that shift, of padding by -1e4, by position bias, and through the hook
@pytest.mark.parametrize("model_type", ["markuplm", "swin", "t5", "mistral", "mpnet", "gpt_oss"])
def test_hidden_keys_are_absent(model_type):
    need(model_type)
    outcome = compare.drive(model_type)
    if VERSION < (5, 20) and outcome.verdict not in ("identical", "by hook"):
        pytest.skip(f"transformers {transformers.__version__}: {outcome.note}")
    assert outcome.absent is not None
    assert outcome.absent <= 1e-4


@pytest.mark.parametrize("model_type", ["markuplm", "swin"])
def test_penalties_that_are_added_are_counted(model_type):
    need(model_type)
    outcome = compare.drive(model_type, penalties="added")
    if VERSION < (5, 20) and outcome.verdict == "refused":
        pytest.skip(f"transformers {transformers.__version__}: {outcome.note}")
    assert outcome.verdict == compare.COUNTED
    assert outcome.absent > 0.01
    assert "a hidden key counts in" in outcome.note


def test_a_mask_that_a_variant_does_not_see_is_counted(monkeypatch):
    absent = hidden.absence
    whole = lambda module, query, key, value, mask=None, **more: hidden_forward(  # noqa: E731
        module, query, key, value, None, **{**more, "is_causal": False}
    )
    hidden_forward = hidden.attention_forward

    def without_masks(*args, **kwargs):
        monkeypatch.setattr(hidden, "attention_forward", whole)
        return absent(*args, **kwargs)

    monkeypatch.setattr(compare, "absence", without_masks)
    outcome = compare.drive("llama")
    assert outcome.verdict == compare.COUNTED
    assert outcome.absent > 0.01


def test_a_broken_unpatch_is_different(monkeypatch):
    remove = compare.Patch.unpatch

    def leaves_a_trace(patch):
        remove(patch)
        with torch.no_grad():
            next(patch.model.parameters()).add_(1e-7)

    monkeypatch.setattr(compare.Patch, "unpatch", leaves_a_trace)
    outcome = compare.drive("gpt2")
    assert outcome.verdict == "different"
    assert "not restored" in outcome.note


def test_refused_and_not_driven_say_why():
    refused = compare.drive("wavlm")
    assert (refused.verdict, refused.patched) == ("refused", 0)
    assert "computes attention itself" in refused.note
    assert compare.drive("resnet").verdict == "no attention"
    with pytest.raises(ValueError, match="no model type 'lama'"):
        compare.drive("lama")


def test_tiny_configs_keep_what_makes_an_architecture():
    config = tiny.tiny_config(transformers.Gemma2Config)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert (config.hidden_size, config.sliding_window, config.num_key_value_heads) == (64, 5, 2)
    untied = tiny.tiny_config(transformers.LlamaConfig(hidden_size=32, tie_word_embeddings=True))
    assert (untied.hidden_size, untied.tie_word_embeddings) == (32, True)


def test_a_sweep_resumes_and_survives_slow_types(tmp_path, monkeypatch):
    path, seen = tmp_path / "models.json", []
    result = sweep.sweep(["llama"], path=path)
    assert result.outcomes["llama"].verdict == "identical"
    again = sweep.sweep(
        ["llama", "gpt2"], path=path, timeout=0.01, progress=lambda *args: seen.append(args)
    )
    assert [(done, total, outcome.model_type) for done, total, outcome in seen] == [(2, 2, "gpt2")]
    assert again.outcomes["gpt2"].verdict == "not driven"
    assert "more than 0.01 seconds" in again.outcomes["gpt2"].note
    assert sweep.SweepResult.load(path).outcomes["llama"].verdict == "identical"
    monkeypatch.setattr(sweep, "versions", lambda: {"transformers": "0"})
    monkeypatch.setattr(sweep, "_run", lambda types, *rest: seen.append(types))
    sweep.sweep(["llama"], path=path)
    assert seen[-1] == ["llama"]
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no results of a sweep"):
        sweep.sweep(["llama"], path=path)
    with pytest.raises(ValueError, match=r"did you mean 'llama'"):
        sweep.sweep(["lama"])


def test_the_table_is_what_its_results_give():
    result = sweep.SweepResult.load(DOCS / "models.json")
    assert (DOCS / "models.md").read_text(encoding="utf-8") == models_markdown(result)


def test_the_results_are_good():
    record = json.loads((DOCS / "models.json").read_text(encoding="utf-8"))
    result = sweep.SweepResult.load(DOCS / "models.json")
    assert len(result.outcomes) == len(record["rows"])
    assert result.bad == 0
    assert result.count("identical") >= 310
    for outcome in result.outcomes.values():
        if outcome.verdict in ("refused", "not driven"):
            assert outcome.note, outcome
        if outcome.verdict == "identical":
            assert outcome.difference <= record["tolerance"]
            assert 1 <= outcome.reached <= outcome.patched <= outcome.attention


@pytest.mark.parametrize("variant", ["softmax", "softpick"])
def test_check_passes(variant):
    result = check(transformers.LlamaConfig(), variant)
    assert result.passed, str(result)
    found = {entry.name: entry for entry in result.checks}
    assert found["future leak"].figure == 0.0
    assert found["restore"].figure == 0.0
    for name in ("generate", "cache", "left padding", "identity to eager attention"):
        assert found[name].passed, str(result)


def test_check_leaves_a_given_model_as_it_is():
    config = tiny.tiny_config(transformers.MistralConfig)
    model = transformers.MistralForCausalLM(config).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    assert check(model, "ssmax", preset="retrofit").passed
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_check_fails_where_it_should(monkeypatch):
    refused = check(transformers.BloomConfig())
    assert not refused.passed
    assert "softmax-hook" in refused.checks[0].note
    registry = registered_masks()
    for key in masks.KEYS:
        monkeypatch.setitem(registry, key, lambda *args, **kwargs: None)
    wrong = check(transformers.LlamaConfig())
    failed = {entry.name for entry in wrong.checks if entry.passed is False}
    assert {"left padding", "identity to eager attention"} <= failed, str(wrong)


def test_check_of_bad_input(tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        check(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no config\.json"):
        check(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(ValueError, match="cannot be read as a config"):
        check(tmp_path)
    with pytest.raises(ValueError, match="unknown variant"):
        check(transformers.LlamaConfig(), "softpik")
    with pytest.raises(ValueError, match="softpick takes eps"):
        check(transformers.LlamaConfig(), "softpick", nosuch=1)
    with pytest.raises(ValueError, match="check takes a model"):
        check(3)
