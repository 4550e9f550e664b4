"""Additive masks that hide by a number far from their dtype's lowest, and biases that do not."""

from inspect import signature

import pytest
import torch
from tiny import SMALL

import attnvariants
from attnvariants import patch, unpatch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
penalties = pytest.importorskip("attnvariants.hf.penalties")

NUMBERS = (-50.0, -100.0, -1e3, -1e4, -65504.0, -1e5, -1e9, -1e30)
VARIANTS = ("softmax", "ssmax", "softpick", "relu", "lssa", "sparsemax")


def future(q_len, kv_len):
    return torch.ones(q_len, kv_len, dtype=torch.bool).triu(kv_len - q_len + 1)[None, None]


def behind(shown, kv_len):
    return (torch.arange(kv_len) >= shown)[None, None, None]


def penalty(hidden, number):
    return torch.zeros(hidden.shape).masked_fill(hidden, number)


def bias(heads=4, length=12, std=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table = std * torch.randn(heads, 2 * length, generator=generator)
    distance = torch.arange(length)[:, None] - torch.arange(length) + length
    return table[:, distance][None]


def alibi(heads, q_len, kv_len, keys=None):
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1))
    distance = torch.arange(kv_len) - torch.arange(kv_len - q_len, kv_len)[:, None]
    found = -slopes[:, None, None] * distance.abs()
    return (found if keys is None else found[..., keys])[None]


def agrees(mask, hidden):
    return torch.equal(penalties.hidden_in(mask), hidden.expand(mask.shape))


@pytest.mark.parametrize("number", NUMBERS)
def test_masks_of_penalties_and_their_sums_hide(number):
    causal, padding = future(12, 12), behind(9, 12).expand(2, 1, 1, 12)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for hidden in (causal, padding, causal | padding):
            assert agrees(penalty(hidden, number).to(dtype), hidden)
    both = causal | padding
    assert agrees(penalty(causal, number) + penalty(padding, number), both)
    assert agrees(penalty(causal, number) + penalty(padding, 3 * number), both)
    assert agrees(penalty(causal, number) + 7.0, causal)
    per_head = causal & torch.tensor([True, False, True])[:, None, None]
    assert agrees(penalty(per_head, number), per_head)
    assert agrees(torch.full((1, 1, 1, 4), number), torch.tensor(number <= -1e3))


@pytest.mark.parametrize("number", [number for number in NUMBERS if number < -50])
def test_penalties_below_a_learned_bias_hide(number):
    causal, padding = future(12, 12), behind(9, 12).expand(2, 1, 1, 12)
    for seed in range(5):
        own = bias(seed=seed)
        assert agrees(own + penalty(causal, number), causal)
        assert agrees(own + penalty(causal, number) + penalty(padding, number), causal | padding)
        assert agrees(own + penalty(causal, number) + penalty(padding, -1e4), causal | padding)
        assert agrees(own[:, :1] + penalty(causal, number), causal)


def test_shifted_windows_hide_below_a_wide_bias():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(169, (49, 49), generator=generator)
    for std in (1.0, 5.0, 8.0):
        own = std * torch.randn(4, 169, generator=generator)[:, index][None]
        shifted = torch.rand(4, 1, 49, 49, generator=generator) < 0.4
        shifted[0] = False
        assert agrees(own + penalty(shifted, -100.0), shifted)
        # Swin v2 adds its mask twice
        assert agrees(own + penalty(shifted, -200.0), shifted)


@pytest.mark.parametrize("heads", [1, 2, 8, 12])
def test_alibi_at_32k_tokens_hides_nothing(heads):
    length = 32768
    nothing = torch.tensor(False)
    whole = alibi(max(heads, 2), 2, length)[:, :heads]
    assert agrees(whole, nothing)
    by_key = (whole[:, :, :1].flip(-1) + whole.abs().amax()).contiguous()
    assert agrees(by_key, nothing)
    hidden = future(2, length)
    assert agrees(whole.masked_fill(hidden, torch.finfo(torch.float32).min), hidden)
    assert agrees(whole + penalty(hidden, -1e9), hidden)
    if heads == 1:
        return
    assert agrees(whole + penalty(hidden, -1e4), hidden)
    # a cache that keeps the first tokens and the last: a gap, and no penalty
    for kept in (18, 2768):
        keys = torch.cat([torch.arange(4), torch.arange(length - kept, length)])
        sparse = alibi(heads, 2, length, keys)
        assert agrees(sparse, nothing)
        padding = behind(kept, kept + 4)
        assert agrees(sparse + penalty(padding, -65504.0), padding)


def test_learned_biases_hide_nothing():
    nothing = torch.tensor(False)
    for seed in range(20):
        for heads in (2, 3, 12):
            for std in (1.0, 5.0, 10.0):
                own = bias(heads, 24, std, seed)
                assert agrees(own, nothing)
                own[:, seed % heads, :, 3] = -80.0
                assert agrees(own, nothing)
                assert agrees(own[:, :, -1:], nothing)


def test_nan_and_infinity_are_no_penalties():
    hidden = future(6, 6)
    mask = penalty(hidden, -1e4)
    mask[0, 0, 3, 0], mask[0, 0, 4, 1] = float("nan"), float("inf")
    assert agrees(mask, hidden)


def big(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    return model.eval()


def llama():
    return big(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))


def tokens():
    return torch.arange(3, 13)[None]


@torch.no_grad()
def logits(model, mask):
    return model(tokens(), attention_mask=mask).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_penalty_of_a_caller_is_a_hidden_key(variant):
    model, hidden = llama(), future(10, 10)
    hidden[..., :4] = False
    # beside it a row that sees nothing, and that nothing sees
    hidden[..., 2, :] = hidden[..., 2] = True
    eager = {number: logits(model, penalty(hidden, number)) for number in NUMBERS}
    patch(model, variant)
    expected = logits(model, ~hidden)
    for number in NUMBERS:
        got = logits(model, penalty(hidden, number))
        if variant == "softmax":
            # its scores are lost in the rounding of low numbers
            rows = [row for row in range(10) if row != 2 or number >= -1e3]
            torch.testing.assert_close(got[:, rows], eager[number][:, rows], atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_user_decides_and_the_record_keeps_it(tmp_path):
    model, mask = llama(), penalty(future(10, 10), -300.0)
    patch(model, "relu")
    hidden = logits(model, mask)
    row = attnvariants.hf.patches_of(model)[0].report.rows[0]
    assert row.penalties == (-300.0,)
    assert "hides keys at -300 in its mask" in str(attnvariants.hf.patches_of(model)[0].report)
    unpatch(model)
    for rule, same in (("added", False), (-301.0, False), (-300, True), ("auto", True)):
        handle = patch(model, "relu", penalties=rule)
        assert not handle.report.rows[0].penalties
        got = logits(model, mask)
        assert torch.allclose(got, hidden, atol=1e-5) == same, rule
        entry = model.config.attn_variants["patches"][0]
        assert entry.get("penalties", "auto") == rule
        attnvariants.save_pretrained(model, tmp_path)
        unpatch(model)
        again = attnvariants.from_pretrained(transformers.LlamaForCausalLM, tmp_path)
        torch.testing.assert_close(logits(again, mask), got)
        assert again.model.layers[0].self_attn.attn_variant.penalties == rule
    for rule in ("hide", 0.0, 3, True, None, float("nan"), -float("inf")):
        with pytest.raises(ValueError, match="penalties must be 'auto', 'added' or the negative"):
            patch(model, "relu", penalties=rule)


def test_a_mask_is_looked_into_once_for_all_layers(monkeypatch):
    model, mask = llama(), penalty(future(10, 10), -1e4)
    looked = []
    rule = penalties.hidden_in
    monkeypatch.setattr(penalties, "hidden_in", lambda mask: (looked.append(1), rule(mask))[1])
    patch(model, "softpick")
    first = logits(model, mask)
    assert len(looked) == 1
    mask[..., :3] = -1e4
    assert not torch.allclose(logits(model, mask), first)
    assert len(looked) == 2


def test_a_penalised_position_bias_with_a_gradient():
    mask = (bias() + penalty(future(12, 12), -100.0)).requires_grad_()
    parts = penalties.split(mask)
    assert torch.equal(parts.keep, ~future(12, 12).expand(1, 4, 12, 12))
    parts.bias.sum().backward()
    assert torch.equal(mask.grad != 0, parts.keep)
    # nothing is held that holds the mask or its graph
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for r in
                   penalties._read[mask][1].values() for v in r)  # fmt: skip


@pytest.mark.parametrize("learned", [False, True])
def test_where_values_cannot_be_read_the_rule_is_the_same(learned):
    own = bias() + penalty(future(12, 12), -100.0)
    masks = [penalty(future(12, 12), -1e4), own]
    query, key, value = torch.randn(3, 1, 4, 12, 8, generator=torch.Generator().manual_seed(1))

    def call(mask):
        parts = penalties.split(mask)
        return attnvariants.attention(
            query, key, value, "softpick", attn_mask=parts.keep, bias=parts.bias
        )

    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=False)
    for mask in masks:
        mask = mask.clone().requires_grad_(learned)
        torch.testing.assert_close(compiled(mask), call(mask))
    assert penalties.split(own.to("meta")).keep.is_meta


HOOKED = {
    "GPTNeo": {
        **{"hidden_size": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 99},
        **{"attention_types": [[["global"], 2]], "max_position_embeddings": 32},
    },
    "Bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 99},
    "MPNet": SMALL,
}


@pytest.mark.parametrize("name", HOOKED)
def test_penalties_are_hidden_through_the_softmax_hook(name):
    config = getattr(transformers, f"{name}Config")(**HOOKED[name], attn_implementation="eager")
    model = big(getattr(transformers, f"{name}Model")(config))
    variant = "sparsemax" if name == "Bloom" else "softpick"
    handle = patch(model, variant, backend="softmax-hook")

    def last(number):
        def penalised(module, args, kwargs):
            given = signature(type(module).forward).bind(module, *args, **kwargs).arguments
            del given["self"]
            # GPT Neo hides the future by itself
            hidden = future(10, 10) | (torch.arange(10) == 1)
            return (), {**given, "attention_mask": penalty(hidden, number)}

        module = model.get_submodule(handle.names[0])
        hook = module.register_forward_pre_hook(penalised, with_kwargs=True)
        with torch.no_grad():
            found = model(tokens()).last_hidden_state
        hook.remove()
        return found

    lowest = last(torch.finfo(torch.float32).min)
    assert not handle.report.rows[0].penalties
    for number in (-100.0, -1e4):
        torch.testing.assert_close(last(number), lowest, atol=1e-5, rtol=1e-5)
    assert handle.report.rows[0].penalties == (-100.0, -1e4)
    unpatch(model)
    if name != "Bloom":
        # sparsemax has no weight for what is so low
        with patch(model, variant, backend="softmax-hook", penalties="added"):
            assert not torch.allclose(last(-100.0), lowest, atol=1e-3)


def test_a_check_takes_the_rule_too():
    check = pytest.importorskip("attnvariants.hf").check
    result = check(llama(), "softpick", penalties=-1e4)
    assert result.passed, result
    with pytest.raises(ValueError, match="penalties must be"):
        check(llama(), "softpick", penalties="no")


def test_a_state_of_fixed_size_takes_penalties_for_padding():
    from attnvariants.hf import masks
    from attnvariants.hf.names import with_cache

    if not masks._has_lazy():
        pytest.skip("needs transformers >= 5.5")
    model = llama()
    patch(model, "cosformer")
    mask = penalty(future(10, 10) | (torch.arange(10) < 3), -1e4)
    keep = mask == 0
    found = []
    for given in (mask, keep):
        with torch.no_grad():
            cache = attnvariants.hf.RecurrentCache(model)
            found.append(model(tokens(), attention_mask=given, **with_cache(model, cache)).logits)
    torch.testing.assert_close(found[0][:, 3:], found[1][:, 3:])
