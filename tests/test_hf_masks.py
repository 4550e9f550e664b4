"""Masks of patched models: described instead of built, and exact; sinks and picked keys."""

import pytest
import torch
from tiny import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from attnvariants import patch
from attnvariants.diagnostics import diagnose
from attnvariants.geometry import Geometry

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from attnvariants.hf.dispatch import attention_forward  # noqa: E402
from attnvariants.hf.names import with_cache  # noqa: E402

masks = pytest.importorskip("attnvariants.hf.masks")

LAZY = masks._has_lazy()
needs_lazy = pytest.mark.skipif(not LAZY, reason="needs transformers >= 5.5")
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MORE = {
    "GptOss": {
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 5,
    },
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"head_dim": 8, "sliding_window": 5, "attn_implementation": "eager"},
    "DeepseekV32": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "index_topk": 4,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    "Doge": {"keep_window_size": 8},
}


def make(name, suffix="ForCausalLM", **changes):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = {**SMALL, **IDS, **MORE.get(name, {}), **changes}
    model = getattr(transformers, name + suffix)(getattr(transformers, f"{name}Config")(**config))
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(length=18, batch=2):
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(length=18, pad=6, left=True):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :pad] = 0
    return mask if left else mask.flip(1)


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


class Sizes(TorchDispatchMode):
    """Records operators that give something of tokens x tokens."""

    def __init__(self, length):
        super().__init__()
        self.length, self.seen = length, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                square = tensor.dim() > 1 and min(tensor.shape[-2:]) >= self.length
                whole = tensor.dtype == torch.bool and tensor.numel() >= self.length**2
                if square or whole:
                    self.seen.append((str(func), tuple(tensor.shape)))
        return result


@needs_lazy
@pytest.mark.parametrize("case", ["plain", "left", "right", "packed", "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "ModernBert"])
def test_nothing_of_tokens_by_tokens_is_built(name, case):
    length = 512
    if name == "ModernBert":
        if case in ("packed", "static"):
            pytest.skip("an encoder")
        model = make(name, "ForMaskedLM", max_position_embeddings=length, local_attention=64)
    else:
        model = make(name, max_position_embeddings=2 * length)
    inputs = {"input_ids": tokens(length)}
    if case in ("left", "right", "static"):
        inputs["attention_mask"] = padded(length, 100, case != "right")
    if case == "packed":
        positions = torch.cat([torch.arange(200), torch.arange(length - 200)])
        inputs |= {"position_ids": positions[None].expand(2, -1), "use_cache": False}

    def forward():
        if case == "static":
            cache = transformers.StaticCache(model.config, max_cache_len=length + 100)
            return run(model, **inputs, **with_cache(model, cache))
        return run(model, **inputs)

    expected = forward()
    with patch(model, "softmax", impl="chunked"), Sizes(length) as sizes:
        got = forward()
    assert not sizes.seen
    seen = inputs.get("attention_mask", torch.ones(2, length)).bool()
    torch.testing.assert_close(got[seen], expected[seen], atol=1e-4, rtol=1e-4)
    with patch(model, "softmax", impl="chunked", masks="bool"), Sizes(length) as sizes:
        torch.testing.assert_close(forward()[seen], got[seen], atol=1e-4, rtol=1e-4)
    assert sizes.seen


def requests():
    from transformers import masking_utils as made

    window, sides = made.sliding_window_causal_mask_function(3), None
    if hasattr(made, "sliding_window_bidirectional_mask_function"):
        sides = made.sliding_window_bidirectional_mask_function(2)
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 6, 7, 8, 9]])
    causal, free = made.causal_mask_function, made.bidirectional_mask_function
    yield "causal", causal, {}
    yield "prefill", causal, {"kv_length": 9}
    yield "chunk", causal, {"kv_length": 9, "q_offset": 2}
    yield "static", causal, {"kv_length": 9, "q_offset": torch.tensor(2)}
    yield "decode", causal, {"q_length": 1, "kv_length": 5, "q_offset": 4}
    yield "window", window, {}
    yield "window, cached", window, {"kv_length": 8, "q_offset": 9, "kv_offset": 7}
    yield "window, prefill", window, {"kv_length": 9}
    yield "free", free, {"allow_is_causal_skip": False}
    yield "cross", free, {"kv_length": 4, "allow_is_causal_skip": False}
    if sides is not None:
        yield "both sides", sides, {"allow_is_causal_skip": False}
    for name, inside in (("documents", causal), ("documents, window", window)):
        if hasattr(made, "packed_sequence_compatibility_function"):
            yield name, made.packed_sequence_compatibility_function(inside, positions, ids), {}
        else:
            yield name, made.and_masks(inside, made.packed_sequence_mask_function(ids)), {}


@needs_lazy
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", [name for name, *_ in requests()] if LAZY else [])
def test_what_a_mask_says_is_what_it_holds(name, pad):
    from attnvariants.hf.lazy import LazyMask, build_tensor, describe

    function, more = next((f, m) for n, f, m in requests() if n == name)
    asked = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": function, **more}
    if pad:
        end = asked["kv_length"] + asked.get("kv_offset", 0)
        asked["attention_mask"] = torch.ones(2, end, dtype=torch.bool)
        asked["attention_mask"][1, : end - 4] = False
    mask = describe("bool", **asked)
    assert isinstance(mask, LazyMask)
    assert mask.shape == mask.tensor().shape
    view = mask.view(mask.q_len, mask.kv_len)
    if pad and "documents" in name:
        assert view is None
        return
    left, right = view.window or (-1, 0 if view.causal else -1)
    sides = [None if side < 0 else side for side in (left, 0 if view.causal else right)]
    offset = view.keys - mask.q_len
    geometry = Geometry(mask.q_len, view.keys, offset, *sides)
    seen = geometry.keep(slice(0, mask.q_len), slice(0, view.keys), torch.device("cpu"))
    seen = seen[None, None].expand(2, 1, -1, -1)
    if view.keep is not None:
        seen = seen & view.keep
    if view.documents is not None:
        owner = torch.bucketize(torch.arange(12), view.documents[0][1:].long(), right=True)
        owner = owner.view(2, 1, 6)
        seen = seen & (owner.unsqueeze(-1) == owner.unsqueeze(-2))
    whole = torch.zeros(mask.shape, dtype=torch.bool)
    whole[..., : view.keys] = seen
    assert torch.equal(whole, build_tensor(mask.request, "bool"))


@needs_lazy
def test_masks_that_are_not_understood_are_built():
    from transformers import masking_utils as made

    from attnvariants.hf.lazy import describe

    def odd(batch, head, q, kv):
        return (q + kv) % 2 == 0

    base = {"batch_size": 1, "q_length": 6, "kv_length": 6}
    causal = made.causal_mask_function
    chunked = made.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64))
    functions = [odd, made.or_masks(causal, odd), chunked]
    if hasattr(made, "packed_sequence_compatibility_function"):
        jumps = torch.tensor([[0, 2, 4, 0, 1, 2]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
        functions.append(made.packed_sequence_compatibility_function(causal, *jumps))
    for function in functions:
        mask = describe("bool", **base, mask_function=function)
        assert type(mask) is torch.Tensor
        whole = made.sdpa_mask(**base, mask_function=function, allow_is_causal_skip=False)
        assert torch.equal(mask, whole)
    step = describe("bool", 1, 1, 6, torch.tensor(3))
    assert step.tolist() == [[[[True] * 4 + [False] * 2]]]


@needs_lazy
@pytest.mark.parametrize("form", ["bool", "float"])
def test_reading_a_mask_gives_its_tensor(form):
    from attnvariants.hf.lazy import describe

    mask = describe(form, 2, 4, 4)
    whole = torch.ones(4, 4).tril().bool().expand(2, 1, 4, 4)
    if form == "float":
        whole = torch.zeros(2, 1, 4, 4).masked_fill(~whole, torch.finfo(torch.float32).min)
    assert torch.equal(mask[:, :, 1:], whole[:, :, 1:])
    assert torch.equal(torch.cat([mask, mask], 1), torch.cat([whole, whole], 1))
    assert torch.equal(mask.repeat(1, 2, 1, 1), whole.repeat(1, 2, 1, 1))
    assert torch.equal(mask == 0, whole == 0)
    assert torch.equal(torch.ones(4, 4) * mask, torch.ones(4, 4) * whole)
    assert (mask.dtype, mask.dim(), len(mask), mask.size(-1)) == (whole.dtype, 4, 2, 4)
    assert mask.contiguous() is mask
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert moved.device == moved.tensor().device == torch.device("meta")
    assert moved is mask.to(device="meta")
    assert mask.to(torch.float64).dtype == torch.float64
    if form == "bool":
        assert torch.equal(~mask & mask, torch.zeros_like(whole))


def test_a_static_cache_moves_on_and_its_mask_does_not():
    if not LAZY:
        pytest.skip("needs transformers >= 5.5")
    from attnvariants.hf.lazy import describe

    offset = torch.tensor(2)
    mask = describe("bool", 1, 3, 9, offset)
    offset += 3
    assert mask.view(3, 9).keys == 5
    assert int(mask.tensor().sum()) == 3 + 4 + 5


@pytest.mark.parametrize("mode", ["lazy", "bool"] if LAZY else ["bool"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "Doge", "DeepseekV32"])
def test_padding_in_both_modes(name, left, mode):
    if name in ("GptOss", "DeepseekV32") and not LAZY:
        pytest.skip("newer models")
    model = make(name, attn_implementation="eager")
    inputs = {"input_ids": tokens(), "attention_mask": padded(left=left)}
    seen = inputs["attention_mask"].bool()
    expected, plain = run(model, **inputs), run(model, input_ids=tokens())
    with patch(model, "softmax", masks=mode):
        torch.testing.assert_close(run(model, **inputs)[seen], expected[seen], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(run(model, input_ids=tokens()), plain, atol=2e-5, rtol=1e-4)
    assert torch.equal(run(model, **inputs), expected)


@pytest.mark.parametrize("previous", ["eager", "sdpa"])
def test_integer_masks_mean_the_same_to_patched_and_other_layers(previous):
    model = make("Llama", attn_implementation=previous)
    generator = torch.Generator().manual_seed(2)
    keep = torch.eye(18, dtype=torch.bool) | (torch.rand(2, 1, 18, 18, generator=generator) > 0.4)
    floats = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    expected = run(model, input_ids=tokens(), attention_mask=floats)
    patch(model, "softmax", layers=[0])
    for mask in (keep, keep.long()):
        got = run(model, input_ids=tokens(), attention_mask=mask)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_rows_that_see_nothing_give_0_and_finite_gradients():
    model = make("Llama").train()
    handle = patch(model, "softpick")
    found = []
    module = model.model.layers[0].self_attn
    module.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(input_ids=tokens(), attention_mask=padded()).logits.sum().backward()
    assert not found[0][1, :6].any()
    assert found[0][1, 6:].any()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert handle.active


@needs_lazy
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("said_by", ["position_ids", "cu_seq_lens", "both"])
def test_packed_documents(name, said_by):
    model = make(name)
    parts = torch.split(tokens(18, 1), [7, 1, 10], 1)
    inputs = {"input_ids": torch.cat(parts, 1), "use_cache": False}
    if said_by != "cu_seq_lens":
        positions = torch.cat([torch.arange(part.shape[1]) for part in parts])
        inputs["position_ids"] = positions[None]
    if said_by != "position_ids":
        bounds = torch.tensor([0, 7, 8, 18], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    with patch(model, "softmax"):
        # a rotary position that counts on is as good as one that starts anew
        got = run(model, **inputs)
        weights = model(**inputs, output_attentions=True)
    expected = torch.cat([run(model, input_ids=part) for part in parts], 1)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(weights.logits, expected, atol=2e-5, rtol=1e-4)
    assert not weights.attentions[0][0, :, 8:, :8].any()


@needs_lazy
def test_packed_outputs_can_be_viewed_as_eager_attention_s():
    model = make("Llama")
    patch(model, "softpick")
    module = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    out, _ = attention_forward(module, query, key, key, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    assert out.view(1, 6, -1).shape == (1, 6, 32)


def test_masks_argument():
    model = make("Llama")
    for value in ("fast", True):
        with pytest.raises(ValueError, match="masks must be 'lazy' or 'bool'"):
            patch(model, "softmax", masks=value)
    with patch(model, "softmax", masks="bool", layers=[0]):
        assert model.config._attn_implementation == masks.BOOL
        assert [e["masks"] for e in model.config.attn_variants["patches"]] == ["bool"]
        if LAZY:
            with pytest.raises(ValueError, match="other masks than masks='lazy'"):
                patch(model, "softmax", masks="lazy", layers=[1])
    if LAZY:
        with patch(model, "softmax"):
            assert model.config._attn_implementation == masks.LAZY
            assert "masks" not in model.config.attn_variants["patches"][0]
        return
    with pytest.raises(ValueError, match=r"needs transformers >= 5\.5, this is"):
        patch(model, "softmax", masks="lazy")


@pytest.mark.parametrize("name", ["Doge", "Gemma2"])
def test_models_that_tell_masks_apart_get_tensors(name):
    model = make(name, attn_implementation="eager")
    with patch(model, "softmax"):
        key = model.config._attn_implementation
    assert key == (masks.FLOAT if name == "Doge" or not LAZY else masks.LAZY_FLOAT)


def test_attention_sinks_with_gradients():
    model = make("GptOss", attn_implementation="eager")
    inputs = {"input_ids": tokens(), "attention_mask": padded()}
    weight = torch.randn(2, 18, 99) * inputs["attention_mask"][..., None]

    def gradients():
        model.zero_grad()
        (model(**inputs).logits * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    assert any(name.endswith("sinks") for name in expected)
    for impl in ("auto", "chunked"):
        with patch(model, "softmax", impl=impl):
            found = gradients()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [None, (2, 0)])
def test_sinks_are_no_key(biased, window):
    from attnvariants.hf.sinks import attention_with_sinks

    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), *torch.randn(2, 2, 2, 7, 8).double()
    query = query.double().requires_grad_()
    key.requires_grad_()
    sinks = torch.randn(4).double().requires_grad_()
    bias = torch.randn(1, 4, 5, 7).double().requires_grad_() if biased else None
    variant, options = ("softmax", {}) if biased else ("ssmax", {"s": 0.4, "b": 0.3})
    call = {"causal": True, "window_size": window, "bias": bias, "scale": 0.7}
    run = {"dropout_p": 0.0, "impl": "auto", "return_weights": True}
    out, weights = attention_with_sinks(
        query, key, value, sinks, variant=variant, **call, **run, **options
    )
    keep = Geometry(5, 7, 2, None if window is None else 2, 0)
    keep = keep.keep(slice(0, 5), slice(0, 7), torch.device("cpu"))
    scores = 0.7 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    if variant == "ssmax":
        scores = scores * (0.4 * keep.sum(-1, keepdim=True).double().log() + 0.3)
    scores = (scores if bias is None else scores + bias).masked_fill(~keep, -torch.inf)
    joined = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1)
    dense = joined.softmax(-1)[..., :-1]
    expected = dense @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, dense)
    leaves = [query, key, sinks, *([bias] if biased else [])]
    for got, wanted in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    for other, message in (("softpick", "mean nothing to softpick"), ("ssmax", "together")):
        if other == "ssmax" and not biased:
            continue
        with pytest.raises(ValueError, match=message):
            attention_with_sinks(query, key, value, sinks, variant=other, **call, **run)


@needs_lazy
@pytest.mark.parametrize("layers", [None, [0]])
def test_picked_keys(layers):
    model = make("DeepseekV32", attn_implementation="eager")
    expected = run(model, input_ids=tokens())
    with patch(model, "softmax", layers=layers):
        torch.testing.assert_close(run(model, input_ids=tokens()), expected, atol=2e-5, rtol=1e-4)
    free = make("DeepseekV32", attn_implementation="eager", index_topk=18)
    free.load_state_dict(model.state_dict())
    # the model picks indeed
    assert not torch.allclose(run(free, input_ids=tokens()), expected, atol=1e-2)


def test_attention_by_hand_beside_a_variant():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    sizes |= {"block_size": 4, "attention_type": "block_sparse", "attn_implementation": "eager"}
    model = make("BigBirdPegasus", "ForConditionalGeneration", **sizes)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(), "attention_mask": padded()}
    expected = run(model, **inputs)
    with pytest.raises(ValueError, match="computes attention itself"):
        patch(model, "softmax")
    with patch(model, "softmax", layers="decoder") as handle:
        assert len(handle.names) == 2
        torch.testing.assert_close(run(model, **inputs), expected, atol=2e-5, rtol=1e-4)


def test_variants_without_a_meaning_for_sinks():
    model = make("GptOss", attn_implementation="eager")
    with pytest.raises(ValueError, match=r"softpick cannot replace .* logits of a softmax"):
        patch(model, "softpick")
    with patch(model, "ssmax", preset="retrofit", train_length=18, verify=True) as handle:
        assert len(handle.names) == 2


@needs_lazy
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_diagnostics_measure_the_same_in_both_modes(name):
    figures = []
    for mode in ("lazy", "bool"):
        model = make(name)
        patch(model, "softpick", masks=mode)
        report = diagnose(model, tokens(), attention_mask=padded())
        figures.append([layer.metrics for layer in report.layers])
    assert len(figures[0]) == 2
    assert repr(figures[0]) == repr(figures[1])


def test_diagnostics_refuse_sinks():
    model = make("GptOss", attn_implementation="eager")
    with pytest.raises(ValueError, match="cannot be measured: its learned attention sinks"):
        diagnose(model, tokens())
