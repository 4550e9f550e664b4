"""An implementation set after patching, attention weights, and values made in odd surroundings."""

import contextlib
import copy
import warnings

import pytest
import torch
from tiny import SMALL

from attnvariants import from_pretrained, patch, save_pretrained
from attnvariants.hf import patches_of

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    for value in model.parameters():
        if value.dim() > 1:
            torch.nn.init.normal_(value, 0, 0.3)
    return model


def run(model, **more):
    with torch.no_grad():
        return model(TOKENS, **more)


def by_config(model, name):
    model.config._attn_implementation = name


def by_method(model, name):
    model.set_attn_implementation(name)


def by_part(model, name):
    model.model.set_attn_implementation(name)


@pytest.mark.parametrize("set_to", [by_method, by_part, by_config])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_variant_that_does_not_run_is_not_reported(model, set_to, name):
    soft = run(model).logits
    handle = patch(model, "softpick")
    expected, key = run(model).logits, model.config._attn_implementation
    set_to(model, name)
    with pytest.warns(UserWarning, match=f"set to {name!r} after patching.*output_attentions=True"):
        torch.testing.assert_close(run(model).logits, soft, atol=1e-4, rtol=1e-4)
    assert not handle.active
    assert "not used" in repr(handle)
    report = handle.report
    assert (len(report.patched), len(report.idle)) == (0, 2)
    assert [row.impl for row in report] == [name, name]
    assert f"2 carry a variant that does not run, because {name!r}" in str(report)
    with pytest.raises(ValueError, match="set to another one after patching"):
        handle.verify()
    set_to(model, key)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(model).logits, expected)
    assert handle.active
    assert len(handle.report.patched) == 2
    set_to(model, name)
    handle.unpatch()
    assert model.config._attn_implementation == name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(model).logits, soft, atol=1e-4, rtol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_copy_tells_by_its_own_config(model):
    patch(model, "softpick")
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="does not compute it"):
        run(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)
    assert patches_of(model)[0].active
    assert not patches_of(other)[0].active


def test_a_context_of_an_idle_patch_leaves_the_model_as_it_was(model):
    with patch(model, "softpick"):
        model.set_attn_implementation("eager")
    assert patches_of(model) == ()


def test_attention_weights_need_no_other_implementation(model):
    patch(model, "softpick", layers=[0])
    patch(model, "relu", layers=[1])
    plain = run(model).logits
    asked = run(model, output_attentions=True)
    assert torch.equal(asked.logits, plain)
    assert [weights.shape for weights in asked.attentions] == [(2, 4, 12, 12)] * 2
    # rows of softpick do not sum to one
    assert asked.attentions[0].sum(-1).min() < 0.9
    made = model.generate(
        TOKENS, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert [step[0].shape[-1] for step in made.attentions] == [12, 13]


def test_a_config_that_asked_for_weights_gets_the_variants(model, tmp_path):
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    patch(model, "softpick")
    assert run(model).attentions[0].sum(-1).min() < 0.9
    with pytest.raises(ValueError, match="pass output_attentions=True to its calls"):
        save_pretrained(model, tmp_path)
    model.config.output_attentions = False
    save_pretrained(model, tmp_path)
    again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    torch.testing.assert_close(run(again).logits, run(model).logits)


@contextlib.contextmanager
def narrow():
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = [torch.inference_mode, torch.no_grad, narrow, lambda: torch.device("meta")]


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_learned_values_made_anywhere_learn(model, around):
    given = torch.full((4,), 0.1)
    with around():
        patch(model, "ssmax", s=0.1, layers=[0])
        patch(model, "ssmax", s=given, layers=[1])
    model(TOKENS, labels=TOKENS).loss.backward()
    values = [layer.self_attn.attn_variant.s for layer in model.model.layers]
    for value in values:
        assert value.requires_grad
        assert value.grad.abs().max() > 0
        assert torch.equal(value.detach(), given)
        assert value.device.type == "cpu"
        assert not value.is_inference()


def test_values_given_from_inference_mode_learn(model):
    with torch.inference_mode():
        given = torch.full((4,), 0.1)
    patch(model, "ssmax", s=given)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.layers[0].self_attn.attn_variant.s.grad is not None


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_a_model_loaded_anywhere_learns(model, tmp_path, around):
    patch(model, "ssmax")
    save_pretrained(model, tmp_path)
    with around():
        again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    again(TOKENS, labels=TOKENS).loss.backward()
    assert all(value.grad is not None for value in again.parameters())
