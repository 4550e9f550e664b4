"""Patched models in trl's trainers: the reference model computes the variant, too."""

import pytest
import torch
from tiny import SMALL

from attnvariants import from_pretrained, patch, save_pretrained
from attnvariants.hf import patches_of, peft_modules_to_save

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
tokenizers = pytest.importorskip("tokenizers")
transformers.logging.set_verbosity_error()

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(90))]
PROMPTS = [" ".join(f"w{(7 * i + 3 * j) % 90}" for j in range(3 + i % 4)) for i in range(8)]
SETTINGS = {
    "max_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "save_strategy": "no", "per_device_train_batch_size": 4,
    "disable_tqdm": True, "seed": 3,
}  # fmt: skip
GENERATING = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1}


def words():
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def policy(folder, variant):
    """A model that was patched, saved and loaded, with learned values unlike the initial ones."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.dim() > 1:
            value.data.normal_(0, 0.3, generator=generator)
    patch(model, variant)
    for name, value in model.named_parameters():
        if ".attn_variant." in name:
            value.data.uniform_(0.5, 1.5, generator=generator)
    save_pretrained(model, folder)
    words().save_pretrained(folder)
    return from_pretrained(transformers.AutoModelForCausalLM, folder)


def lengths(completions, **_):
    return [float(len(text)) for text in completions]


def trainer(name, model, folder, **more):
    """A trainer of trl and the metric that says whether policy and reference agree."""
    configs = {"beta": 0.1} if name in ("DPO", "KTO") else GENERATING
    config = getattr(trl, f"{name}Config")(str(folder / "out"), **SETTINGS, **configs)
    data = {"prompt": PROMPTS}
    if name == "DPO":
        data |= {"chosen": PROMPTS[::-1], "rejected": PROMPTS}
    elif name == "KTO":
        data |= {"completion": PROMPTS[::-1], "label": [True, False] * 4}
    else:
        more["reward_funcs"] = lengths
    return getattr(trl, f"{name}Trainer")(
        model=model, args=config, train_dataset=datasets.Dataset.from_dict(data),
        processing_class=words(), **more,
    )  # fmt: skip


def disagreement(name, trained):
    log = trained.state.log_history[0]
    if name == "DPO":
        return log["loss"] - 0.6931472
    if name == "KTO":
        return log["loss"] - 0.5
    return log["kl"]


@pytest.mark.parametrize("variant", ["ssmax", "softpick"])
@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_the_reference_of_a_trainer_is_the_policy(tmp_path, name, variant):
    model = policy(tmp_path, variant)
    trained = trainer(name, model, tmp_path)
    (handle,) = patches_of(trained.ref_model)
    assert handle.active
    for key, value in handle.parameters.items():
        assert torch.equal(value, model.get_parameter(key))
    trained.train()
    assert disagreement(name, trained) == pytest.approx(0, abs=2e-5)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_the_reference_under_an_adapter_is_the_base(tmp_path, name):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = policy(tmp_path, "ssmax")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=peft_modules_to_save())
    trained = trainer(name, model, tmp_path, peft_config=config)
    assert trained.ref_model is None
    trained.train()
    assert disagreement(name, trained) == pytest.approx(0, abs=2e-5)


def test_a_reference_that_is_copied_carries_the_variant(tmp_path):
    model = policy(tmp_path, "ssmax")
    reference = trl.create_reference_model(model)
    tokens = torch.arange(4, 16)[None]
    assert torch.equal(reference(tokens).logits, model(tokens).logits)
    assert patches_of(reference)[0].model is reference
    trained = trainer("DPO", model, tmp_path, ref_model=reference)
    trained.train()
    assert disagreement("DPO", trained) == pytest.approx(0, abs=2e-5)


def test_a_checkpoint_of_a_trainer_restores_or_refuses(tmp_path):
    model = policy(tmp_path, "ssmax")
    trained = trainer("DPO", model, tmp_path)
    trained.train()
    trained.save_model(tmp_path / "saved")
    cls = transformers.AutoModelForCausalLM
    again = from_pretrained(cls, tmp_path / "saved")
    tokens = torch.arange(4, 16)[None]
    for key, value in patches_of(again)[0].parameters.items():
        assert torch.equal(value, model.get_parameter(key))
    assert patches_of(again)[0].verify().reached == 2
    assert again(tokens).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"load with attnvariants\.from_pretrained"):
        cls.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"load with attnvariants\.from_pretrained"):
        trainer("DPO", str(tmp_path), tmp_path)
