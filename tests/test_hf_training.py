"""Training patched models with transformers' Trainer: resuming, packing, precision, decay."""

import pytest
import torch
from tiny import SMALL

from attnvariants import from_pretrained, patch
from attnvariants.hf import param_groups

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
transformers.logging.set_verbosity_error()

TEXTS = torch.randint(3, 99, (16, 12), generator=torch.Generator().manual_seed(1)).tolist()
DATA = [{"input_ids": text, "labels": text} for text in TEXTS]
LEARNED = "model.layers.0.self_attn.attn_variant.s"


def model_with(variant="ssmax", **options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    patch(model, variant, **options)
    return model


def trainer(model, folder, collator=None, optimizer=None, **settings):
    settings = {"learning_rate": 0.01, "max_steps": 4, "weight_decay": 0.5, **settings}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, logging_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=True, seed=3, **settings,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=DATA, data_collator=collator, optimizers=(optimizer, None)
    )


def adam(model, **changes):
    return torch.optim.AdamW(param_groups(model, 0.5), lr=0.01, **changes)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_no_decay_on_learned_values():
    model = model_with(s=0.5)
    decays, others = param_groups(model, 0.1)
    assert (decays["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(value): name for name, value in model.named_parameters()}
    found = [{names.pop(id(value)) for value in group["params"]} for group in (decays, others)]
    assert not names
    assert found[1] == {n for n in dict(model.named_parameters()) if "attn_v" in n or "norm" in n}
    assert sum("attn_variant" in name for name in found[1]) == 2

    optimizer = torch.optim.AdamW(param_groups(model, 0.5), lr=0.1)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    before = weights(model)
    optimizer.step()
    after = weights(model)
    assert torch.equal(after[LEARNED], before[LEARNED])
    weight = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(after[weight], before[weight] * 0.95)


def test_groups_hold_what_is_trained_alone():
    model = model_with(trainable=False)
    frozen = {id(value) for name, value in model.named_parameters() if "attn_variant" in name}
    assert len(frozen) == 2
    assert not any(id(v) in frozen for group in param_groups(model, 0) for v in group["params"])
    for value in model.parameters():
        value.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of this LlamaForCausalLM requires"):
        param_groups(model, 0.1)
    for wrong in (-1, "0.1", float("nan")):
        with pytest.raises(ValueError, match="weight_decay must be a number"):
            param_groups(model_with(), wrong)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_resuming_is_training_on(tmp_path, settings):
    whole = model_with(s=0.4)
    settings = {"save_steps": 2, "save_strategy": "steps", **settings}
    trainer(whole, tmp_path / "whole", optimizer=adam(whole), **settings).train()
    expected = weights(whole)
    start = weights(model_with(s=0.4))
    assert all(not torch.equal(value, start[name]) for name, value in expected.items())

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    halves = [model_with(s=0.4)]
    if "bf16" not in settings:
        halves.append(from_pretrained(transformers.LlamaForCausalLM, checkpoint))
        assert not torch.equal(weights(halves[1])[LEARNED], expected[LEARNED])
    for i, half in enumerate(halves):
        resumed = trainer(half, tmp_path / str(i), optimizer=adam(half), **settings)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert all(torch.equal(value, expected[name]) for name, value in weights(half).items())
    last = from_pretrained(transformers.LlamaForCausalLM, tmp_path / "whole" / "checkpoint-4")
    assert all(torch.equal(value, expected[name]) for name, value in weights(last).items())


def test_trainers_own_optimizer_finds_the_learned_values(tmp_path):
    model = model_with(s=0.4)
    trainer(model, tmp_path, save_strategy="no").train()
    assert not torch.equal(weights(model)[LEARNED], torch.full((4,), 0.4))


@pytest.mark.parametrize("variant", ["ssmax", "softpick"])
def test_packed_documents_are_trained_as_if_apart(variant):
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    plain = transformers.DataCollatorWithFlattening()
    lengths = (3, 12, 7)
    documents = [{"input_ids": text[:n]} for text, n in zip(TEXTS, lengths, strict=False)]
    model = model_with(variant)

    losses, tokens = [], []
    for document in documents:
        ids = torch.tensor([document["input_ids"]])
        losses.append(model(ids, labels=ids, use_cache=False).loss)
        tokens.append(ids.shape[1] - 1)
    expected = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    expected.backward()
    apart = {name: value.grad.clone() for name, value in model.named_parameters()}
    for collate in (collator, plain):
        model.zero_grad()
        loss = model(**collate(documents), use_cache=False).loss
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        loss.backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(value.grad, apart[name], atol=1e-6, rtol=1e-4)


def test_the_trainer_packs(tmp_path):
    model = model_with("ssmax", s=0.4)
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packing = trainer(model, tmp_path, collator, adam(model), save_strategy="no")
    packing.train_dataset = [{"input_ids": text[: 3 + i % 8]} for i, text in enumerate(TEXTS)]
    packing.train()
    seen = [entry["loss"] for entry in packing.state.log_history if "loss" in entry]
    assert len(seen) == 4
    assert seen[-1] < seen[0]
    assert not torch.equal(weights(model)[LEARNED], torch.full((4,), 0.4))
