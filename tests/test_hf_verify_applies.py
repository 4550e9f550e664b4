"""A test that ought to apply is never silently left out, and blame falls where it belongs."""

import inspect

import pytest
import torch
from tiny import SMALL

from attnvariants import patch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from attnvariants.hf import masks, names  # noqa: E402
from attnvariants.hf.judge import NOT_SO, Judge  # noqa: E402
from attnvariants.hf.measure import Part  # noqa: E402
from attnvariants.hf.reasons import InapplicableError, UnavailableError  # noqa: E402

PLAIN = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}


def make(name="Llama", suffix="ForCausalLM", **more):
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**{**SMALL, **more})
    return getattr(transformers, name + suffix)(config)


def encoder_decoder(cls="BartForConditionalGeneration"):
    sizes = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}
    both = {f"{part}_{name}": sizes[name] for part in ("encoder", "decoder") for name in sizes}
    torch.manual_seed(0)
    config = transformers.BartConfig(vocab_size=99, d_model=32, max_position_embeddings=64, **both)
    return getattr(transformers, cls)(config)


def cache_name(cls):
    return names.cache_argument(inspect.signature(cls.forward).parameters)


def renaming(cls, monkeypatch, returned=False):
    """The class, whose cache has a name that nothing knows, or is returned under one."""
    own, name = cls.forward, cache_name(cls)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, kv_memory=None, use_cache=None
    ):
        given = {name: kv_memory, "use_cache": use_cache, "position_ids": position_ids}
        return own(self, input_ids, attention_mask, **given)

    def keeping(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        return transformers.utils.ModelOutput(logits=result.logits, kv_memory=[1])

    def keeps(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        return {"logits": result.logits, "kv_memory": result}

    monkeypatch.setattr(cls, "forward", forward)
    if returned:
        keeps.__signature__ = inspect.signature(own)
        monkeypatch.setattr(cls, "forward", keeps)


@pytest.mark.parametrize("strict", [True, False])
def test_a_cache_argument_of_an_unknown_name_fails(monkeypatch, strict):
    from attnvariants.hf.architectures import check

    model = make()
    renaming(type(model), monkeypatch)
    if strict:
        with pytest.raises(ValueError, match=r"has a cache .* none of the arguments .* kv_memory"):
            patch(model, "softpick").verify()
    else:
        found = {entry.name: entry for entry in check.check(model, "softpick").checks}
        assert found["cache"].passed is False
        assert "kv_memory" in found["cache"].note


def test_a_cache_that_comes_back_under_an_unknown_name_fails(monkeypatch):
    model = make()
    renaming(type(model), monkeypatch, returned=True)
    with pytest.raises(ValueError, match=r"asked for a cache .* returned none .* kv_memory"):
        patch(model, "softpick").verify()


@pytest.mark.parametrize("kept", [False, True])
def test_a_part_that_returns_no_cache_says_so_and_one_under_another_name_fails(kept, monkeypatch):
    model = make(suffix="Model")
    own = type(model).forward

    def forward(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        fields = {"last_hidden_state": result.last_hidden_state}
        if kept:
            fields["kv_memory"] = names.cache_of(result)
        return transformers.utils.ModelOutput(**fields)

    forward.__signature__ = inspect.signature(own)
    monkeypatch.setattr(type(model), "forward", forward)
    handle = patch(model, "softpick")
    if kept:
        with pytest.raises(ValueError, match=r"asked for a cache .* kv_memory"):
            handle.verify()
    else:
        assert "returns no cache when it is asked for one" in handle.verify().notes["cache"]


def test_an_unpatched_model_that_fails_with_a_cache_fails(monkeypatch):
    model = make()
    own, name = type(model).forward, cache_name(type(model))

    def forward(self, *args, **kwargs):
        if kwargs.get(name) is not None:
            raise KeyError("lost")
        return own(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(own)
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match=r"handed over as \w+=, raises KeyError: 'lost'"):
        patch(model, "softpick").verify()


@pytest.mark.parametrize("suffix", ["Model", "ForCausalLM"])
def test_a_part_that_raises_when_asked_for_a_cache_says_so_and_a_generator_fails(
    suffix, monkeypatch
):
    model = make(suffix=suffix)
    own = type(model).forward

    def forward(self, *args, **kwargs):
        if kwargs.get("use_cache"):
            raise KeyError("none here")
        return own(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(own)
    monkeypatch.setattr(type(model), "forward", forward)
    handle = patch(model, "softpick")
    if suffix == "Model":
        assert "KeyError: 'none here'" in handle.verify().notes["cache"]
    else:
        with pytest.raises(ValueError, match="KeyError: 'none here'"):
            handle.verify()


def test_a_forward_that_hands_everything_on_is_seen_through():
    class Wrapped(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    result = patch(Wrapped(transformers.LlamaConfig(**SMALL)), "softpick").verify()
    for figure in ("leak", "padding", "right_padding", "hidden", "cache", "packed"):
        assert getattr(result, figure) is not None, str(result)


def test_what_does_not_apply_names_the_property():
    encoder = patch(transformers.BertModel(transformers.BertConfig(**PLAIN)), "softpick").verify()
    assert encoder.cache is None
    assert "is an encoder: config.is_decoder is False" in encoder.notes["cache"]
    assert "unpatched model is not causal" in encoder.notes["leak"]
    assert "unpatched model mixes documents itself" in encoder.notes["packed"]
    assert encoder.right_padding <= 1e-4
    headed = transformers.BertLMHeadModel(transformers.BertConfig(**PLAIN))
    assert "config.is_decoder is False" in patch(headed, "softpick").verify().notes["cache"]
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**PLAIN, is_decoder=True))
    assert patch(decoder, "softpick").verify().cache <= 1e-4
    both = patch(encoder_decoder(), "softpick").verify()
    assert both.cache <= 1e-4
    assert "config.is_encoder_decoder is True" in both.notes["packed"]
    placeless = patch(
        transformers.OPTForCausalLM(
            transformers.OPTConfig(vocab_size=99, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                                   num_attention_heads=4, max_position_embeddings=64,
                                   word_embed_proj_dim=32)
        ),
        "softpick",
    )  # fmt: skip
    takes = "position_ids" in inspect.signature(transformers.OPTForCausalLM.forward).parameters
    packed = placeless.verify()
    assert takes or packed.notes["packed"] == "its forward takes no position_ids"


def test_a_forward_without_a_mask_or_positions_says_so(monkeypatch):
    model = make()
    own = type(model).forward
    name = cache_name(type(model))

    def bare(self, input_ids=None, use_cache=None, **more):
        return own(self, input_ids, use_cache=use_cache, **more)

    kept = [
        inspect.Parameter(word, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        for word in ("self", "input_ids", "use_cache", name)
    ]
    bare.__signature__ = inspect.Signature(kept)
    monkeypatch.setattr(type(model), "forward", bare)
    result = patch(model, "softpick").verify()
    assert result.notes["padding"] == "its forward takes no attention_mask"
    assert result.notes["hidden"] == "its forward takes no attention_mask"
    assert result.notes["packed"] == "its forward takes no position_ids"
    assert result.cache <= 1e-4
    del kept[2:]
    bare.__signature__ = inspect.Signature(kept)
    model.config.use_cache = False
    cacheless = patch(model, "softpick").verify()
    assert cacheless.notes["cache"].startswith("its forward takes neither use_cache nor a cache")
    model.config.use_cache = True
    with pytest.raises(ValueError, match="has a cache"):
        patch(model, "softpick").verify()


def test_an_output_that_is_not_one_for_each_token_says_so(monkeypatch):
    model = make("Bert", "Model")
    own = type(model).forward

    def pooled(self, *args, **kwargs):
        return own(self, *args, **kwargs).pooler_output

    pooled.__signature__ = inspect.signature(own)
    monkeypatch.setattr(type(model), "forward", pooled)
    result = patch(model, "softpick").verify()
    assert "not one for each of 18 tokens" in result.notes["leak"]


def test_random_outputs_are_said_to_be(monkeypatch):
    model = make()
    own = type(model).forward
    count = iter(range(100))

    def random(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        result.logits = result.logits + next(count)
        return result

    random.__signature__ = inspect.signature(own)
    monkeypatch.setattr(type(model), "forward", random)
    result = patch(model, "softpick").verify()
    for figure in ("identity", "leak", "padding", "cache"):
        assert getattr(result, figure) is None
        assert "outputs are random" in result.notes[figure]


def spoiling(model, monkeypatch, spoil):
    own = type(model).forward

    def forward(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        spoil(result, mask)
        return result

    forward.__signature__ = inspect.signature(own)
    monkeypatch.setattr(type(model), "forward", forward)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_model_that_is_not_finite_by_itself_is_said_to_be(value, word):
    model = make()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = value
    with pytest.raises(ValueError, match=r"the unpatched LlamaForCausalLM itself gives .* logits"):
        patch(model, "softpick").verify()
    with pytest.raises(ValueError, match="the unpatched"):
        patch(model, "softpick").verify({"input_ids": torch.arange(3, 11)[None]})


def test_nan_in_padded_rows_alone_is_said_to_be(monkeypatch):
    model = make()

    def spoil(result, mask):
        if mask is not None and not bool(mask[:, 0].all()):
            result.logits[1] = float("nan")

    spoiling(model, monkeypatch, spoil)
    result = patch(model, "softpick").verify()
    assert result.padding is None
    assert "with left-padded rows the unpatched model itself gives NaN" in result.notes["padding"]
    assert result.leak == 0.0
    assert result.right_padding <= 1e-4
    assert result.cache <= 1e-4


def test_nan_in_one_of_several_outputs_is_said_to_be():
    model = make("Bert", "Model")
    with torch.no_grad():
        model.pooler.dense.bias[0] = float("nan")
    result = patch(model, "softpick").verify()
    assert "unpatched model itself gives NaN in pooler_output" in result.notes["identity"]
    assert result.padding <= 1e-4


def gemma3():
    text = {**SMALL, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    vision = {
        **{k: v for k, v in PLAIN.items() if k[:5] not in ("vocab", "max_p")},
        "image_size": 16,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "patch_size": 4}, mm_tokens_per_image=4,
        image_token_id=90,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def with_images(*starts, length=16):
    tokens = torch.randint(3, 80, (2, length), generator=torch.Generator().manual_seed(0))
    for start in starts:
        tokens[:, start : start + 4] = 90
    images = torch.randn(2 * len(starts), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": images,
        "token_type_ids": (tokens == 90).long(),
    }


def test_inputs_with_images_are_used_whole():
    handle = patch(gemma3(), "softpick")
    result = handle.verify(with_images(3, 8))
    assert result.leak == 0.0
    for figure in ("padding", "right_padding", "cache"):
        assert getattr(result, figure) <= 1e-4, str(result)
    assert result.hidden == 0.0
    assert result.notes["packed"] == (
        "its inputs hold pixel_values, token_type_ids, which belong to no document"
    )
    last = handle.verify(with_images(3, 12))
    assert "stands for more than text" in last.notes["cache"]
    assert "end with tokens of input_ids" in last.notes["right_padding"]
    assert last.padding <= 1e-4
    first = handle.verify(with_images(0, 8))
    assert "begin with tokens of input_ids" in first.notes["padding"]
    assert first.leak == 0.0


def test_a_wrong_mask_is_found_on_inputs_with_images(monkeypatch):
    model = gemma3()
    handle = patch(model, "softpick")
    registry = names.registered_masks()
    for key in masks.KEYS:
        monkeypatch.setitem(registry, key, lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="tokens that the padding mask hides change outputs"):
        handle.verify(with_images(3, 8))


def test_padding_that_was_given_is_tested():
    handle = patch(make(), "softpick")
    tokens = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    result = handle.verify({"input_ids": tokens, "attention_mask": mask})
    assert "the given padding" in result.notes["padding"]
    assert result.padding <= 1e-4
    assert result.hidden == 0.0
    square = {"input_ids": tokens, "attention_mask": torch.ones(2, 1, 12, 12).tril().bool()}
    assert "[2, 1, 12, 12] and not [batch, tokens]" in handle.verify(square).notes["padding"]


def test_labels_are_cut_with_their_tokens():
    tokens = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    result = patch(make(), "softpick").verify({"input_ids": tokens, "labels": tokens.clone()})
    assert result.leak == result.hidden == 0.0
    assert max(result.padding, result.right_padding, result.cache, result.identity) <= 1e-4
    assert "labels" in result.notes["packed"]


def test_embeddings_are_tested_as_tokens_are():
    handle = patch(make(), "softpick")
    embeddings = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    result = handle.verify({"inputs_embeds": embeddings})
    assert result.leak == result.hidden == 0.0
    assert max(result.padding, result.right_padding, result.cache) <= 1e-4
    assert result.notes["packed"] == "its inputs are inputs_embeds, not input_ids"


def spoil_masks(monkeypatch, change):
    """Every mask function of the patcher gives what `change` makes of the right mask."""
    registry = names.registered_masks()

    def spoiled(right):
        def function(*args, **kwargs):
            mask = right(*args, **kwargs)
            keep = mask.tensor("bool") if hasattr(mask, "tensor") else mask
            return change(keep if keep.dtype == torch.bool else keep == 0)

        return function

    for key in masks.KEYS:
        monkeypatch.setitem(registry, key, spoiled(registry[key]))


def test_padding_on_the_right_that_is_lost_fails(monkeypatch):
    handle = patch(make("Bert", "Model"), "softpick")
    spoil_masks(monkeypatch, lambda keep: keep | ~keep[..., -1:])
    with pytest.raises(ValueError, match="right-padded row differs"):
        handle.verify()


def test_a_wrong_mask_with_an_encoder_decoder_cache_fails(monkeypatch):
    handle = patch(encoder_decoder(), "softpick")

    def aligned_to_the_start(keep):
        fewer = keep.shape[-2] in (1, 9) and keep.shape[-1] == 18
        return torch.ones_like(keep).tril() if fewer else keep

    spoil_masks(monkeypatch, aligned_to_the_start)
    with pytest.raises(ValueError, match="outputs with a cache differ"):
        handle.verify()


def judged(test, own, got, precisely, **settings):
    part = Part(test, "something", lambda runs: 0.0)
    judge = Judge(1e-4, precisely=precisely, **{"half": False, "shared": False, **settings})
    return judge.judge(test, [(0, part, own, got)])


def unavailable(place):
    raise UnavailableError("it has no float64")


def test_rounding_is_told_from_a_leak():
    figure, note = judged("leak", 0.0, 2.6e-6, lambda place: (0.0, 1e-15))
    assert figure == 1e-15
    assert "in float64" in note
    with pytest.raises(ValueError, match=r"future token changes outputs before it by 2\.6e-06"):
        judged("leak", 0.0, 2.6e-6, lambda place: (0.0, 2.6e-6))
    with pytest.raises(ValueError, match="cannot be told from rounding in float64: it has no"):
        judged("leak", 0.0, 2.6e-6, unavailable)
    figure, note = judged("leak", 0.0, 2.6e-6, unavailable, shared=True)
    assert figure == 2.6e-6
    assert "at a tolerance of 0.0001" in note
    with pytest.raises(ValueError, match="future token"):
        judged("leak", 0.0, 2.6e-3, unavailable, shared=True)
    with pytest.raises(ValueError, match="future token"):
        judged("leak", 0.0, float("nan"), unavailable)
    figure, _ = judged("cache", 0.09, 0.2, lambda place: (1e-12, 1e-12), half=True)
    assert figure == 1e-12
    with pytest.raises(ValueError, match=r"outputs with a cache differ by 0\.2 "):
        judged("cache", 2e-4, 0.2, lambda place: (1e-12, 0.2))


def test_a_patched_run_that_raises_is_a_failure_with_its_text():
    with pytest.raises(ValueError, match="patched model raises KeyError: 'x', where the unpatched"):
        judged("cache", 1e-7, KeyError("x"), unavailable)
    figure, note = judged("cache", RuntimeError("no such"), None, unavailable)
    assert figure is None
    assert note == "with something the unpatched model raises RuntimeError: no such"
    assert judged("cache", InapplicableError("it has none"), None, unavailable) == (
        None, "it has none"
    )  # fmt: skip
    assert NOT_SO not in note


def test_a_leak_stays_a_leak_in_float64(monkeypatch):
    """A tiny change by a future token, far below any tolerance, is no rounding."""
    model = make()
    handle = patch(model, "softpick")
    own = type(model).forward

    def leaks(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        if self.config._attn_implementation in masks.KEYS:
            ids = kwargs["input_ids"].to(result.logits.dtype)
            result.logits = result.logits + 1e-7 * ids.sum(-1)[:, None, None]
        return result

    leaks.__signature__ = inspect.signature(own)
    monkeypatch.setattr(type(model), "forward", leaks)
    with pytest.raises(ValueError, match="future token changes"):
        handle.verify()


def test_rounding_of_t5_with_softpick_is_no_leak():
    from attnvariants.hf.architectures import tiny

    config = tiny.tiny_config(transformers.T5Config)
    model = tiny.tiny_model(config, transformers.T5ForConditionalGeneration)
    result = patch(model, "softpick").verify()
    assert result.leak <= 1e-9
    assert result.hidden <= 1e-9
    assert result.cache <= 1e-4
