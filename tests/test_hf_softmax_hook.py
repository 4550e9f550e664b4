"""Models that compute attention themselves, patched through `backend="softmax-hook"`."""

import copy
import io
import math
import pickle

import oracles
import pytest
import torch

pytest.importorskip("transformers")

import own_softmax
from test_hf import VERSION, snapshot
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnvariants import patch, unpatch
from attnvariants.diagnostics import diagnose
from attnvariants.hf.softmax_known import KNOWN, Known

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
FALCON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **IDS,
}
MODELS = {
    "own": ("OwnForCausalLM", GPT),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", {**GPT, "rotary_dim": 4}),
    "falcon": ("FalconForCausalLM", FALCON),
    "falcon-new": (
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-alibi": ("FalconForCausalLM", {**FALCON, "alibi": True, "multi_query": False}),
    "bloom": (
        "BloomForCausalLM",
        {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, **IDS},
    ),
    "mpt": (
        "MptForCausalLM",
        {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **IDS},
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 64,
            **IDS,
        },
    ),
    "xglm": (
        "XGLMForCausalLM",
        {
            "vocab_size": 99,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "dropout": 0.0,
            "max_position_embeddings": 64,
            **IDS,
        },
    ),
    "openai-gpt": ("OpenAIGPTLMHeadModel", GPT),
}
CACHED = [kind for kind in MODELS if kind != "openai-gpt"]


def build(kind, implementation="eager", **changes):
    name, values = MODELS[kind]
    cls = getattr(own_softmax if kind == "own" else transformers, name)
    if kind != "own" and own_softmax.calls_the_interface(cls):
        pytest.skip(f"{name} calls the attention interface in {transformers.__version__}")
    torch.manual_seed(0)
    config = cls.config_class(**{**values, **changes})
    config._attn_implementation = implementation
    model = cls(config).eval()
    for parameter in model.parameters():
        # larger weights than the usual 0.02, so that attention is far from uniform
        torch.nn.init.normal_(parameter, std=0.15) if parameter.dim() > 1 else None
    return model


def tokens(length=12, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 99, (batch, length), generator=generator)


def left_padded(ids, pad=4):
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return mask


def hook(model, variant="softpick", **more):
    return patch(model, variant, backend="softmax-hook", **more)


@torch.no_grad()
def logits(model, ids, mask=None):
    return model(ids, attention_mask=mask).logits


@pytest.mark.parametrize("kind", MODELS)
def test_softmax_is_the_model_and_unpatch_restores_it(kind):
    model, ids = build(kind), tokens()
    mask = left_padded(ids)
    before, expected, padded = snapshot(model), logits(model, ids), logits(model, ids, mask)
    handle = hook(model, "softmax")
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids, mask), padded)
    handle.unpatch()
    assert torch.equal(logits(model, ids), expected)
    assert snapshot(model) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["falcon", "falcon-new"])
def test_sdpa_is_switched_to_eager_and_back(kind):
    model, ids = build(kind, "sdpa"), tokens()
    before, expected = snapshot(model), logits(model, ids, left_padded(ids))
    if VERSION < (5, 0):
        with pytest.raises(ValueError, match="load the model with attn_implementation='eager'"):
            hook(model)
        return
    with hook(model, "softmax"):
        assert model.config._attn_implementation == "eager"
        got = logits(model, ids, left_padded(ids))
        seen = left_padded(ids).bool()
        torch.testing.assert_close(got[seen], expected[seen], atol=1e-5, rtol=1e-5)
    assert snapshot(model) == before
    assert torch.equal(logits(model, ids, left_padded(ids)), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_variants_keep_causality_and_padding(kind):
    model = build(kind)
    for variant in ["sparsemax"] if kind == "falcon-alibi" else ["softpick", "ssmax"]:
        with hook(model, variant) as handle:
            result = handle.verify()
            assert result.reached == len(handle.report) == 2
            # XGLM of transformers 4 adds to its position_ids in place: each run is another
            assert result.leak == (None if kind == "xglm" and VERSION < (5, 0) else 0)
            assert result.padding is None or result.padding < 1e-5
            assert {row.impl for row in handle.report} == {"softmax-hook"}


class Scores(TorchFunctionMode):
    """Keeps what goes into the softmax over the last dimension."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.softmax:
            self.found.append(args[0].detach().double())
        return func(*args, **(kwargs or {}))


VARIANTS = [
    ("softpick", {}),
    ("sparsemax", {}),
    ("relu", {"act": "sigmoid"}),
    ("sa_softmax", {}),
    ("sa_softmax", {"form": "x"}),
    ("ssmax", {"s": torch.tensor([0.2, 0.5, 0.9, 1.3])}),
]


@pytest.mark.parametrize(("variant", "options"), VARIANTS)
@pytest.mark.parametrize("kind", ["own", "gptj", "codegen", "xglm", "openai-gpt", "bloom", "mpt"])
def test_weights_are_those_of_the_formula(kind, variant, options):
    size = {"xglm": "num_layers", "mpt": "n_layers"}.get(kind, "n_layer")
    model, ids = build(kind, **{size: 1}), tokens(7)
    mask = left_padded(ids, 3)
    with Scores() as scores, torch.no_grad():
        model(ids, attention_mask=mask)
    (found,) = scores.found
    found = found.view(2, 4, 7, 7)
    keep = mask[:, None, None].bool() & torch.ones(7, 7, dtype=torch.bool).tril()
    alibi = torch.zeros_like(found)
    if kind in ("bloom", "mpt"):
        slope = 4.0 ** -torch.arange(1, 5)[:, None, None].double()
        place = torch.arange(7) - (torch.tensor([0, 3])[:, None] if kind == "bloom" else 6)
        # the two models leave out what softmax does not see: minus slope times the row's position
        found = found - slope * place.clamp(min=-6).view(-1, 1, 7, 1)
        alibi = slope * (torch.arange(7) - torch.arange(7)[:, None])
        alibi = alibi.expand(2, -1, -1, -1)
    hook(model, variant, **options)
    with torch.no_grad():
        got = model(ids, attention_mask=mask, output_attentions=True).attentions[0]
    formula = oracles.FORMULAS["softmax" if variant == "ssmax" else variant]
    own = {} if variant == "ssmax" else options
    expected = torch.zeros_like(found)
    for batch, head, row in torch.cartesian_prod(*map(torch.arange, (2, 4, 7))).tolist():
        seen = keep[batch, 0, row].nonzero()[:, 0]
        if len(seen):
            x = found[batch, head, row, seen]
            if variant == "ssmax":
                shift = alibi[batch, head, row, seen]
                x = (x - shift) * options["s"][head].double() * math.log(len(seen)) + shift
            expected[batch, head, row, seen] = formula(x, len(seen), 7, 7, **own)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["own", "gptj", "codegen", "falcon", "bloom", "mpt", "openai-gpt"])
def test_hidden_keys_are_recognised_in_half_precision(kind, dtype):
    model, ids = build(kind), tokens(7)
    mask = left_padded(ids, 3)
    hook(model, "softpick")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, output_attentions=True).attentions
        model.to(dtype)
        got = model(ids, attention_mask=mask, output_attentions=True).attentions
        assert got[0].dtype == dtype
    keep = mask[:, None, None].bool() & torch.ones(7, 7, dtype=torch.bool).tril()
    assert float(got[0].float().masked_fill(keep, 0).abs().max()) == 0
    atol = 0.1 if dtype == torch.bfloat16 else 0.02
    torch.testing.assert_close(got[0].float(), expected[0], atol=atol, rtol=0.05)


@pytest.mark.parametrize("kind", ["own", "mpt"])
def test_hidden_keys_are_recognised_under_autocast(kind):
    model, ids = build(kind), tokens(7)
    hook(model, "softpick")
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        got = model(ids, output_attentions=True).attentions[0]
    assert float(got.float().triu(1).abs().max()) == 0
    assert float(got.float().sum()) > 1


@pytest.mark.parametrize("kind", CACHED)
def test_cached_generation_is_the_full_forward(kind):
    model, ids = build(kind), tokens(8)
    hook(model, "sparsemax" if kind == "falcon-alibi" else "sa_softmax")
    mask = left_padded(ids, 3)
    got = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    mask = torch.cat([mask, mask.new_ones(2, 5)], 1)
    more = {} if kind in ("bloom", "mpt") else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        full = model(got.sequences, attention_mask=mask, **more).logits[:, 7:-1]
    torch.testing.assert_close(torch.stack(got.logits, 1), full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_reach_learned_values(reentrant):
    model, ids = build("own"), tokens()
    handle = hook(model, "ssmax", s=0.4)
    if reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def loss():
        return model(ids, labels=ids, use_cache=False).loss

    model.enable_input_require_grads()
    loss().backward()
    name, value = next(iter(handle.parameters.items()))
    assert name == "transformer.h.0.attn.attn_variant.s"
    assert value.shape == (4,)
    with torch.no_grad():
        for head in (0, 3):
            step = torch.zeros(4)
            step[head] = 1e-2
            value += step
            above = loss().double()
            value -= 2 * step
            slope = (above - loss().double()) / 2e-2
            value += step
            torch.testing.assert_close(value.grad[head].double(), slope, atol=2e-4, rtol=2e-2)


def test_an_exception_leaves_softmax_alone():
    model, ids = build("own"), tokens()
    hook(model, "softpick")
    expected = logits(model, ids)

    def interrupt(*args):
        raise KeyboardInterrupt

    seen = model.transformer.h[0].attn.out_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids)
    seen.remove()
    row = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(torch.softmax(row, -1), row.exp() / row.exp().sum())
    assert torch.equal(logits(model, ids), expected)


def test_copies_and_pickles_of_a_patched_model():
    model, ids = build("own"), tokens()
    hook(model, "ssmax", s=0.4)
    expected = logits(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    copies.append(pickle.loads(pickle.dumps(model)))
    unpatch(model)
    for each in copies:
        assert torch.equal(logits(each, ids), expected)
        unpatch(each)
        assert torch.equal(logits(each, ids), logits(model, ids))
        assert snapshot(each) == snapshot(model)


def test_layers_mappings_and_the_record():
    model, ids = build("own"), tokens()
    plain = logits(model, ids)
    first = hook(model, {0: "softpick", 1: ("relu", {"act": "relu2"})})
    both = logits(model, ids)
    entries = model.config.attn_variants["patches"]
    assert [(e["variant"], e["backend"]) for e in entries] == [
        ("softpick", "softmax-hook"),
        ("relu", "softmax-hook"),
    ]
    assert hook(model, "softpick", layers=0) is first
    first.unpatch()
    with hook(model, "softpick", layers=[0]), hook(model, "relu", layers=1, act="relu2"):
        assert torch.equal(logits(model, ids), both)
    assert torch.equal(logits(model, ids), plain)


def test_accelerate_hooks_come_and_go():
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = build("own"), tokens()
    plain = logits(model, ids)
    hook(model, "softpick")
    expected = logits(model, ids)
    attention = model.transformer.h[0].attn
    hooks.add_hook_to_module(attention, hooks.ModelHook())
    assert torch.equal(logits(model, ids), expected)
    hooks.remove_hook_from_module(attention)
    assert torch.equal(logits(model, ids), expected)
    hooks.add_hook_to_module(attention, hooks.ModelHook())
    unpatch(model)
    assert torch.equal(logits(model, ids), plain)
    hook(model, "softpick")
    assert torch.equal(logits(model, ids), expected)
    unpatch(model)
    hooks.remove_hook_from_module(attention)
    assert torch.equal(logits(model, ids), plain)


def test_what_is_lost_is_missed():
    model, ids = build("falcon", "eager" if VERSION < (5, 0) else "sdpa"), tokens()
    hook(model, "softpick")
    for module in model.modules():
        # where transformers before 5 keeps it
        if hasattr(module, "_use_sdpa"):
            module._use_sdpa = True
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"no softmax .*set_attn_implementation\('eager'\)"):
        logits(model, ids)

    model = build("own")
    plain = logits(model, ids)
    hook(model, "softpick")
    attention = model.transformer.h[0].attn
    with pytest.raises(ValueError, match="copied without its hook"):
        copy.copy(attention)(torch.zeros(1, 2, 32))
    del attention.__dict__["forward"]
    with pytest.raises(ValueError, match="was replaced after it was patched"):
        logits(model, ids)
    unpatch(model)
    assert torch.equal(logits(model, ids), plain)


def test_a_second_softmax_is_refused():
    model, ids = build("own"), tokens()
    hook(model, "softpick")
    attention = model.transformer.h[0].attn
    attention.attn_dropout.register_forward_hook(lambda m, args, out: torch.softmax(out, -1))
    with pytest.raises(ValueError, match="2 softmaxes in a call, expected 1"):
        logits(model, ids)


def test_compiling_says_why_not():
    model, ids = build("own", n_layer=1), tokens()
    hook(model, "softpick")
    expected = logits(model, ids)
    broken = torch.compile(model, backend="eager")
    assert torch.equal(logits(broken, ids), expected)
    torch.compiler.reset()
    with pytest.raises(Exception, match="run the model without it"):
        logits(torch.compile(model, backend="eager", fullgraph=True), ids)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("own", {"variant": "lssa"}, "lssa needs queries and keys"),
        ("own", {"variant": "cosformer"}, "cosformer needs queries and keys"),
        ("falcon-alibi", {"variant": "ssmax"}, "bias, which ssmax's temperature must not"),
        ("falcon-alibi", {"variant": "softpick"}, "bias by key .* softpick changes with a number"),
        ("own", {"variant": "softpick", "impl": "triton"}, "impl must be 'auto' or 'reference'"),
        ("own", {"variant": "softpick", "masks": "bool"}, "leave out masks"),
        ("own", {"variant": "softpick", "backend": "hook"}, "backend must be"),
        ("own", {"variant": "softpick", "backend": "dispatch"}, "pass backend='softmax-hook'"),
        ("own", {"variant": "softpick", "layers": 7}, "layer 7 has no attention"),
    ],
)
def test_refusals(kind, arguments, message):
    model, ids = build(kind), tokens()
    before, expected = snapshot(model), logits(model, ids)
    with pytest.raises(ValueError, match=message):
        patch(model, **{"backend": "softmax-hook", **arguments})
    assert snapshot(model) == before
    assert torch.equal(logits(model, ids), expected)


def test_refused_models():
    dispatching = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )
    with pytest.raises(ValueError, match="leave out backend='softmax-hook'"):
        hook(dispatching)
    with pytest.raises(ValueError, match="load the model with attn_implementation='eager'"):
        hook(build("falcon-alibi", "sdpa"))
    model = build("own")
    model.transformer.h[0].attn.forward = model.transformer.h[0].attn.forward
    with pytest.raises(ValueError, match=r"forward was replaced on the instance \(by own_softmax"):
        hook(model)
    longformer = transformers.LongformerConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_window=4,
    )
    with pytest.raises(ValueError, match="none of the classes whose masks"):
        hook(transformers.LongformerModel(longformer))


def test_a_class_whose_forward_was_replaced_is_not_known(monkeypatch):
    model = build("own")
    cls = type(model.transformer.h[0].attn)
    own = cls.forward

    def forward(self, *args, **kwargs):
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patching:
        patching.setattr(cls, "forward", forward)
        with pytest.raises(ValueError, match="none of the classes"):
            hook(model)
    model.transformer.h[0].attn.__class__ = type("Other", (cls,), {"_attn": lambda self: None})
    with pytest.raises(ValueError, match="otherwise than OwnAttention"):
        hook(model, layers=lambda name, module: True)


def test_diagnose_says_what_it_cannot_measure():
    model = build("own")
    hook(model, "softpick")
    with pytest.raises(ValueError, match="backend='softmax-hook'"):
        diagnose(model, tokens())


def test_the_report_names_the_way():
    from attnvariants.hf.report import report_of

    rows = report_of(build("bloom")).refused
    assert len(rows) == 2
    assert all("backend='softmax-hook'" in row.reason for row in rows)


def test_what_is_known_is_well_formed():
    names = [name for name in KNOWN if ":" not in name]
    assert all(isinstance(KNOWN[name], Known) and name.count(".") == 1 for name in names)
    assert names == sorted(names)
