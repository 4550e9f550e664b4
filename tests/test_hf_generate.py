"""`generate` with patched models: as the model's own, and as the whole sequence at once."""

import copy

import pytest
import torch
from test_hf import GQA, build, sample

from attnvariants import list_variants, patch, unpatch

transformers = pytest.importorskip("transformers")
from attnvariants.hf.names import with_cache  # noqa: E402

transformers.logging.set_verbosity_error()
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
modern = pytest.mark.skipif(VERSION < (5, 5), reason="transformers < 5.5 has another cache API")

WINDOW = {**GQA, "head_dim": 8, "sliding_window": 5}
HYBRID = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MORE = {
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**HYBRID, "query_pre_attn_scalar": 16}),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", HYBRID),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
GREEDY = {
    "max_new_tokens": 7,
    "min_new_tokens": 7,
    "do_sample": False,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}
STATIC = {"cache_implementation": "static", "disable_compile": True}
QUANTIZED = {"nbits": 4, "q_group_size": 16, "residual_length": 4}
MODES = {
    "dynamic": {},
    "static": STATIC,
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static_beams": {"num_beams": 3, **STATIC},
    "sampled": {"do_sample": True},
    "in_parts": {"prefill_chunk_size": 4},
    "static_in_parts": {"prefill_chunk_size": 4, **STATIC},
    "looked_up": {"prompt_lookup_num_tokens": 3},
    "hqq": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", **QUANTIZED}},
    "quanto": {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", **QUANTIZED},
    },
}
RUNS = [
    *(("llama", mode) for mode in ("sampled", "beams", "looked_up", "hqq", "quanto", "in_parts")),
    *(("mistral", mode) for mode in ("static_beams", "static_in_parts", "looked_up")),
    *(("gemma2", mode) for mode in ("in_parts", "static_beams")),
    *(("gemma3", mode) for mode in ("dynamic", "static", "looked_up")),
    *(("cohere2", mode) for mode in ("dynamic", "static_in_parts")),
    *(("gpt_oss", mode) for mode in ("dynamic", "static", "looked_up")),
    *(("bart", mode) for mode in ("dynamic", "static", "beams", "looked_up")),
    *(("t5", mode) for mode in ("dynamic", "static_beams")),
]


# variants that read the number of visible keys or positions
COUNTING = "cosformer", "lssa", "lssar", "relu", "ssmax"


def make(kind, **changes):
    if kind not in MORE:
        return build(kind, **changes)
    cls, config, values = MORE[kind]
    if not hasattr(transformers, cls):
        pytest.skip(f"transformers {transformers.__version__} has no {cls}")
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**values, **changes})
    model = getattr(transformers, cls)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15) if parameter.dim() > 1 else None
    return model


def prompt(padded=True, batch=2):
    tokens = sample("llama", 9, batch)["input_ids"]
    mask = torch.ones_like(tokens)
    if padded:
        mask[-1, :4] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generated(model, inputs, **settings):
    torch.manual_seed(5)
    if model.config.is_encoder_decoder:
        settings.setdefault("decoder_start_token_id", 0)
    # older versions take keys out of a cache_config
    if "cache_config" in settings:
        settings["cache_config"] = dict(settings["cache_config"])
    found = model.generate(**inputs, **{**GREEDY, **settings})
    return found.sequences, torch.stack(found.logits, 1)


def same(found, expected, tolerance=1e-5):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("kind", "mode"), RUNS)
def test_softmax_generates_what_the_model_does(kind, mode):
    if mode in ("hqq", "quanto"):
        pytest.importorskip({"hqq": "hqq", "quanto": "optimum.quanto"}[mode])
    if VERSION < (5, 5) and mode not in ("dynamic", "static", "beams", "sampled"):
        pytest.skip("transformers < 5.5 has it in another form")
    # what rows that see nothing hold is nobody's business, but gets into quantised groups
    model, inputs = make(kind), prompt(padded=mode not in ("hqq", "quanto"))
    if mode == "looked_up":
        # one sequence, in which there is something to look up
        inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5]])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = generated(model, inputs, **MODES[mode])
    # a rounding next to a border between two levels moves a value by a whole level
    tolerance = 1e-2 if mode in ("hqq", "quanto") else 1e-5
    for masks in ("lazy", "bool"):
        if masks == "lazy" and VERSION < (5, 5):
            continue
        with patch(model, "softmax", masks=masks):
            same(generated(model, inputs, **MODES[mode]), expected, tolerance)


def whole(model, sequences, start):
    """Logits of all new tokens from one run without a cache over one sequence without padding."""
    with torch.no_grad():
        return model(sequences[:, start:-1], use_cache=False).logits[:, 8 - start :]


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*(("llama", name) for name in list_variants()), *(("mistral", name) for name in COUNTING)],
)
def test_every_variant_generates_what_the_whole_sequence_gives(kind, variant):
    model, inputs = make(kind), prompt()
    patch(model, variant)
    modes = ("dynamic", "static", "static_in_parts") if VERSION >= (5, 5) else ("dynamic", "static")
    for mode in modes:
        sequences, logits = generated(model, inputs, **MODES[mode])
        for row, start in ((0, 0), (1, 4)):
            alone = whole(model, sequences[row : row + 1], start)
            torch.testing.assert_close(logits[row], alone[0], atol=2e-5, rtol=1e-4)


def continued(model, tokens, cache, cuts):
    """Logits of all tokens, handed over in parts."""
    parts = []
    with torch.no_grad():
        for part in torch.tensor_split(tokens, cuts, dim=1):
            parts.append(model(part, **with_cache(model, cache), use_cache=True).logits)
    return torch.cat(parts, 1)


@modern
@pytest.mark.parametrize(
    ("kind", "variant"),
    [*(("llama", name) for name in list_variants()), *(("mistral", name) for name in COUNTING)],
)
def test_several_new_tokens_at_once(kind, variant):
    model, tokens = make(kind), sample("llama", 14)["input_ids"]
    patch(model, variant)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    caches = [
        transformers.DynamicCache(config=model.config),
        transformers.StaticCache(config=model.config, max_cache_len=20),
    ]
    for cache in caches:
        got = continued(model, tokens, cache, (7, 10, 11))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    if kind == "llama":
        caches[0].crop(-5)
        again = continued(model, tokens[:, 9:], caches[0], (3,))
        torch.testing.assert_close(again, expected[:, 9:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"variant": "relu", "length": "kv"},
                                     {"variant": "cosformer", "max_len": 64},
                                     {"variant": "ssmax"}, {"variant": "lssar"}])  # fmt: skip
def test_the_tail_of_a_static_cache_does_not_count(options):
    model, inputs = make("llama"), prompt()
    patch(model, **options)
    expected = generated(model, inputs)
    same(generated(model, inputs, **STATIC), expected)
    longer = {"max_cache_len": 50} if VERSION >= (5, 18) else {}
    same(generated(model, inputs, **STATIC, **longer), expected)


@modern
@pytest.mark.parametrize("variant", ["softmax", "softpick", "cosformer"])
def test_assisted_by_a_patched_model(variant):
    model, assistant, inputs = make("llama"), make("llama", num_hidden_layers=1), prompt(batch=1)
    inputs["attention_mask"][:] = 1
    patch(model, variant)
    patch(assistant, variant)
    expected = generated(model, inputs)
    found = generated(model, inputs, assistant_model=assistant)
    same(found, expected)


def test_bart_and_t5_attend_across_with_every_variant_that_they_take():
    refused = []
    for kind in ("bart", "t5"):
        for variant in list_variants():
            model, inputs = make(kind), prompt()
            try:
                patch(model, variant)
            except ValueError as error:
                refused.append((kind, variant, str(error)))
                continue
            expected = generated(model, inputs, use_cache=False)
            for mode in ("dynamic", "static"):
                same(generated(model, inputs, **MODES[mode]), expected, 2e-5)
    assert [(kind, variant) for kind, variant, _ in refused] == [
        ("bart", "cosformer"),
        ("t5", "cosformer"),
    ]
    assert "between two sequences" in refused[0][2]
    assert "uses a bias" in refused[1][2]
    model = make("bart")
    patch(model, "cosformer", layers="self_attn")
    expected = generated(model, inputs, use_cache=False)
    same(generated(model, inputs), expected, 2e-5)


@modern
def test_continuous_batching_is_refused_in_words():
    model = make("llama")
    patch(model, "softpick")
    with pytest.raises(ValueError, match="attnvariants"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)


graphs = []


def counting(graph, inputs):
    """A compiler that counts; a function, because settings are copied deeply."""
    graphs.append(graph)
    return graph.forward


@modern
@pytest.mark.parametrize("masks", ["lazy", "bool"])
@pytest.mark.parametrize("variant", list_variants())
def test_compiled_decoding_is_one_graph_for_all_steps(variant, masks):
    if masks == "bool" and variant not in ("softpick", "cosformer"):
        pytest.skip("masks are masks for all variants")
    torch._dynamo.reset()
    model, inputs = make("llama", num_hidden_layers=1), prompt()
    patch(model, variant, masks=masks)
    expected = generated(model, inputs)
    settings = transformers.CompileConfig(backend=counting, fullgraph=True, mode=None)
    settings._compile_all_devices = True
    graphs.clear()
    found = generated(model, inputs, cache_implementation="static", compile_config=settings)
    same(found, expected)
    assert len(graphs) == 1


@modern
def test_a_compiled_model_trains_and_serves_all_lengths():
    torch._dynamo.reset()
    graphs.clear()
    model = make("llama", num_hidden_layers=1)
    patch(model, "ssmax")
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for length in (9, 12, 15):
        tokens = sample("llama", length)["input_ids"]
        call = {"attention_mask": torch.ones_like(tokens), "use_cache": False, "labels": tokens}
        torch.testing.assert_close(compiled(tokens, **call).loss, model(tokens, **call).loss)
    # the first length, then any
    assert len(graphs) <= 2
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (model, whole):
        model.zero_grad()
        function(tokens, **call).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


def recurrent_cache(model):
    from attnvariants.hf import RecurrentCache

    return RecurrentCache(model)


@modern
@pytest.mark.parametrize("masks", ["lazy", "bool"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["dynamic", "beams", "sampled", "in_parts"])
def test_a_recurrent_cache_is_an_ordinary_one(kind, mode, masks):
    model, inputs = make(kind), prompt()
    # six of nine tokens are padding, more than a part holds
    inputs["attention_mask"][1, :6] = 0
    patch(model, "cosformer", masks=masks)
    cache = recurrent_cache(model)
    expected = generated(model, inputs, **MODES[mode])
    for _ in range(2):
        same(generated(model, inputs, **with_cache(model, cache), **MODES[mode]), expected)
        assert cache.get_seq_length() == 15
        cache.reset()
        assert cache.get_seq_length() == 0


@modern
def test_a_recurrent_cache_does_not_grow():
    model = make("llama")
    patch(model, {0: "cosformer", 1: "softpick"})
    tokens = sample("llama", 20)["input_ids"]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    cache = recurrent_cache(model)
    got = continued(model, tokens[:, :10], cache, (5, 6, 9))
    state = cache.layers[0].state
    sizes = [t.shape for t in (state.memory, state.total)]
    copied = copy.deepcopy(cache)
    got = torch.cat([got, continued(model, tokens[:, 10:], cache, (1, 2))], 1)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    state = cache.layers[0].state
    assert sizes == [t.shape for t in (state.memory, state.total)]
    # other layers keep keys and values
    assert cache.layers[1].keys.shape[2] == 20
    again = continued(model, tokens[:, 10:], copied, (3,))
    torch.testing.assert_close(again, expected[:, 10:], atol=2e-5, rtol=1e-4)
    copied.batch_select_indices(torch.tensor([1]))
    copied.batch_repeat_interleave(3)
    assert copied.layers[0].state.memory.shape[0] == copied.layers[1].keys.shape[0] == 3


@modern
def test_what_a_recurrent_cache_cannot_do():
    llama = make("llama")
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM has a variant that decodes"):
        recurrent_cache(llama)
    mistral, bart = make("mistral"), make("bart")
    patch(mistral, "cosformer")
    with pytest.raises(ValueError, match=r"layers.0.*with a state: it sees a window of the keys"):
        recurrent_cache(mistral)
    with pytest.raises(ValueError, match="BartForConditionalGeneration has an encoder"):
        recurrent_cache(bart)
    patch(llama, "cosformer", max_len=12)
    inputs = prompt()
    with pytest.raises(ValueError, match="cannot take back tokens, as crop and assisted"):
        generated(llama, prompt(False, 1), **with_cache(llama, recurrent_cache(llama)),
                  prompt_lookup_num_tokens=2)  # fmt: skip
    with pytest.raises(ValueError, match=r"goe?s? past max_len 12"):
        generated(llama, inputs, **with_cache(llama, recurrent_cache(llama)))
    cache = recurrent_cache(llama)
    with pytest.raises(ValueError, match="has no output_attentions"):
        llama(**inputs, **with_cache(llama, cache), output_attentions=True)
    cache = recurrent_cache(llama)
    llama(**inputs, **with_cache(llama, cache))
    with pytest.raises(ValueError, match="a state is a sum over all of them"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="hides other earlier tokens than it did before"):
        llama(inputs["input_ids"][:, :1], **with_cache(llama, cache))
    square = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="more than causality and padding"):
        llama(inputs["input_ids"][:, :3], square, **with_cache(llama, recurrent_cache(llama)))
    cache = recurrent_cache(llama)
    unpatch(llama)
    llama(**inputs, **with_cache(llama, cache))
    with pytest.raises(RuntimeError, match="the model was unpatched or patched anew"):
        llama(inputs["input_ids"][:, :1], **with_cache(llama, cache))


@pytest.mark.skipif(VERSION >= (5, 5), reason="is about older versions")
def test_a_recurrent_cache_says_what_it_needs():
    model = make("llama")
    patch(model, "cosformer")
    with pytest.raises(ValueError, match=r"needs transformers >= 5\.5"):
        recurrent_cache(model)
