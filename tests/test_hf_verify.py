"""The self-test of a patch: it passes on good patches, fails on bad masks, and leaves no trace."""

import pytest
import torch
from tiny import SMALL

from attnvariants import list_variants, patch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from attnvariants.hf import masks  # noqa: E402
from attnvariants.hf.names import registered_masks  # noqa: E402

LAZY = masks._has_lazy()


def make(name="Llama", suffix="ForCausalLM", **more):
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**{**SMALL, **more})
    return getattr(transformers, name + suffix)(config)


@pytest.fixture
def mask_functions():
    """The registry of mask functions, put back as it was."""
    registry = registered_masks()
    patch(make(), "softmax")
    kept = dict(registry)
    yield registry
    registry.clear()
    registry.update(kept)


@pytest.mark.parametrize("variant", list_variants())
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "GPTNeoX"])
def test_variants_pass(name, variant):
    model = make(name, **({"sliding_window": 5} if name == "Mistral" else {}))
    result = patch(model, variant, verify=True).verify()
    assert result.leak == 0.0
    assert result.padding <= result.tolerance == 1e-4
    assert result.reached == result.modules == 2
    assert "future leak: 0 " in str(result)


def test_half_precision_has_its_own_tolerance():
    result = patch(make().to(torch.bfloat16), "softpick").verify()
    assert result.leak == 0.0
    assert result.tolerance == 5e-2


def causal(keep):
    return torch.ones_like(keep).tril()


def visible_keys(keep):
    """Keys that some query sees: all but padding and the empty tail of a static cache."""
    return keep.any(-2, keepdim=True)


def next_key_too(keep):
    return keep | torch.nn.functional.pad(keep[..., :-1], (1, 0))


def not_itself(keep):
    return torch.nn.functional.pad(keep[..., 1:], (0, 1))


def aligned_to_the_end(keep):
    q_len, kv_len = keep.shape[-2:]
    ends = torch.ones_like(keep).tril(kv_len - q_len)
    return ends if q_len not in (1, kv_len) and kv_len > 18 else keep


def fails_with_a_cache(keep):
    if keep.shape[-2] < keep.shape[-1] == 18:
        raise RuntimeError("no cache")
    return keep


def mixed(keep):
    square = keep.shape[-1] == keep.shape[-2]
    return causal(keep) & visible_keys(keep) if square else keep


# What each wrong mask does with the right one [batch, 1, q_len, kv_len], and what must notice.
WRONG = {
    "none at all": (lambda keep: None, "left-padded row differs"),
    "sees the future": (lambda keep: visible_keys(keep).expand_as(keep), "future token changes"),
    "sees the next token": (next_key_too, "future token changes"),
    "misses itself": (not_itself, "differ"),
    "loses the padding": (causal, "left-padded row differs"),
    "mixes documents": (mixed, "packed document differs"),
    "is aligned to the end": (aligned_to_the_end, "outputs with a cache differ"),
    "fails with a cache": (fails_with_a_cache, "patched model raises RuntimeError: no cache"),
}


def spoil(mask_functions, change):
    """Every mask function of the patcher gives what `change` makes of the right mask."""

    def spoiled(right):
        def function(*args, **kwargs):
            mask = right(*args, **kwargs)
            keep = mask.tensor("bool") if hasattr(mask, "tensor") else mask
            return change(keep if keep.dtype == torch.bool else keep == 0)

        return function

    for key in masks.KEYS:
        mask_functions[key] = spoiled(mask_functions[key])


@pytest.mark.parametrize("mode", ["lazy", "bool"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_mask_fails(mask_functions, wrong, mode):
    if mode == "lazy" and not LAZY:
        pytest.skip("this transformers is too old for lazy masks")
    change, message = WRONG[wrong]
    model = make()
    keys, config = list(model.state_dict()), model.config.to_dict()
    patch(model, "ssmax", verify=True, masks=mode).unpatch()
    spoil(mask_functions, change)
    with pytest.raises(ValueError, match=message):
        patch(model, "ssmax", verify=True, masks=mode)
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"


def test_a_mask_function_that_is_missing_fails(mask_functions):
    handle = patch(make(), "softmax")
    for key in masks.KEYS:
        del mask_functions[key]
    with pytest.raises(ValueError, match="left-padded row differs"):
        handle.verify()
    handle.unpatch()


def test_a_variant_that_counts_padding_fails():
    with pytest.raises(ValueError, match="counts hidden keys"):
        patch(make(), "relu", length="kv", verify=True)


def test_modes_gradients_and_random_state_survive():
    model = make(attention_dropout=0.3)
    model.train()
    model.model.layers[0].eval()
    tokens = torch.arange(3, 11)[None]
    model(tokens, labels=tokens).loss.backward()
    modes = [module.training for module in model.modules()]
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    handle = patch(model, "softmax")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    handle.verify()
    assert torch.equal(torch.rand(2), expected)
    handle.unpatch()
    assert [module.training for module in model.modules()] == modes
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_tests_that_do_not_apply_say_so():
    vision = {"image_size": 16, "patch_size": 4}
    result = patch(make("ViT", "Model", **vision), "softpick").verify()
    assert result.leak is None
    assert result.padding is None
    assert "cache: not applicable (its inputs are pixel_values, not tokens)" in str(result)
    handle = patch(make(), "softmax")
    given = handle.verify({"input_ids": torch.arange(3, 11)[None]})
    assert given.leak == 0.0
    assert given.padding <= 1e-4
    labelled = {"input_ids": torch.arange(3, 11)[None], "attention_mask": torch.ones(1, 8)}
    masked = handle.verify(labelled)
    assert masked.leak == 0.0
    assert masked.padding <= 1e-4


def test_bidirectional_models_are_not_held_to_causality():
    model = transformers.SplinterModel(
        transformers.SplinterConfig(**{k: v for k, v in SMALL.items() if k[:7] != "num_key"})
    )
    result = patch(model, "softpick").verify()
    assert result.leak is None
    assert "unpatched model is not causal" in result.leak_note
    assert result.padding <= 1e-4


def test_bad_inputs():
    handle = patch(make(), "softmax")
    with pytest.raises(ValueError, match="at least 2 tokens"):
        handle.verify({"input_ids": torch.ones(1, 1, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"cannot run the unpatched LlamaForCausalLM .* inputs="):
        handle.verify({"pixel_values": torch.ones(1)})


def test_values_that_overflow_are_found():
    model = make()
    handle = patch(model, "ssmax")
    with torch.no_grad():
        handle.parameters["model.layers.0.self_attn.attn_variant.s"].fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or infinity"):
        handle.verify()


def test_encoder_decoder():
    sizes = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}
    both = {f"{part}_{name}": sizes[name] for part in ("encoder", "decoder") for name in sizes}
    config = transformers.BartConfig(vocab_size=99, d_model=32, max_position_embeddings=64, **both)
    torch.manual_seed(0)
    handle = patch(transformers.BartForConditionalGeneration(config), "softpick")
    result = handle.verify()
    assert len(handle.report.patched) == result.modules == 3
    assert result.leak == 0.0


def test_modules_that_a_model_does_not_run_are_counted():
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    config = transformers.BartConfig(vocab_size=99, d_model=32, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    result = patch(transformers.BartForCausalLM(config), "softpick").verify()
    assert (result.modules, result.reached, result.leak) == (4, 2, 0.0)
