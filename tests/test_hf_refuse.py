"""What `patch` refuses: a sentence each, and the model as it was."""

import copy
import sys
import types

import pytest
import torch
from tiny import SMALL
from torch import nn

import attnvariants
from attnvariants import patch, unpatch
from attnvariants.hf import dispatch, find, masks
from attnvariants.hf import eager as eager_file

transformers = pytest.importorskip("transformers")
import own_softmax  # noqa: E402

transformers.logging.set_verbosity_error()

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
TOKENS = torch.arange(3, 15)[None]


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()


def make(name, **config):
    if name == "Own":
        return own_softmax.OwnForCausalLM(own_softmax.OwnConfig(**config)).eval()
    kind = getattr(transformers, f"{name}Config")(**config)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, name + suffix)(kind).eval()


def state(model):
    configs = [vars(m.config).copy() for m in model.modules() if hasattr(m, "config")]
    for config in configs:
        config.pop("vision_config", None)
    modules = [(name, sorted(m.__dict__)) for name, m in model.named_modules()]
    return copy.deepcopy((modules, configs, list(model.state_dict())))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "softpik"}, "did you mean 'softpick'"),
        ({"variant": "softpick", "epsilon": 1.0}, "takes eps"),
        ({"variant": "softpick", "eps": "small"}, "eps must be"),
        ({"variant": "ssmax", "s": float("nan")}, "s must be"),
        ({"variant": "ssmax", "s": torch.tensor([1.0, 2, float("nan"), 4])}, "NaN"),
        ({"variant": "ssmax", "s": torch.ones(3)}, r"\[4\] values, one for each head"),
        ({"variant": "ssmax", "preset": "fresh"}, "presets are pretrain, retrofit"),
        ({"variant": "softmax", "preset": "retrofit"}, "it has none"),
        ({"variant": "ssmax", "train_length": 5}, "pass preset="),
        ({"variant": "ssmax", "preset": "retrofit", "train_length": 0}, "positive integer"),
        ({"variant": "softmax", "impl": "fast"}, "unknown impl"),
        ({"variant": "softmax", "layers": [2]}, r"layer 2 has no attention .* are 0\.\.1"),
        ({"variant": "softmax", "layers": -3}, "layer -3 has no attention"),
        ({"variant": "softmax", "layers": []}, "layers is empty"),
        ({"variant": "softmax", "layers": [True]}, "layers must be None"),
        ({"variant": "softmax", "layers": 1.5}, "layers must be None"),
        ({"variant": "softmax", "layers": "layers.(7"}, "no regular expression"),
        ({"variant": "softmax", "layers": "encoder"}, "matches none of the 2"),
        ({"variant": "softmax", "layers": lambda name, module: False}, "the predicate"),
        ({"variant": {0: "softmax", r"\.0\.": "relu"}}, "more than one key"),
        ({"variant": {0: "softmax", 5: "relu"}}, "layer 5 has no attention"),
        ({"variant": {0: ("relu", {"act": "cubed"})}}, "act must be"),
        ({"variant": {0: ("relu", 3)}}, r"\(variant, options\)"),
        ({"variant": {0: "softmax"}, "layers": [0]}, "holds everything itself"),
        ({"variant": {0: "relu"}, "act": "relu2"}, "holds everything itself"),
        ({"variant": {}}, "empty"),
        ({"variant": 3}, "must be a name"),
    ],
)
def test_bad_arguments(llama, arguments, message):
    before = state(llama)
    with pytest.raises(ValueError, match=message) as caught:
        patch(llama, **arguments)
    assert str(caught.value).endswith(".")
    assert state(llama) == before


def test_not_a_model():
    with pytest.raises(ValueError, match="takes a torch model, got str"):
        patch("llama", "softmax")
    with pytest.raises(ValueError, match="no attention module in Sequential"):
        patch(nn.Sequential(nn.Linear(2, 2)), "softmax")
    with pytest.raises(ValueError, match="not patched"):
        unpatch(nn.Linear(2, 2))


def test_an_unregistered_variant(llama):
    from dataclasses import replace

    stranger = replace(attnvariants.get_variant("softmax"), name="stranger")
    with pytest.raises(ValueError, match="register first"):
        patch(llama, stranger)


def test_patching_twice(llama):
    first = patch(llama, "softpick", layers=[0])
    once = state(llama)
    assert patch(llama, "softpick", layers=[0]) is first
    for arguments, message in (
        ({"variant": "ssmax"}, "has the variant 'softpick' already; call unpatch"),
        ({"variant": "softpick", "eps": 0.5}, "and other options"),
        ({"variant": "softpick", "impl": "reference"}, "and other options"),
    ):
        with pytest.raises(ValueError, match=message):
            patch(llama, **arguments)
    both = patch(llama, "softpick")
    assert both.names == ("model.layers.1.self_attn",)
    both.unpatch()
    assert [name for name, _ in state(llama)[0]] == [name for name, _ in once[0]]
    first.unpatch()


def test_unpatching_what_is_not_patched(llama):
    with pytest.raises(ValueError, match="is not patched: there is nothing to undo"):
        unpatch(llama)
    before = state(llama)
    with patch(llama, "softpick") as handle:
        with pytest.raises(ValueError, match="part of another model"):
            unpatch(llama.model)
        with pytest.raises(ValueError, match="through another model"):
            patch(llama.model, "softpick")
        handle.unpatch()
    assert state(llama) == before
    for action in (handle.unpatch, handle.verify, handle.__enter__):
        with pytest.raises(ValueError, match="is not active"):
            action()
    assert "not active" in repr(handle)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Own", {}, "OwnAttention"),
        ("Falcon", SMALL, "FalconAttention"),
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "BloomAttention"),
        ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, "MptAttention"),
        ("GptOss", {**SMALL, "head_dim": 8, "num_local_experts": 2}, "attention sinks"),
        (
            "Git",
            {
                **SMALL,
                "vision_config": VISION,
            },
            "GitSelfAttention",
        ),
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 1}, "no attention module"),
    ],
)
def test_families_that_cannot_be_patched(name, config, message):
    model = make(name, **{"vocab_size": 99, **config})
    moved = own_softmax.calls_the_interface(type(model))
    if moved and message.endswith("Attention"):
        pytest.skip(f"{name} calls the attention interface in {transformers.__version__}")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        patch(model, "softpick")
    assert state(model) == before


def test_part_of_git_cannot_be_patched_when_it_shares_a_config():
    model = make("Git", **{**SMALL, "vision_config": VISION})
    with pytest.raises(ValueError, match="computes attention itself"):
        patch(model, "softpick", layers="encoder.layer.0")
    with patch(model, "softpick", layers="image_encoder") as handle:
        assert len(handle.report.patched) == 1
        assert {row.cls for row in handle.report.refused} == {"GitSelfAttention"}
        assert "refused: it computes" in str(handle.report)


def test_forward_replaced_on_the_instance(llama):
    attention = llama.model.layers[1].self_attn
    attention.forward = attention.forward
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\): its forward was replaced"):
        patch(llama, "softpick")
    patch(llama, "softpick", layers=[0])


def test_forward_overridden_by_a_subclass(llama):
    base = type(llama.model.layers[0].self_attn)

    class Calls(base):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class OwnAttention(base):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    expected = llama(TOKENS).logits
    llama.set_attn_implementation("eager")
    llama.model.layers[0].self_attn.__class__ = Calls
    with patch(llama, "softmax", layers=[1]) as handle:
        torch.testing.assert_close(llama(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
        patch(llama, "softmax", layers=[0])
        assert len(handle.report.patched) == 2
        torch.testing.assert_close(llama(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
        unpatch(llama)
    llama.model.layers[1].self_attn.__class__ = OwnAttention
    for layers in (None, [0]):
        with pytest.raises(ValueError, match=r"OwnAttention .* overrides forward"):
            patch(llama, "softpick", layers=layers)


def test_forward_replaced_in_the_class(llama, monkeypatch):
    cls = type(llama.model.layers[0].self_attn)

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None

    foreign = types.FunctionType(forward.__code__, {"__name__": "sloth.models.llama"})
    monkeypatch.setattr(cls, "forward", foreign)
    before = state(llama)
    with pytest.raises(ValueError, match=r"class was replaced \(by sloth\.models\.llama\); undo"):
        patch(llama, "softpick")
    assert state(llama) == before
    monkeypatch.undo()
    modeling = sys.modules[cls.__module__]
    monkeypatch.setattr(modeling, "eager_attention_forward", foreign)
    with pytest.raises(ValueError, match="sloth"):
        patch(llama, "softpick")
    monkeypatch.undo()
    patch(llama, "softpick")


def test_eager_attention_that_reads_what_is_not_known(llama, monkeypatch):
    module = llama.model.layers[0].self_attn
    cls = type(module)
    eager = sys.modules[cls.__module__].eager_attention_forward

    def odd_eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        scale = scaling * module.temperature + kwargs.get("boost", 0) + kwargs["lift"]
        return eager(module, query, key, value, attention_mask, scale, dropout)

    monkeypatch.setitem(odd_eager.__globals__, "eager", eager)
    monkeypatch.setattr(sys.modules[cls.__module__], "eager_attention_forward", odd_eager)
    monkeypatch.setattr(find, "replaced_by", lambda cls: "")
    with pytest.raises(ValueError, match="reads boost, lift, which this package does not know"):
        patch(llama, "softpick")
    module.temperature = 2.0
    with pytest.raises(ValueError, match=r"reads boost, lift, self\.temperature"):
        patch(llama, "softpick", layers=[0])


def test_features_the_variant_cannot_mean():
    torch.manual_seed(0)
    model = make("Gemma2", **SMALL, head_dim=8, attn_implementation="eager")
    before = state(model)
    with pytest.raises(ValueError, match=r"cosformer cannot replace .* softcap"):
        patch(model, "cosformer")
    assert state(model) == before


def test_layers_left_with_masks_of_another_form(llama):
    llama.config._attn_implementation_internal = "flex_attention"
    before = state(llama)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        patch(llama, "softpick", layers=[0])
    assert state(llama) == before
    handle = patch(llama, "softpick")
    assert len(handle.names) == 2
    handle.unpatch()
    assert state(llama) == before


def test_an_implementation_chosen_meanwhile_is_kept(llama):
    handle = patch(llama, "softpick")
    llama.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="never reached"):
        handle.verify()
    assert patch(llama, "softpick") is handle
    handle.verify()
    handle.unpatch()
    assert llama.config._attn_implementation == "eager"


def call(llama, q_len=4, kv_len=4, heads=4, mask=None, **kwargs):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, length, 8, generator=generator)
        for n, length in ((heads, q_len), (2, kv_len), (2, kv_len))
    )
    module = llama.model.layers[0].self_attn
    out, _ = dispatch.attention_forward(module, query, key, value, mask, scaling=0.3, **kwargs)
    return query, key, value, out.transpose(1, 2)


@pytest.mark.parametrize("name", sorted(eager_file.UNSUPPORTED))
def test_arguments_that_change_the_numbers(llama, name):
    patch(llama, "softpick")
    with pytest.raises(ValueError, match=f"passes {name}"):
        call(llama, **{name: torch.ones(1)})


def test_masks_as_they_come(llama):
    patch(llama, "softpick")
    keep = torch.ones(1, 1, 4, 6).tril(2).bool()
    query, key, value, out = call(llama, 4, 6, mask=keep)
    expected = attnvariants.attention(query, key, value, "softpick", causal=True, scale=0.3)
    floats = torch.zeros(1, 1, 4, 6).masked_fill(~keep, torch.finfo(torch.float32).min)
    torch.testing.assert_close(out, expected)
    for mask in (keep.long(), floats, floats.masked_fill(~keep, -torch.inf)):
        torch.testing.assert_close(call(llama, 4, 6, mask=mask)[3], expected)
    with pytest.raises(ValueError, match="4-D tensor"):
        call(llama, mask=torch.ones(1, 4))
    assert masks.is_causal(llama.model.layers[0].self_attn, {})


def test_no_mask_aligns_to_the_upper_left_as_a_static_cache_needs(llama):
    patch(llama, "softmax")
    query, key, value, out = call(llama, 4, 7)
    expected = attnvariants.attention(query, key[:, :, :4], value[:, :, :4], causal=True, scale=0.3)
    torch.testing.assert_close(out, expected)
    free = attnvariants.attention(query, key, value, scale=0.3)
    torch.testing.assert_close(call(llama, 4, 7, is_causal=False)[3], free)
    step = attnvariants.attention(*call(llama, 1, 7)[:3], scale=0.3)
    torch.testing.assert_close(call(llama, 1, 7)[3], step)


def test_no_mask_hides_nothing_where_attention_was_eager(llama):
    llama.set_attn_implementation("eager")
    patch(llama, "softmax", layers=[0])
    query, key, value, out = call(llama, 4, 7)
    torch.testing.assert_close(out, attnvariants.attention(query, key, value, scale=0.3))


def test_more_queries_than_keys_align_to_the_upper_left(llama):
    patch(llama, "softmax")
    query, key, value, out = call(llama, 6, 4)
    expected = attnvariants.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, expected)


def test_one_row_of_queries_serves_a_batch(llama):
    patch(llama, "softmax")
    query, key, value = torch.randn(1, 4, 3, 8), *torch.randn(2, 5, 2, 6, 8)
    module = llama.model.layers[0].self_attn
    out, _ = dispatch.attention_forward(module, query, key, value, is_causal=False)
    expected = attnvariants.attention(query.expand(5, -1, -1, -1), key, value)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_values_may_have_more_heads_than_keys(llama):
    patch(llama, "softmax")
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 4, 6, 8)
    module = llama.model.layers[0].self_attn
    out, _ = dispatch.attention_forward(module, query, key, value, is_causal=False)
    expected = attnvariants.attention(query, key.repeat_interleave(2, 1), value)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_a_variant_with_its_own_scale_is_not_given_the_models(llama):
    patch(llama, "lssa")
    query, key, value, out = call(llama)
    expected = attnvariants.attention(query, key, value, "lssa", causal=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_batch_without_a_mask(llama, causal):
    patch(llama, "softpick")
    bounds_q, bounds_k = torch.tensor([0, 3, 3, 8]), torch.tensor([0, 5, 6, 11])
    packed = {"cu_seq_lens_q": bounds_q, "cu_seq_lens_k": bounds_k, "is_causal": causal}
    query, key, value, out = call(llama, 8, 11, **packed)
    expected = attnvariants.attention_varlen(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        bounds_q,
        bounds_k,
        variant="softpick",
        causal=causal,
        scale=0.3,
    )
    torch.testing.assert_close(out[0].transpose(0, 1), expected)
    with pytest.raises(ValueError, match="packed batch of one row"):
        dispatch.attention_forward(
            llama.model.layers[0].self_attn, *(torch.ones(2, 4, 8, 8),) * 3, None, **packed
        )


def test_dropout_drops_weights(llama):
    patch(llama, "softmax")
    *_, out = call(llama)
    assert torch.equal(call(llama, dropout=0.0)[3], out)
    assert not torch.allclose(call(llama, dropout=0.5)[3], out)


def test_pooling_heads_are_left_alone():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=4)
    )
    for layers, count in ((None, 2), ([-1], 1), (".*", 2)):
        with patch(model, "softpick", layers=layers) as handle:
            assert len(handle.names) == count
            assert [row.cls for row in handle.report.refused] == ["MultiheadAttention"]
    with pytest.raises(ValueError, match="computes attention itself"):
        patch(model, "softpick", layers="head")
