"""Models that others build from a recorded config: the variants are there, or it is said."""

import copy
import pickle
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import SMALL, strong

import attnvariants
from attnvariants import from_pretrained, patch, save_pretrained, unpatch
from attnvariants.hf import auto_load, construct, patches_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
transformers.logging.set_verbosity_error()
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CAUSAL = transformers.AutoModelForCausalLM
TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
guarded = pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 ignores the guard")


def llama(variant="ssmax", **options):
    model = strong(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
    patch(model, variant, **options)
    return shaken(model)


def shaken(model):
    generator = torch.Generator().manual_seed(2)
    for name, value in model.named_parameters():
        if ".attn_variant." in name:
            value.data.uniform_(0.5, 1.5, generator=generator)
    return model


def run(model, **inputs):
    with torch.no_grad():
        return next(iter(model(**(inputs or {"input_ids": TOKENS})).values()))


@pytest.fixture
def saved(tmp_path):
    model = llama()
    save_pretrained(model, tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("cls", [CAUSAL, transformers.LlamaForCausalLM])
@pytest.mark.parametrize("how", ["plain", "auto_load", "from_pretrained"])
def test_a_load_with_our_own_key_restores(saved, cls, how):
    model, folder = saved
    key = model.config._attn_implementation
    if how == "from_pretrained":
        again = from_pretrained(cls, folder, attn_implementation=key)
    elif how == "auto_load":
        with auto_load():
            again = cls.from_pretrained(folder, attn_implementation=key)
    else:
        again = cls.from_pretrained(folder, attn_implementation=key)
    assert torch.equal(run(again), run(model))
    assert again.config.attn_variants == model.config.attn_variants
    (handle,) = patches_of(again)
    assert handle.active
    assert len(handle.report.patched) == 2
    unpatch(again)
    assert again.config._attn_implementation == "sdpa"
    assert not hasattr(again.config, "attn_variants")
    assert "post_init" not in again.__dict__
    assert not torch.allclose(run(again), run(model), atol=0.1)


@pytest.mark.parametrize(
    ("cls", "first"),
    [
        ("AutoModel", "layers.0.self_attn"),
        ("AutoModelForSequenceClassification", "model.layers.0.self_attn"),
    ],
)
def test_other_heads_of_a_saved_model_restore(saved, cls, first):
    model, folder = saved
    loaded = getattr(transformers, cls).from_pretrained
    for more in ({"attn_implementation": "attnvariants"}, {"config": model.config}):
        again = loaded(folder, **more)
        (handle,) = patches_of(again)
        assert handle.names[0] == first
        value = again.get_submodule(first).attn_variant.s
        assert torch.equal(value, model.model.layers[0].self_attn.attn_variant.s)


def test_a_model_made_from_a_patched_models_config_is_patched(saved):
    model, _ = saved
    config = copy.deepcopy(model.config)
    for make in (transformers.LlamaForCausalLM, CAUSAL.from_config):
        again = make(copy.deepcopy(config)).eval()
        assert (again.model.layers[0].self_attn.attn_variant.s == 1).all()
        assert patches_of(again)[0].verify().reached == 2
        again.load_state_dict(model.state_dict())
        assert torch.equal(run(again), run(model))
    with torch.device("meta"):
        again = transformers.LlamaForCausalLM(config)
    assert again.model.layers[0].self_attn.attn_variant.s.is_meta


def test_a_second_model_on_the_same_config_object_is_patched():
    model = llama()
    expected = run(model)
    again = transformers.LlamaForCausalLM(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again), expected)
    assert torch.equal(run(model), expected)


def test_a_config_that_models_share_is_not_read_while_one_of_them_is_patched(monkeypatch):
    model = llama()
    expected = run(model)
    begun = threading.Event()
    restore = construct.restore

    def slowly(model, entries):
        begun.set()
        # long enough for the other thread to look at the config
        time.sleep(0.3)
        return restore(model, entries)

    monkeypatch.setattr(construct, "restore", slowly)
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(transformers.LlamaForCausalLM, model.config)
        assert begun.wait(10)
        other = transformers.LlamaForCausalLM(model.config)
    for again in (one.result().eval(), other.eval()):
        again.load_state_dict(model.state_dict())
        assert torch.equal(run(again), expected)
    assert torch.equal(run(model), expected)


def test_what_interrupts_a_restore_leaves_the_config_as_it_was(monkeypatch):
    model = llama()
    expected, before = run(model), str(model.config)

    def interrupted(model, entries):
        raise KeyboardInterrupt

    monkeypatch.setattr(construct, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        transformers.LlamaForCausalLM(model.config)
    assert str(model.config) == before
    assert torch.equal(run(model), expected)


def test_copies_of_a_patched_model_are_patched(saved):
    model, folder = saved
    loaded = CAUSAL.from_pretrained(folder, attn_implementation="attnvariants")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(run(again), run(model))
        assert patches_of(again)[0].model is again
        unpatch(again)
        assert not torch.allclose(run(again), run(model), atol=0.1)
    assert patches_of(model)[0].active


def test_layers_left_plain_stay_plain(tmp_path):
    model = llama("softpick", layers=[1])
    save_pretrained(model, tmp_path)
    again = CAUSAL.from_pretrained(tmp_path, attn_implementation="attnvariants")
    assert [row.variant for row in patches_of(again)[0].report] == [None, "softpick"]
    assert torch.equal(run(again), run(model))


def test_several_threads_restore_each_its_own(saved):
    model, folder = saved

    def load(_):
        return run(CAUSAL.from_pretrained(folder, attn_implementation="attnvariants"))

    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(out, run(model)) for out in pool.map(load, range(6)))


def test_learned_values_that_a_checkpoint_lacks_are_initial_and_named(tmp_path):
    model = llama()
    lost = "model.layers.1.self_attn.attn_variant.s"
    weights = {name: value for name, value in model.state_dict().items() if name != lost}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.warns(UserWarning, match="lacks the learned s of a 'ssmax'"):
        again = CAUSAL.from_pretrained(tmp_path, attn_implementation="attnvariants")
    assert (again.get_parameter(lost) == 1).all()
    kept = lost.replace("1", "0")
    assert torch.equal(again.get_parameter(kept), model.get_parameter(kept))


def test_values_that_do_not_train_do_not_after_a_load(tmp_path):
    model = llama(trainable=False)
    save_pretrained(model, tmp_path)
    again = CAUSAL.from_pretrained(tmp_path, attn_implementation="attnvariants")
    assert not again.model.layers[0].self_attn.attn_variant.s.requires_grad
    assert again.lm_head.weight.requires_grad


def test_encoders_and_nested_models_restore(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SMALL, "num_key_value_heads": None})
    bert = strong(transformers.BertForMaskedLM(config))
    patch(bert, "softpick")
    bert.save_pretrained(tmp_path)
    key = bert.config._attn_implementation
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path, attn_implementation=key)
    assert torch.equal(run(again), run(bert))
    bare = transformers.BertModel.from_pretrained(tmp_path, attn_implementation=key)
    assert torch.equal(run(bare), run(bert.bert))

    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL), vision_config=vision, image_token_id=98
    )
    llava = strong(transformers.LlavaForConditionalGeneration(config))
    patch(llava, "softpick")
    again = transformers.LlavaForConditionalGeneration(copy.deepcopy(llava.config)).eval()
    again.load_state_dict(llava.state_dict())
    assert torch.equal(run(again), run(llava))
    assert len(patches_of(again)) == 1
    llava.save_pretrained(tmp_path / "llava")
    loaded = type(llava).from_pretrained(
        tmp_path / "llava", attn_implementation=llava.config._attn_implementation
    )
    assert torch.equal(run(loaded), run(llava))
    images = {
        "pixel_values": torch.randn(1, 3, 8, 8),
        "input_ids": torch.tensor([[3, *[98] * 4, 5]]),
    }
    assert torch.equal(run(loaded, **images), run(llava, **images))
    assert not torch.equal(run(loaded, **images)[0, -1], run(loaded)[0, -1])
    # its text config alone does not say what was patched
    for config in (llava.config.text_config, copy.deepcopy(llava.config.text_config)):
        part = transformers.LlamaForCausalLM(config)
        with pytest.raises(ValueError, match=r"records no variants.*from_pretrained"):
            part(TOKENS)


def test_what_the_config_of_a_composed_model_names_restores_it(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    model = strong(
        transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_heads=4))
    )
    before = model.config._attn_implementation
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    plain = run(model, **inputs)
    patch(model, "softpick")
    model.save_pretrained(tmp_path)
    key = model.config._attn_implementation
    again = type(model).from_pretrained(tmp_path, attn_implementation=key)
    assert torch.equal(run(again, **inputs), run(model, **inputs))
    assert len(patches_of(again)[0].names) == 6
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path, attn_implementation=key)
    assert torch.equal(run(encoder, input_ids=TOKENS), run(model.encoder, input_ids=TOKENS))
    unpatch(model)
    assert model.config._attn_implementation == before
    assert torch.equal(run(model, **inputs), plain)


def test_a_model_whose_softmax_is_replaced_restores_under_its_own_implementation(tmp_path):
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    model = strong(transformers.BloomForCausalLM(config))
    patch(model, "softpick", backend="softmax-hook")
    model.save_pretrained(tmp_path)
    own = model.config._attn_implementation
    again = transformers.BloomForCausalLM.from_pretrained(tmp_path, attn_implementation=own)
    assert torch.equal(run(again), run(model))


def test_our_key_without_a_usable_record_computes_nothing():
    model = llama()
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    plain.set_attn_implementation("attnvariants")
    with pytest.raises(ValueError, match=r"never patched.*from_pretrained"):
        plain(TOKENS)
    newer, smaller = copy.deepcopy(model.config), copy.deepcopy(model.config)
    newer.attn_variants = {"version": 99}
    smaller.num_hidden_layers = 1
    for config, why in ((newer, "version 99"), (smaller, "no such module")):
        broken = transformers.LlamaForCausalLM(config)
        with pytest.raises(ValueError, match=f"never patched.*{why}"):
            broken(TOKENS)


@guarded
def test_what_transformers_saves_cannot_be_loaded_plainly(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    for load in (CAUSAL.from_pretrained, transformers.LlamaForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"load with attnvariants\.from_pretrained"):
            load(tmp_path)
    with pytest.raises(ValueError, match=r"load with attnvariants\.from_pretrained"):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict()))
    assert torch.equal(run(from_pretrained(CAUSAL, tmp_path)), run(model))
    unpatch(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(CAUSAL.from_pretrained(tmp_path)), run(model))


def test_a_plain_load_of_a_record_warns(tmp_path):
    model = llama()
    save_pretrained(model, tmp_path, guard=False)
    for more in ({}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            CAUSAL.from_pretrained(tmp_path, **more)
        assert ["does not carry" in str(w.message) for w in said].count(True) == 1
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="records attention variants"):
        CAUSAL.from_config(config)


def test_models_without_a_record_are_built_as_always():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    assert "post_init" not in model.__dict__
    assert attnvariants.hf.patches_of(model) == ()
