"""PEFT adapters of patched models: trained, saved, and loaded onto the right base or not at all."""

import copy
import json
import warnings

import pytest
import torch
from tiny import SMALL

from attnvariants import from_pretrained, patch, save_pretrained, unpatch
from attnvariants.diagnostics import diagnose
from attnvariants.hf import auto_load, load_adapter, peft_modules_to_save, save_adapter
from attnvariants.hf.state import state_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()

TOKENS = torch.randint(3, 99, (2, 18), generator=torch.Generator().manual_seed(1))


def base(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **changes)).eval()


def wrapped(model, modules=("attn_variant",), rank=4):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=rank, target_modules=["q_proj", "v_proj"], modules_to_save=list(modules) or None
    )
    return peft.get_peft_model(model, config)


def train(model, steps=3):
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model.eval()


def run(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def state(model):
    """Everything that a refused adapter must leave as it was."""
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return flags, modules, sorted(vars(model)), str(model.config), run(model)


def same(one, other):
    return one[:-1] == other[:-1] and torch.equal(one[-1], other[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained adapter with its learned values, its folder, and its output."""
    folder = tmp_path_factory.mktemp("adapter")
    model = base()
    patch(model, "ssmax", s=0.4)
    model = train(wrapped(model, peft_modules_to_save()))
    save_adapter(model, folder)
    return model, folder


def test_learned_values_are_trained_and_saved(trained):
    model, folder = trained
    values = {n: v for n, v in model.named_parameters() if "attn_variant.modules_to_save" in n}
    assert len(values) == 2
    for value in values.values():
        assert value.requires_grad
        assert value.grad.abs().min() > 0
        assert not torch.equal(value, torch.full_like(value, 0.4))
    stored = safetensors.load_file(folder / "adapter_model.safetensors")
    assert sum(".attn_variant.s" in name for name in stored) == 2
    record = json.loads((folder / "attn_variants.json").read_text())
    assert record["patches"][0]["initial"] == {"s": pytest.approx(0.4)}
    assert [row.parameters for row in state_of(model.get_base_model()).handles[0].report] == [4, 4]


@pytest.mark.parametrize("patched", [False, True])
def test_reload(trained, patched):
    model, folder = trained
    plain = base()
    if patched:
        patch(plain, "ssmax", s=0.4, impl="reference")
    again = load_adapter(plain, folder)
    torch.testing.assert_close(run(again), run(model), atol=1e-5, rtol=1e-5)
    with again.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(run(again), run(model), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(run(again), run(model), atol=1e-3)


def test_training_goes_on_after_a_reload(trained):
    _, folder = trained
    one, other = (load_adapter(base(), folder, is_trainable=True) for _ in range(2))
    before = run(one)
    assert torch.equal(run(train(one)), run(train(other)))
    assert not torch.equal(run(one), before)


def test_merge_and_unload(trained, tmp_path):
    _, folder = trained
    model = load_adapter(base(), folder)
    expected = run(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, atol=1e-5, rtol=1e-5)
    save_pretrained(merged, tmp_path)
    again = from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    assert torch.equal(run(again), run(merged))
    unpatch(merged)
    assert state_of(merged) is None


def test_unload_leaves_a_patched_base_that_can_be_unpatched(trained):
    _, folder = trained
    restored = load_adapter(base(), folder).unload()
    assert {row.variant for row in state_of(restored).handles[0].report} == {"ssmax"}
    unpatch(restored)
    assert torch.equal(run(restored), run(base()))


def test_several_adapters(trained, tmp_path):
    model, folder = trained
    both = load_adapter(base(), folder)
    assert load_adapter(both, folder, "second") is both
    both.add_adapter("third", peft.LoraConfig(r=2, target_modules=["q_proj"],
                                              modules_to_save=peft_modules_to_save()))  # fmt: skip
    for name in ("second", "default"):
        both.set_adapter(name)
        torch.testing.assert_close(run(both), run(model), atol=1e-5, rtol=1e-5)
    both.set_adapter("third")
    with model.disable_adapter():
        torch.testing.assert_close(run(both), run(model), atol=1e-5, rtol=1e-5)
    save_adapter(both, tmp_path)
    assert (tmp_path / "attn_variants.json").is_file()
    again = load_adapter(base(), tmp_path / "second")
    torch.testing.assert_close(run(again), run(model), atol=1e-5, rtol=1e-5)


def test_frozen_values_are_part_of_the_base(tmp_path):
    model = base()
    handle = patch(model, "ssmax", s=0.4)
    for value in handle.parameters.values():
        value.data.uniform_(0.2, 0.9)
    model = train(wrapped(model, modules=()))
    assert not any(value.requires_grad for value in handle.parameters.values())
    save_adapter(model, tmp_path)
    assert torch.equal(run(load_adapter(base(), tmp_path)), run(model))
    other = base()
    patch(other, "ssmax", s=0.4)
    before = state(other)
    with pytest.raises(ValueError, match=r"attn_variant\.s of this base holds other values"):
        load_adapter(other, tmp_path)
    assert same(state(other), before)


def other_options(model):
    patch(model, "softpick")


def other_penalties(model):
    patch(model, "ssmax", s=0.4, penalties="added")


def other_layers(model):
    patch(model, "ssmax", layers=0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_options, r"trained with 'ssmax'\(learned s\) at .*0.self_attn, and .* 'softpick'"),
        (other_penalties, r"and this base has 'ssmax'\(penalties='added', learned s\)"),
        (other_layers, r"trained with 'ssmax'\(learned s\) at .*1.self_attn, and .* no variant"),
    ],
)
def test_a_base_that_is_patched_differently(trained, spoil, message):
    _, folder = trained
    model = base()
    spoil(model)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert same(state(model), before)


def rewrite(name, change):
    def spoil(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return spoil


def with_tensors(change):
    def spoil(content):
        return safetensors.save(change(safetensors.load(content)), metadata={"format": "pt"})

    return rewrite("adapter_model.safetensors", spoil)


def shorter(tensors):
    return {n: torch.ones(3) if "attn_variant" in n else v for n, v in tensors.items()}


def fewer(tensors):
    return {n: v for n, v in tensors.items() if "layers.0.self_attn.attn_variant" not in n}


def other_rank(tensors):
    return {n: torch.cat([v, v]) if "lora_A" in n else v for n, v in tensors.items()}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), ValueError, "no PEFT adapter"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), ValueError, "pickled weights"),
        (rewrite("attn_variants.json", lambda b: b[:-9]), ValueError, "json is no valid JSON"),
        (rewrite("attn_variants.json", lambda b: b.replace(b": 1,", b": 7,").replace(b"ssmax",
            b"ssmin")), ValueError, "version 7|not registered"),
        (rewrite("adapter_model.safetensors", lambda b: b[:-9]), ValueError, "truncated or corr"),
        (with_tensors(shorter), ValueError, r"has shape \[3\] and the base needs \[4\]"),
        (with_tensors(fewer), ValueError, r"lacks .*layers\.0\.self_attn\.attn_variant"),
        (with_tensors(other_rank), RuntimeError, "size mismatch"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_loaded(trained, tmp_path, spoil, error, message, wrap):
    _, folder = trained
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    model = load_adapter(base(), folder) if wrap else base()
    before = state(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path, "another")
    assert same(state(model), before)


def without_sidecar(folder, target):
    for path in folder.iterdir():
        if path.name != "attn_variants.json":
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_an_adapter_that_does_not_tell_is_held_to_what_is_known(trained, tmp_path):
    _, folder = trained
    plain = without_sidecar(folder, tmp_path)
    model = base()
    before = state(model)
    with pytest.raises(ValueError, match=r"learned values .*no attn_variants\.json"):
        load_adapter(model, plain)
    assert same(state(model), before)
    patch(model, "ssmax", s=0.4)
    with pytest.warns(UserWarning, match="does not say .*loaded onto a base with 'ssmax'"):
        again = load_adapter(model, plain)
    assert torch.equal(run(again), run(trained[0]))


def test_an_adapter_of_pefts_own_on_the_base_that_it_names(tmp_path):
    model = base()
    patch(model, "softpick")
    save_pretrained(model, tmp_path / "base")
    own = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "base")
    trained = train(wrapped(own, modules=()))
    peft.PeftModel.save_pretrained(trained, tmp_path / "full")
    (tmp_path / "plain").mkdir()
    folder = without_sidecar(tmp_path / "full", tmp_path / "plain")
    right = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(run(load_adapter(right, folder)), run(trained))
    wrong = base()
    for variant in ("relu", None):
        if variant:
            patch(wrong, variant)
        with pytest.raises(ValueError, match=r"which has 'softpick'.*from_pretrained from"):
            load_adapter(wrong, folder)
        if variant:
            unpatch(wrong)


def test_a_plain_adapter_on_a_plain_base(tmp_path):
    trained = train(wrapped(base(), modules=()))
    trained.save_pretrained(tmp_path)
    assert not (tmp_path / "attn_variants.json").exists()
    assert torch.equal(run(load_adapter(base(), tmp_path)), run(trained))


def test_pefts_own_save_tells_what_the_base_carries(tmp_path):
    model = base()
    patch(model, "ssmax", s=0.4)
    trained = train(wrapped(model))
    for again in (trained, copy.deepcopy(trained)):
        again.save_pretrained(tmp_path)
        assert torch.equal(run(load_adapter(base(), tmp_path)), run(trained))
        (tmp_path / "attn_variants.json").unlink()
    with pytest.warns(UserWarning, match="the base carries none"):
        peft.PeftModel.from_pretrained(base(), tmp_path)


def test_peft_warns_of_an_adapter_on_a_base_without_its_variants(tmp_path):
    model = base()
    patch(model, "softpick")
    wrapped(model, modules=()).save_pretrained(tmp_path)
    plain, other, right = base(), base(), base()
    patch(other, "relu")
    patch(right, "softpick")
    for wrong, has in ((plain, "no variant"), (other, "'relu'")):
        with pytest.warns(UserWarning, match=f"trained with 'softpick'.* this base has {has}"):
            loaded = peft.PeftModel.from_pretrained(wrong, tmp_path)
    with pytest.warns(UserWarning, match="its outputs are wrong"):
        copy.deepcopy(loaded).load_adapter(tmp_path, "second")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained with")
        peft.PeftModel.from_pretrained(right, tmp_path).load_adapter(tmp_path, "second")
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("cls", ["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_auto_load_refuses_an_adapter_whose_base_is_plain(tmp_path, cls):
    cls = getattr(transformers, cls)
    base().save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    patch(model, "softpick")
    adapter = tmp_path / "adapter"
    wrapped(model, modules=()).save_pretrained(adapter)
    with auto_load(), pytest.raises(ValueError, match=r"trained with 'softpick'.* no variant"):
        cls.from_pretrained(adapter)


def test_an_adapter_of_another_model(trained):
    _, folder = trained
    bert = transformers.BertModel(transformers.BertConfig(**{**SMALL, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn, and BertModel has no such"):
        load_adapter(bert, folder)
    with pytest.raises(ValueError, match="another name; load it onto the class"):
        load_adapter(base().model, folder)


def test_patching_after_peft_is_refused(trained):
    _, folder = trained
    model = wrapped(base(), modules=())
    for each in (model, model.get_base_model()):
        before = state(each)
        with pytest.raises(ValueError, match="patch came after PEFT"):
            patch(each, "ssmax")
        with pytest.raises(ValueError, match=r"carries no att|carries adapters"):
            load_adapter(each, folder)
        assert same(state(each), before)
    with pytest.raises(ValueError, match="carries no attention variants"):
        save_adapter(model, folder)


def test_what_needs_no_saving_can_come_after_peft(trained):
    plain = wrapped(base(), modules=())
    before = state(plain)
    with patch(plain.get_base_model(), "softpick") as handle:
        assert len(handle.report.patched) == 2
        assert not torch.equal(run(plain), before[-1])
    assert same(state(plain), before)
    for model in (plain, trained[0]):
        before = state(model)
        report = diagnose(model, TOKENS)
        assert [layer.variant for layer in report.layers] == ["ssmax", "ssmax"] or model is plain
        assert same(state(model), before)


def test_unpatching_and_saving_under_peft_is_refused(trained, tmp_path):
    model, _ = trained
    before = state(model)
    handle = state_of(model.get_base_model()).handles[0]
    for act in (lambda: unpatch(model), lambda: unpatch(model.get_base_model()), handle.unpatch):
        with pytest.raises(ValueError, match="before unpatch, unload"):
            act()
    for each in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="carries PEFT adapters"):
            save_pretrained(each, tmp_path / "new")
    with pytest.raises(ValueError, match="takes a PeftModel, got LlamaForCausalLM"):
        save_adapter(base(), tmp_path / "new")
    assert same(state(model), before)
    assert not (tmp_path / "new").exists()


def test_values_that_are_trained_but_would_not_be_saved(tmp_path):
    model = base()
    handle = patch(model, "ssmax")
    model = wrapped(model, modules=())
    for value in handle.parameters.values():
        value.requires_grad_(True)
    with pytest.raises(ValueError, match="trained but PEFT would not save them"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
