"""Saving and loading patched models: the same numbers, or a sentence and no model."""

import copy
import json
import threading
import warnings

import pytest
import torch
from tiny import SMALL

import attnvariants
from attnvariants import from_pretrained, patch, save_pretrained, unpatch
from attnvariants.hf import auto_load, patches_of

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
from own_softmax import OwnConfig, OwnForCausalLM  # noqa: E402

transformers.logging.set_verbosity_error()
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

TOKENS = torch.randint(3, 99, (2, 18), generator=torch.Generator().manual_seed(1))
CAUSAL = transformers.AutoModelForCausalLM


def llama(cls="LlamaForCausalLM", **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 3, **changes})
    return getattr(transformers, cls)(config).eval()


def shake(model):
    """Other learned values than initial ones, each different."""
    generator = torch.Generator().manual_seed(2)
    for name, value in model.named_parameters():
        if ".attn_variant." in name:
            value.data.copy_(torch.rand(value.shape, generator=generator) + 0.2)
    return model


def patched(model=None, layers=0):
    model = llama() if model is None else model
    patch(model, "ssmax", b=torch.tensor([0.1, 0.2, 0.3, 0.4]), layers=layers)
    patch(model, "softpick", eps=1e-5, layers=1)
    return shake(model)


def run(model, **more):
    with torch.no_grad():
        result = model(TOKENS, **more)
    return next(result[key] for key in ("logits", "last_hidden_state") if key in result)


def learned(model):
    return {n: p for n, p in model.named_parameters() if ".attn_variant." in n}


def same_everywhere(one, other):
    assert learned(one).keys() == learned(other).keys()
    assert all(torch.equal(p, learned(one)[n]) for n, p in learned(other).items())
    assert one.config.attn_variants == other.config.attn_variants
    assert torch.equal(run(one), run(other))


@pytest.fixture
def saved(tmp_path):
    model = patched()
    save_pretrained(model, tmp_path)
    return model, tmp_path


def edit(folder, **changes):
    """Change the record, or one entry of it, in a saved config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    record = config["attn_variants"]
    for name, value in changes.items():
        (record if name in record else record["patches"][0])[name] = value
    path.write_text(json.dumps(config))


def hooks():
    methods = transformers.PreTrainedModel.__dict__
    return [methods[name] for name in ("from_pretrained", "post_init", "_initialize_weights")]


@pytest.mark.parametrize("cls", ["AutoModelForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize(
    "how",
    [{}, {"max_shard_size": "20KB"}, {"state_dict": True}, {"guard": False}, {"plain": True}],
    ids=lambda how: next(iter(how), "default"),
)
def test_reload(tmp_path, how, cls):
    model, before = patched(), hooks()
    if how.pop("plain", False):
        model.save_pretrained(tmp_path)
    else:
        state_dict = model.state_dict() if how.pop("state_dict", False) else None
        save_pretrained(model, tmp_path, state_dict=state_dict, **how)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, info = from_pretrained(
            getattr(transformers, cls), tmp_path, output_loading_info=True
        )
    assert not any(info.values()), info
    same_everywhere(again, model)
    assert hooks() == before


def test_a_reloaded_model_is_patched_as_by_patch(saved):
    model, folder = saved
    again = from_pretrained(CAUSAL, folder)
    assert [row.variant for row in patches_of(again)[0].report] == ["ssmax", "softpick", None]
    patches_of(again)[0].verify()
    assert patch(again, "softpick", eps=1e-5, layers=1).names == ("model.layers.1.self_attn",)
    gradients = []
    for each in (model, again):
        each(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: value.grad for name, value in each.named_parameters()})
    assert all(torch.equal(gradients[1][name], value) for name, value in gradients[0].items())
    unpatch(again)
    plain = llama().state_dict()
    assert again.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in again.state_dict().items())
    assert not hasattr(again.config, "attn_variants")
    assert "attn" not in again.config._attn_implementation
    assert torch.equal(run(again), run(llama()))


@pytest.mark.parametrize("frozen", [False, True])
def test_dtype_device_map_and_what_is_frozen(tmp_path, frozen):
    torch.manual_seed(0)
    model = CAUSAL.from_config(transformers.LlamaConfig(**SMALL), dtype=torch.bfloat16).eval()
    patch(model, "ssmax", s=0.3, trainable=not frozen)
    save_pretrained(shake(model), tmp_path)
    again = from_pretrained(CAUSAL, tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"})
    same_everywhere(again, model)
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    assert {value.requires_grad for value in learned(again).values()} == {not frozen}
    wide = from_pretrained(CAUSAL, tmp_path, dtype=torch.float32)
    assert {value.dtype for value in wide.parameters()} == {torch.float32}


def test_weights_offloaded_to_disk(saved, tmp_path):
    model, folder = saved
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.layers.2": "disk"}
    again = from_pretrained(CAUSAL, folder, device_map=places, offload_folder=tmp_path / "off")
    assert learned(again)["model.layers.0.self_attn.attn_variant.s"].is_meta
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize(
    ("saves", "loads"),
    [
        ("LlamaForCausalLM", "LlamaModel"),
        ("LlamaModel", "LlamaForCausalLM"),
        ("LlamaForCausalLM", "LlamaForSequenceClassification"),
        ("LlamaForSequenceClassification", "LlamaModel"),
    ],
)
def test_other_heads(tmp_path, saves, loads):
    model = patched(llama(saves, pad_token_id=0))
    save_pretrained(model, tmp_path)
    again, info = from_pretrained(
        getattr(transformers, loads), tmp_path, output_loading_info=True, pad_token_id=0
    )
    assert not any("attn" in str(key) for keys in info.values() for key in keys)
    assert torch.equal(run(again.base_model), run(model.base_model))
    assert len(patches_of(again)) == 2
    unpatch(again)
    assert not learned(again)


def test_a_lone_encoder_leaves_the_decoder_out(tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=99, **sizes))
    try:
        patch(model.eval(), "ssmax", s=0.4)
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has its own attention in T5")
    save_pretrained(shake(model), tmp_path)
    whole = from_pretrained(transformers.T5ForConditionalGeneration, tmp_path)
    same = [each(input_ids=TOKENS, decoder_input_ids=TOKENS).logits for each in (whole, model)]
    assert torch.equal(*same)
    encoder = from_pretrained(transformers.T5EncoderModel, tmp_path)
    assert torch.equal(run(encoder), run(model.get_encoder()))
    unpatch(encoder)
    assert not any(
        hasattr(m.config, "attn_variants") for m in encoder.modules() if hasattr(m, "config")
    )


def test_a_composite_model(tmp_path):
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    patch(model, "ssmax", s=0.4)
    save_pretrained(shake(model), tmp_path)
    auto = transformers.AutoModelForImageTextToText
    again, info = from_pretrained(auto, tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    same_everywhere(again, model)


@pytest.mark.parametrize("how", [{"masks": "bool"}, {"backend": "softmax-hook"}])
def test_how_a_variant_is_computed_is_recorded(tmp_path, how):
    torch.manual_seed(0)
    hook = "backend" in how
    model = OwnForCausalLM(OwnConfig()).eval() if hook else llama()
    patch(model, "softpick", **how)
    save_pretrained(model, tmp_path)
    again = from_pretrained(type(model), tmp_path)
    same_everywhere(again, model)
    entry = again.config.attn_variants["patches"][0]
    assert {name: entry.get(name) for name in how} == how
    unpatch(again)
    unpatch(model)
    assert torch.equal(run(again), run(model))


def rewrite(folder, **changes):
    """Change every recorded patch of a saved model; None takes a field out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for entry in config["attn_variants"]["patches"]:
        entry.update(changes)
        for name in [name for name in changes if entry[name] is None]:
            del entry[name]
    path.write_text(json.dumps(config))


def test_a_family_that_calls_the_interface_by_now_is_restored_through_it(tmp_path):
    model = patched()
    save_pretrained(model, tmp_path)
    rewrite(tmp_path, backend="softmax-hook")
    with pytest.warns(UserWarning, match=r"LlamaAttention were saved with backend='softmax-hook'"):
        again = from_pretrained(CAUSAL, tmp_path)
    same_everywhere(again, model)
    assert torch.equal(run(again), run(model))
    save_pretrained(again, tmp_path / "again")
    assert "softmax-hook" not in (tmp_path / "again" / "config.json").read_text()


def test_a_family_that_does_not_call_the_interface_yet_is_restored_through_the_hook(tmp_path):
    torch.manual_seed(0)
    model = OwnForCausalLM(OwnConfig()).eval()
    patch(model, "ssmax", s=0.4, backend="softmax-hook")
    save_pretrained(shake(model), tmp_path)
    rewrite(tmp_path, backend=None)
    with pytest.warns(UserWarning, match=r"computes attention itself, .*backend='softmax-hook'"):
        again = from_pretrained(OwnForCausalLM, tmp_path)
    same_everywhere(again, model)
    assert torch.equal(run(again), run(model))
    rewrite(tmp_path, backend=None, impl="chunked")
    with pytest.raises(ValueError, match=r"saved with impl='chunked'.*load with impl='auto'"):
        from_pretrained(OwnForCausalLM, tmp_path)
    with pytest.warns(UserWarning, match="restored with backend='softmax-hook'"):
        from_pretrained(OwnForCausalLM, tmp_path, impl="auto")


def test_missing_values_have_their_initial_ones(saved):
    _, folder = saved
    weights = safetensors.load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith("variant.b")}
    safetensors.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"lacks 1 learned values .*layers\.0.*variant\.b"):
        again = from_pretrained(CAUSAL, folder)
    values = learned(again)
    assert torch.equal(
        values["model.layers.0.self_attn.attn_variant.b"], torch.tensor([0.1, 0.2, 0.3, 0.4])
    )
    stored = weights["model.layers.0.self_attn.attn_variant.s"]
    assert torch.equal(values["model.layers.0.self_attn.attn_variant.s"], stored)
    with pytest.raises(ValueError, match="lacks 1 learned values"):
        from_pretrained(CAUSAL, folder, strict=True)


def test_auto_load_is_this_threads_alone(saved):
    model, folder = saved
    seen, before = {}, hooks()

    def elsewhere():
        seen["plain"] = CAUSAL.from_pretrained(folder, attn_implementation="sdpa")

    with auto_load():
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        with auto_load(impl="reference"):
            inner = CAUSAL.from_pretrained(folder)
        same_everywhere(CAUSAL.from_pretrained(folder), model)
    assert patches_of(seen["plain"]) == ()
    assert {row.impl for row in patches_of(inner)[0].report.patched} == {"reference"}
    assert hooks() == before
    with pytest.raises(ValueError, match="unknown impl"):
        from_pretrained(CAUSAL, folder, impl="fast")
    with pytest.raises(KeyError), auto_load():
        raise KeyError
    assert hooks() == before


def test_a_plain_reload_does_not_go_unnoticed(saved):
    _, folder = saved
    if VERSION >= (5, 0):
        with pytest.raises(ValueError, match=r"load with attnvariants\.from_pretrained"):
            CAUSAL.from_pretrained(folder)
    plain = CAUSAL.from_pretrained(folder, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"plain from_pretrained.* delete model\.config"):
        save_pretrained(plain, folder)
    with pytest.warns(UserWarning, match=r"\(softpick, ssmax\) that it does not carry"):
        patch(plain, "softpick")
    same_everywhere(from_pretrained(CAUSAL, folder), patched())


class Refused:
    """What from_pretrained says of a folder that was spoilt."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, match, auto=CAUSAL, **kwargs):
        before = hooks()
        with pytest.raises(ValueError, match=match) as caught:
            from_pretrained(auto, self.folder, **kwargs)
        assert str(caught.value).endswith(".")
        assert hooks() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "softpik"}, r"not registered: call attnvariants\.register.*'softpick'"),
        ({"version": 2}, r"version 2, written by attnvariants 0.*upgrade attnvariants"),
        ({"version": "1"}, "cannot be read"),
        ({"patches": []}, "no list of patches"),
        ({"patches": [3]}, "no mapping, got 3"),
        ({"options": {"eps": 1.0}}, r"ssmax does not take: ssmax takes s, b; got 'eps'"),
        ({"options": 3}, "options must be a dict, got 3"),
        ({"learned": ["s", "t"]}, "learned value 't'"),
        ({"learned": ["s"]}, "learned value 'b'"),
        ({"initial": {"s": "one"}}, "ssmax's s as 'one'"),
        ({"initial": {"s": float("nan")}}, "ssmax does not take: ssmax's s holds NaN"),
        ({"initial": {"s": [1.0, 2.0]}}, r"\[4\] values"),
        ({"impl": "fast"}, "unknown impl"),
        ({"modules": ["model.layers.7.self_attn"]}, "layers.7.self_attn, and LlamaForCausalLM has"),
        ({"modules": ["model.layers.0.mlp"]}, "matches none|cannot be patched|no attention"),
        ({"modules": ["model.layers.1.self_attn"]}, "records model.layers.1.self_attn twice"),
        ({"modules": ["model.layers.2.self_attn"]}, "do not match its config at model.layers.0"),
        ({"modules": [1]}, "modules must be names, got 1"),
        ({"modules": [["model"]]}, r"modules must be names, got \['model'\]"),
        ({"shape": 1}, "records shape of a patch, which this package does not know"),
        ({"backend": "hardware"}, "backend must be"),
    ],
)
def test_records_that_cannot_be_restored(saved, changes, message):
    _, folder = saved
    edit(folder, **changes)
    Refused(folder)(message)


def test_files_that_cannot_be_read(saved):
    _, folder = saved
    refused, weights = Refused(folder), folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused("model.safetensors is truncated or corrupt")
    weights.write_bytes(content[:4])
    refused("model.safetensors is truncated or corrupt")

    tensors = safetensors.load(content)
    name = "model.layers.0.self_attn.attn_variant.s"
    tensors[name] = torch.ones(3)
    safetensors.save_file(tensors, weights, metadata={"format": "pt"})
    refused(rf"{name} in .* has shape \[3\], the model needs \[4\]")

    tensors[name] = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    safetensors.save_file(tensors, weights, metadata={"format": "pt"})
    refused(f"NaN or infinity at {name}")

    tensors[name] = torch.ones(4)
    tensors["model.layers.2.self_attn.attn_variant.s"] = torch.ones(4)
    safetensors.save_file(tensors, weights, metadata={"format": "pt"})
    refused("learned values do not match its config at model.layers.2")
    refused("config that was passed does not", config=transformers.LlamaConfig(**SMALL))


def test_a_broken_shard_is_named(tmp_path):
    save_pretrained(patched(), tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    Refused(tmp_path)(f"{shard.name} is truncated or corrupt")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    Refused(tmp_path)(r"index.json is no valid JSON")


def test_arguments_of_from_pretrained(saved):
    model, folder = saved
    with pytest.raises(ValueError, match=r"takes a class of transformers.*'llama'"):
        from_pretrained("llama", folder)
    Refused(folder)("layers.0.self_attn, and BertModel has no such", transformers.BertModel)
    (folder / "adapter_config.json").write_text("{}")
    Refused(folder)("PEFT adapter; load its base model")
    state_dict = model.state_dict()
    cls = transformers.LlamaForCausalLM
    again = from_pretrained(cls, None, config=model.config, state_dict=state_dict)
    assert torch.equal(run(again), run(model))


def unchanged(model):
    return copy.deepcopy((vars(model.config), list(model.state_dict())))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: delattr(m.model.layers[0].self_attn, "attn_variant"), "attn_variant is gone"),
        (lambda m: m.set_attn_implementation("sdpa"), "set to 'sdpa' after patching"),
        (
            lambda m: setattr(
                m.model.layers[2].self_attn,
                "attn_variant",
                m.model.layers[0].self_attn.attn_variant,
            ),
            "share one attn_variant",
        ),
    ],
)
def test_models_that_disagree_with_themselves(tmp_path, spoil, message):
    model = patched()
    spoil(model)
    before = unchanged(model)
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path / "new")
    assert unchanged(model) == before
    assert not (tmp_path / "new").exists()


def test_arguments_of_save_pretrained(tmp_path):
    model = patched()
    (tmp_path / "file").write_text("")
    before = unchanged(model)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    for arguments, message in (
        ((torch.nn.Linear(2, 2), tmp_path), "takes a transformers model, got Linear"),
        (("llama", tmp_path), "takes a torch model, got str"),
        ((model, tmp_path / "file"), "is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(*arguments)
    with pytest.raises(ValueError, match=r"lacks 2 learned values.*like module\."):
        save_pretrained(model, tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="safetensors files only"):
        save_pretrained(model, tmp_path, safe_serialization=False)
    assert unchanged(model) == before


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, torch.compile], ids=["parallel", "compile"]
)
def test_wrappers_are_taken_off(tmp_path, wrap):
    model = patched()
    save_pretrained(wrap(model), tmp_path)
    same_everywhere(from_pretrained(CAUSAL, tmp_path), model)


def test_models_patched_through_a_part(tmp_path):
    model = llama()
    patch(model.model, "ssmax", s=0.3)
    save_pretrained(shake(model), tmp_path)
    again = from_pretrained(CAUSAL, tmp_path)
    assert torch.equal(run(again), run(model))


def test_a_model_without_variants_is_saved_and_loaded_as_it_is(tmp_path):
    model = llama()
    save_pretrained(model, tmp_path)
    again = from_pretrained(CAUSAL, tmp_path)
    assert torch.equal(run(again), run(model))
    assert patches_of(again) == ()


def test_copies_and_pickles(tmp_path):
    model = patched()
    torch.save(model, tmp_path / "whole.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        same_everywhere(twin, model)
        unpatch(twin)
        assert torch.equal(run(twin), run(llama()))
    assert len(learned(model)) == 2


def test_state_dicts_are_strict():
    model, twin, other = patched(), patched(), llama()
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
    assert twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(twin), run(model))
    with pytest.raises(
        RuntimeError, match=r"Unexpected key.*layers\.0\.self_attn\.attn_variant\.s"
    ):
        other.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.self_attn\.attn_variant\.s"):
        model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("length", [1, 2, 1024])
def test_retrofit_has_a_mean_temperature_of_one(length):
    s = attnvariants.get_variant("ssmax").presets["retrofit"](length)["s"]
    mean = torch.arange(1, length + 1).double().log().mean()
    if length > 1:
        assert s * float(mean) == pytest.approx(1, rel=1e-12)
    else:
        assert s == 1
    if length == 1024:
        assert s == pytest.approx(0.168471, abs=1e-6)
