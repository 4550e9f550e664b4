"""Learned values and options of patched models: training, dtypes, saving, copies."""

import copy

import pytest
import torch
from tiny import SMALL

import attnvariants
from attnvariants import patch, unpatch
from attnvariants.hf.source import dispatches

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

TOKENS = torch.randint(3, 99, (2, 18), generator=torch.Generator().manual_seed(1))


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()


def run(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_training_reaches_model_and_learned_values():
    model = llama()
    handle = patch(model, "ssmax", s=0.4, b=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert list(handle.parameters) == [
        f"model.layers.{i}.self_attn.attn_variant.{name}" for i in (0, 1) for name in ("s", "b")
    ]
    names = dict(model.named_parameters())
    assert all(names[name] is value for name, value in handle.parameters.items())
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for value in handle.parameters.values():
        assert value.shape == (4,)
        assert value.grad.abs().min() > 0


def grads_with_and_without(model, inputs, parameter):
    if not any(dispatches(type(module)) for module in model.modules()):
        pytest.skip(f"transformers {transformers.__version__} has its own attention in this family")
    grads = []
    for variant in (None, "softmax"):
        if variant:
            patch(model, variant)
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        grads.append(parameter.grad.clone())
    assert grads[0].abs().max() > 0
    return grads


def test_position_bias_keeps_its_gradient():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, **sizes)
    ).eval()
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(0)}
    before, after = grads_with_and_without(model, inputs, table)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_a_learned_additive_mask_keeps_its_gradient():
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2
    )
    torch.manual_seed(0)
    model = transformers.SwinModel(config).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (table,) = (
        value
        for name, value in model.named_parameters()
        if "layers.0.blocks.1." in name and "bias_table" in name
    )
    before, after = grads_with_and_without(model, {"pixel_values": pixels}, table)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-3)


def test_learned_values_take_preset_dtype_and_freezing():
    model = llama().to(torch.bfloat16)
    handle = patch(model, "ssmax", preset="retrofit", train_length=1, trainable=False, layers=0)
    value = handle.parameters["model.layers.0.self_attn.attn_variant.s"]
    assert value.dtype == torch.bfloat16
    assert not value.requires_grad
    assert value.tolist() == [1.0] * 4
    handle.unpatch()
    expected = attnvariants.get_variant("ssmax").presets["retrofit"](64)["s"]
    value = next(iter(patch(model, "ssmax", preset="retrofit").parameters.values()))
    torch.testing.assert_close(value.float(), torch.full((4,), expected), atol=5e-3, rtol=5e-3)


def test_options_come_from_the_config():
    model = llama()
    handle = patch(model, "cosformer")
    assert {row.options["max_len"] for row in handle.report.patched} == {64}
    from_config = run(model)
    handle.unpatch()
    patch(model, "cosformer", max_len=64)
    assert torch.equal(run(model), from_config)


def test_save_reload_patch_load(tmp_path):
    model = llama()
    handle = patch(model, "ssmax")
    with torch.no_grad():
        for value in handle.parameters.values():
            value.uniform_(0.2, 0.9)
    expected = run(model)
    model.save_pretrained(tmp_path, safe_serialization=True)
    record = transformers.LlamaConfig.from_pretrained(tmp_path).attn_variants
    assert record["patches"] == [
        {
            "variant": "ssmax",
            "impl": "auto",
            "options": {},
            "learned": ["s"],
            "initial": {"s": 1.0},
            "modules": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
        }
    ]
    again = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sdpa"
    ).eval()
    assert again.config.attn_variants == record
    patch(again, "ssmax", s=0.5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again), expected)
    unpatch(again)
    assert again.config.attn_variants == record


def test_a_copy_is_a_patched_model_of_its_own():
    model = llama()
    expected = run(model)
    patch(model, "softpick")
    patched = run(model)
    twin = copy.deepcopy(model)
    unpatch(model)
    assert torch.equal(run(model), expected)
    assert torch.equal(run(twin), patched)
    unpatch(twin)
    assert torch.equal(run(twin), expected)


def test_a_model_on_the_same_config_object_keeps_its_numbers():
    model = llama()
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    expected = run(other)
    patch(model, "softpick")
    torch.testing.assert_close(run(other), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="config of its own"):
        patch(other, "softpick")
