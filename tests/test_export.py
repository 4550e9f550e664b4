"""Traced and exported: what torch.jit.trace and torch.onnx.export record runs on other inputs."""

import warnings

import pytest
import tiny
import torch

import attnvariants
from attnvariants import attention, attention_varlen, explain, list_variants

VARIANTS = list_variants()
CALL = {"ssmax": {"s": 0.7}, "cosformer": {"max_len": None}, "relu": {"length": "kv"}}


class Every(torch.nn.Module):
    """Every variant's output, of a padded and of a causal call."""

    def __init__(self, variants=VARIANTS, impl="auto", calls=("causal", "mask", "more")):
        super().__init__()
        self.variants, self.impl, self.calls = variants, impl, calls

    def forward(self, q, k, v, mask):
        outs = []
        for name in self.variants:
            call = {"impl": self.impl, **CALL.get(name, {})}
            more = {"softcap": 2.0, "window_size": (2, 1), "bias": mask.float()[:, :, :1]}
            calls = {"causal": {"causal": True}, "mask": {"attn_mask": mask}, "more": more}
            wanted = [each for each in self.calls if (name, each) != ("cosformer", "more")]
            outs += [attention(q, k, v, name, **calls[each], **call) for each in wanted]
        return tuple(outs)


def inputs(batch=2, q_len=5, kv_len=5, hidden=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, q_len, 8, generator=generator)
    k, v = (torch.randn(batch, 2, kv_len, 8, generator=generator) for _ in range(2))
    mask = torch.ones(batch, 1, q_len, kv_len, dtype=torch.bool)
    mask[0, :, :, :hidden] = False
    if hidden:
        mask[:, :, 1] = False
    return q, k, v, mask


# other sizes, padding, a row that sees nothing, fewer queries than keys
OTHERS = [
    {"seed": 1},
    {"hidden": 2, "seed": 2},
    {"batch": 3, "q_len": 7, "kv_len": 9, "hidden": 1, "seed": 3},
    {"batch": 1, "q_len": 1, "kv_len": 6, "seed": 4},
]


def check(function, others=OTHERS, every=None, tolerance=1e-4):
    for other in others:
        arguments = inputs(**other)
        found, wanted = function(*arguments), (every or Every())(*arguments)
        for index, (one, want) in enumerate(zip(found, wanted, strict=True)):
            torch.testing.assert_close(
                torch.as_tensor(one), want, rtol=tolerance, atol=tolerance,
                msg=lambda text, index=index, other=other: f"output {index} of {other}: {text}",
            )  # fmt: skip


def quietly(function, *arguments, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **settings)


@pytest.mark.parametrize("example", [{}, {"hidden": 2}], ids=["full", "padded"])
def test_a_trace_is_right_for_other_inputs(example):
    traced = quietly(torch.jit.trace, Every(), inputs(**example), check_trace=False)
    check(traced)


def test_a_trace_does_not_keep_that_a_mask_was_expanded():
    q, k, v, mask = inputs()
    example = mask[:, :, :1].expand(-1, -1, 5, -1)
    traced = quietly(torch.jit.trace, Every(("softpick", "lssa")), (q, k, v, example),
                     check_trace=False)  # fmt: skip
    exported = torch.export.export(Every(("softpick", "lssa")), (q, k, v, example)).module()
    other = mask.tril()
    for function in (traced, exported):
        for one, want in zip(function(q, k, v, other), Every(("softpick", "lssa"))(q, k, v, other),
                             strict=True):  # fmt: skip
            torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5)


def run_onnx(path):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda *tensors: session.run(
        None, {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
    )


DYNAMIC = {0: "batch", 2: "q_len"}, {0: "batch", 2: "kv_len"}, {0: "batch", 2: "kv_len"}


def test_onnx_of_every_variant_is_right_for_other_inputs(tmp_path):
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "every.onnx")
    dims = {name: torch.export.Dim(name, min=2, max=64) for name in ("batch", "q_len", "kv_len")}
    shapes = tuple({dim: dims[name] for dim, name in each.items()}
                   for each in (*DYNAMIC, {0: "batch", 2: "q_len", 3: "kv_len"}))  # fmt: skip
    every = Every(calls=("mask",))
    # what the exporter does to shrink a graph takes most of its time
    quietly(torch.onnx.export, every, inputs(batch=3, q_len=6, kv_len=7), path, dynamo=True,
            dynamic_shapes=shapes, optimize=False, verbose=False)  # fmt: skip
    check(run_onnx(path), OTHERS[:3], every)


def test_onnx_by_the_older_exporter_is_right_for_other_inputs(tmp_path):
    pytest.importorskip("onnx")
    path = str(tmp_path / "every.onnx")
    axes = dict(zip("qkvm", (*DYNAMIC, {0: "batch", 2: "q_len", 3: "kv_len"}), strict=True))
    quietly(torch.onnx.export, Every(), inputs(), path, dynamo=False, input_names=list("qkvm"),
            dynamic_axes=axes, opset_version=17)  # fmt: skip
    check(run_onnx(path))


def test_onnx_of_an_exported_program(tmp_path):
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "program.onnx")
    example = inputs()
    program = torch.export.export(Every(("softpick", "sparsemax")), example)
    assert "chunked_forward" in str(program.graph)
    quietly(torch.onnx.export, program, (), path, verbose=False)
    for one, want in zip(run_onnx(path)(*inputs(hidden=2, seed=5)),
                         Every(("softpick", "sparsemax"))(*inputs(hidden=2, seed=5)),
                         strict=True):  # fmt: skip
        torch.testing.assert_close(torch.as_tensor(one), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["chunked", "sdpa"])
def test_an_engine_that_cannot_be_traced_says_so(impl):
    layer = Every(("softmax",), impl)
    match = f"impl='{impl}' cannot run this call: .*torch.jit.trace records.*impl='reference'"
    with pytest.raises(ValueError, match=match):
        quietly(torch.jit.trace, layer, inputs(), check_trace=False)


def test_explain_names_the_engine_of_a_trace():
    seen = []

    def forward(q, k, v, mask):
        seen.append(explain(q, k, v, "softpick"))
        return q + 1

    quietly(torch.jit.trace, forward, inputs(), check_trace=False)
    assert seen[0].engine == "reference"
    assert "torch.jit.trace records operators of torch alone" in str(seen[0])


def test_packed_boundaries_are_not_traced():
    x, bounds = torch.randn(5, 2, 4), torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match="attention_varlen cannot be recorded by"):
        quietly(torch.jit.trace, lambda x, b: attention_varlen(x, x, x, b, b), (x, bounds),
                check_trace=False)  # fmt: skip


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("variant", ["softpick", "lssa"])
def test_a_patched_model_is_traced_with_a_full_mask_and_run_with_a_padded_one(variant):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SMALL)).eval()
    attnvariants.patch(model, variant)
    ids = torch.arange(3, 21).view(2, 9)
    full = torch.ones_like(ids)
    padded = full.clone()
    padded[1, :3] = 0
    traced = quietly(torch.jit.trace, Logits(model), (ids, full), check_trace=False)
    seen = padded.bool()
    torch.testing.assert_close(traced(ids, padded)[seen], Logits(model)(ids, padded)[seen],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
