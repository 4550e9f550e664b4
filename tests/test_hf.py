"""Patched tiny models against the same models unpatched."""

import copy
import subprocess
import sys

import pytest
import torch

import attnvariants
from attnvariants import list_variants, patch
from attnvariants.hf.source import dispatches

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SMALL, "num_key_value_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 5}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **GQA,
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 1,
            "attn_logit_softcapping": 0.5,
            "attn_implementation": "eager",
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "bert": ("BertModel", "BertConfig", SMALL),
    "vit": ("ViTModel", "ViTConfig", VISION),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
}
DECODERS = ["llama", "mistral", "qwen3", "gemma2", "gpt2", "gpt_neox"]
LATE = {"bert", "t5"}


def build(kind, **changes):
    cls, config, values = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**values, **changes})
    model = getattr(transformers, cls)(config).eval()
    for parameter in model.parameters():
        # larger weights than the usual 0.02, so that attention is far from uniform
        torch.nn.init.normal_(parameter, std=0.15) if parameter.dim() > 1 else None
    if kind in LATE and not any(dispatches(type(module)) for module in model.modules()):
        pytest.skip(f"transformers {transformers.__version__} has its own attention in {kind}")
    return model


def sample(kind, length=18, batch=2):
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    tokens = torch.randint(3, 99, (batch, length), generator=generator)
    if kind in ("bart", "t5"):
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(0)}
    return {"input_ids": tokens}


def run(model, inputs, **more):
    with torch.no_grad():
        result = model(**inputs, **more)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def snapshot(model):
    def values(config):
        own = {key: value for key, value in vars(config).items() if not hasattr(value, "to_dict")}
        below = {k: values(v) for k, v in vars(config).items() if hasattr(v, "to_dict")}
        return own, below

    return copy.deepcopy(
        (
            list(model.state_dict()),
            [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
            {
                name: values(module.config)
                for name, module in model.named_modules()
                if hasattr(module, "config")
            },
        )
    )


@pytest.mark.parametrize("kind", MODELS)
def test_softmax_is_the_model_and_unpatch_restores_it(kind):
    model, inputs = build(kind), sample(kind)
    before, expected = snapshot(model), run(model, inputs)
    handle = patch(model, "softmax")
    assert len(handle.report.patched) == len(handle.report) > 0
    assert handle.report.parameters == 0
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    handle.unpatch()
    assert torch.equal(run(model, inputs), expected)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", [*DECODERS, "bert"])
def test_left_padded_batch(kind):
    model, inputs = build(kind), sample(kind)
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[1, :7] = 0
    inputs.update(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    expected = run(model, inputs)
    patch(model, "softmax")
    got = run(model, inputs)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    short = {"input_ids": inputs["input_ids"][1:, 7:]}
    torch.testing.assert_close(got[1:, 7:], run(model, short), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", DECODERS)
def test_cached_generation(kind, cache, padded):
    model, inputs = build(kind), sample(kind, 9)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if padded:
        inputs["attention_mask"][1, :4] = 0
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    if cache:
        settings |= {"cache_implementation": cache, "disable_compile": True}
    expected = model.generate(**inputs, **settings)
    patch(model, "softmax")
    got = model.generate(**inputs, **settings)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("variant", list_variants())
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_cached_generation_is_the_full_forward(kind, variant):
    model, inputs = build(kind), sample(kind, 9)
    patch(model, variant)
    mask = torch.ones(2, 9, dtype=torch.long)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        got = model.generate(
            **inputs,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **cache,
        )
        full = run(model, {"input_ids": got.sequences[:, :-1]})[:, 8:]
        torch.testing.assert_close(torch.stack(got.logits, 1), full, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", list_variants())
@pytest.mark.parametrize("kind", DECODERS)
def test_no_variant_sees_the_future(kind, variant):
    model, inputs = build(kind), sample(kind)
    if kind == "gemma2" and "softcap" in attnvariants.get_variant(variant).refuses:
        pytest.skip(f"{variant} takes no softcap")
    patch(model, variant)
    first = run(model, inputs)
    inputs["input_ids"][:, 12:] = (inputs["input_ids"][:, 12:] + 1) % 99
    second = run(model, inputs)
    assert torch.equal(first[:, :12], second[:, :12])
    assert not torch.equal(first[:, 12:], second[:, 12:])


def test_a_window_hides_what_is_older():
    model, inputs = build("mistral"), sample("mistral")
    patch(model, "softpick")
    first = run(model, inputs)
    inputs["input_ids"][:, 0] += 1
    second = run(model, inputs)
    # two layers of a window of 5 reach back 8 tokens
    assert torch.equal(first[:, 9:], second[:, 9:])
    assert not torch.equal(first[:, 8], second[:, 8])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "bart"])
def test_other_layers_keep_their_operator(kind, implementation):
    model = build(kind, attn_implementation=implementation)
    inputs = sample(kind)
    expected, before = run(model, inputs), snapshot(model)
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[1, :5] = 0
    padded = run(model, inputs, attention_mask=mask)
    handle = patch(model, "softmax", layers=[0])
    assert {row.layer for row in handle.report.patched} == {0}
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    got = run(model, inputs, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], padded[mask.bool()], atol=1e-5, rtol=1e-5)
    with patch(model, "softpick", layers=-1) as second:
        assert len(second.report.patched) > len(second.names)
        assert not torch.allclose(run(model, inputs), expected, atol=1e-3)
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    handle.unpatch()
    assert snapshot(model) == before
    assert torch.equal(run(model, inputs), expected)


def test_ways_to_choose_layers():
    model = build("llama", num_hidden_layers=4)

    def chosen(**arguments):
        with patch(model, arguments.pop("variant", "softpick"), **arguments) as handle:
            return {row.layer: row.variant for row in handle.report.patched}

    assert chosen() == dict.fromkeys(range(4), "softpick")
    assert chosen(layers=range(0, 4, 2)) == {0: "softpick", 2: "softpick"}
    assert chosen(layers=[-1, 0]) == {0: "softpick", 3: "softpick"}
    assert chosen(layers=r"layers\.[12]\.") == {1: "softpick", 2: "softpick"}
    assert chosen(layers=lambda name, module: module.layer_idx > 2) == {3: "softpick"}
    mixed = {0: "softmax", (1, 2): ("relu", {"act": "relu2"}), r"layers\.3": "ssmax"}
    assert chosen(variant=mixed) == {0: "softmax", 1: "relu", 2: "relu", 3: "ssmax"}


def test_packed_documents_do_not_see_each_other():
    model = build("llama")
    patch(model, "ssmax", preset="retrofit")
    tokens = sample("llama", 14, 1)["input_ids"]
    positions = torch.tensor([[*range(6), *range(8)]])
    got = run(model, {"input_ids": tokens}, position_ids=positions, use_cache=False)
    for part in (slice(0, 6), slice(6, 14)):
        alone = run(model, {"input_ids": tokens[:, part]})
        torch.testing.assert_close(got[:, part], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_attention_weights_on_request(kind):
    if kind == "gpt2" and VERSION < (5, 20):
        pytest.skip("older versions of GPT-2 do not pass the request on")
    model, inputs = build(kind), sample(kind)
    patch(model, "softmax")
    weights = model(**inputs, output_attentions=True).attentions
    assert len(weights) == 2
    assert weights[0].shape == (2, 4, 18, 18)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 18))


def test_text_part_of_a_composite_model():
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GQA),
        vision_config=transformers.CLIPVisionConfig(**VISION),
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    before, inputs = snapshot(model), sample("llama")
    expected = run(model, inputs)
    with patch(model, "softmax", verify=True) as handle:
        assert len(handle.report.patched) == 2
        assert all("language_model" in row.name for row in handle.report.patched)
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    with patch(model, "softmax", layers="vision_tower") as handle:
        assert len(handle.report.patched) == 2
        assert torch.equal(run(model, inputs), expected)
        with pytest.raises(ValueError, match="none of the 2"):
            handle.verify()
    assert snapshot(model) == before


def test_importing_the_package_leaves_transformers_alone():
    code = "import sys, attnvariants; assert 'transformers' not in sys.modules"
    code += "; import attnvariants.hf; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
