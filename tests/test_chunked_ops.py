"""The chunked engine as operators: one node of a graph, with the same numbers and gradients."""

from dataclasses import replace

import pytest
import torch
from test_ops import CALLS, qkv

from attnvariants import attention, chunked_ops, explain, get_variant, list_variants
from attnvariants.problem import build, prepare
from attnvariants.registry import CALL_ARGUMENTS


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(function=attention, **settings):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **settings)


def run(function, call, **more):
    """Output and gradients."""
    variant, rest = call
    leaves = qkv()
    learned = [t for t in rest.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    out = function(*leaves, variant, impl="chunked", **rest, **more)
    return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *learned])]


def problem_of(case, **more):
    variant, rest = CALLS[case]
    call = {name: value for name, value in rest.items() if name in CALL_ARGUMENTS}
    options = {name: value for name, value in rest.items() if name not in call}
    leaves = qkv()
    problem = build(*leaves, get_variant(variant), options, **call, **more)
    return *prepare(*leaves[:2], problem), leaves[2], problem


@pytest.mark.parametrize("name", list_variants())
def test_every_variant_compiles_in_one_graph(name):
    call = name, {"causal": True}
    for one, other in zip(run(attention, call), run(compiled(), call), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", ["window", "mask", "bias", "alibi_batch", "softcap", "learned"])
def test_every_kind_of_call_compiles_in_one_graph(case):
    for one, other in zip(run(attention, CALLS[case]), run(compiled(), CALLS[case]), strict=True):
        assert torch.equal(one, other)


def test_only_what_is_wanted_is_differentiated(monkeypatch):
    needs, gradients = [], chunked_ops.chunked.gradients

    def spy(*args):
        needs.append([bool(need) for need in args[-1]])
        return gradients(*args)

    monkeypatch.setattr(chunked_ops.chunked, "gradients", spy)
    q, k, v = qkv()
    bias = torch.zeros(7, 7, requires_grad=True)
    out = compiled()(q, k.detach(), v.detach(), "softpick", bias=bias, impl="chunked")
    out.sum().backward()
    assert needs == [[True, False, False, True, False]]
    assert q.grad is not None
    assert bias.grad.shape == bias.shape


@pytest.mark.parametrize("case", ["plain", "padding", "bias", "alibi_batch", "options"])
def test_opcheck(case):
    query, key, value, problem = problem_of(case, seed=5, dropout_p=0.2)
    shared, facts = chunked_ops._arguments(problem)
    operators = torch.ops.attnvariants
    forward = query, key, value, *shared, *facts
    torch.library.opcheck(operators.chunked_forward.default, forward)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in forward]
    out = operators.chunked_forward(*detached)
    for needs in ([True] * 5, [False, True, False, False, False]):
        needs = [need and t is not None for need, t in zip(needs, (*forward[:3], *shared[1:3]),
                                                           strict=True)]  # fmt: skip
        backward = torch.randn_like(out), *detached[:9], needs, *facts
        # its body differentiates, which the test of the registration takes for a mistake
        tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
        torch.library.opcheck(operators.chunked_backward.default, backward, test_utils=tests)
    for wants in ((True, True), (False, True)):
        weights = *detached[:2], *detached[3:9], *wants, *facts
        torch.library.opcheck(operators.chunked_weights.default, weights)


def test_weights_and_statistics_compile():
    q, k, v = (t.detach() for t in qkv())
    call = {"causal": True, "return_weights": True, "return_stats": True}
    out, weights, stats = attention(q, k, v, "lssar", **call)
    found = compiled()(q, k, v, "lssar", **call)
    for one, other in zip((out, weights, *stats), (*found[:2], *found[2]), strict=True):
        assert torch.equal(one, other)


def test_compiled_dropout_follows_the_seed():
    whole = compiled()
    q, k, v = qkv()

    def drop():
        return whole(q, k, v, "softpick", impl="chunked", dropout_p=0.5)

    torch.manual_seed(3)
    first, second = drop(), drop()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(drop(), first)
    torch.manual_seed(3)
    assert torch.equal(attention(q, k, v, "softpick", impl="chunked", dropout_p=0.5), first)


def test_one_compilation_serves_all_lengths():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def call(q, k, v, mask):
        return attention(q, k, v, "lssa", causal=True, attn_mask=mask)

    whole = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for q_len, kv_len in ((7, 7), (9, 9), (33, 33), (5, 21), (6, 50)):
        inputs = *qkv(q_len=q_len, kv_len=kv_len), torch.ones(2, 1, 1, kv_len, dtype=torch.bool)
        assert torch.equal(whole(*inputs), call(*inputs))
    # square calls may have one of their own
    assert len(graphs) <= 2


def test_exports():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, "softpick", causal=True)

    inputs = tuple(t.detach() for t in qkv())
    tokens = torch.export.Dim("tokens", min=2, max=512)
    exported = torch.export.export(Layer(), inputs, dynamic_shapes=[{2: tokens}] * 3)
    assert "attnvariants.chunked_forward.default" in {str(n.target) for n in exported.graph.nodes}
    inputs = tuple(t.detach() for t in qkv(q_len=12, kv_len=12))
    assert torch.equal(exported.module()(*inputs), Layer()(*inputs))


def test_autocast():
    q, k, v = qkv()

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v, "softpick", causal=True)

    assert call().dtype == torch.bfloat16
    assert torch.equal(compiled(call)(), call())


def test_unregistered_variants():
    mine = replace(get_variant("softpick"), name="")
    call = mine, {"causal": True}
    for one, other in zip(run(compiled(), call), run(attention, ("softpick", {"causal": True})),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["cosformer", "relu"])
@pytest.mark.parametrize("impl", ["reference", "chunked", "compiled"])
def test_a_position_leaves_a_tail_of_empty_keys_out(name, impl):
    options = {"cosformer": {"max_len": 32}, "relu": {"length": "kv"}}[name]
    q, k, v = (t.detach() for t in qkv(q_len=2, kv_len=9))
    want = attention(q, k[:, :, :5], v[:, :, :5], name, causal=True, impl="reference", **options)
    mask = torch.ones(2, 9, dtype=torch.bool).tril(3)
    function, impl = (compiled(), "chunked") if impl == "compiled" else (attention, impl)
    for position in (3, torch.tensor(3)):
        out = function(
            q, k, v, name, attn_mask=mask, position=position, impl=impl, **options
        )  # fmt: skip
        torch.testing.assert_close(out, want)
    without = attention(q, k, v, name, attn_mask=mask, impl="chunked", **options)
    assert not torch.allclose(without, want, atol=1e-3)


def test_bad_positions():
    q, k, v = qkv(q_len=2, kv_len=9)
    for position, match in (
        (-1, "an integer >= 0 or an int64 scalar, got -1"),
        (True, "got True"),
        (torch.tensor([3]), r"got shape \[1\] of torch.int64"),
        (torch.tensor(3.0), r"got shape \[\] of torch.float32"),
    ):
        with pytest.raises(ValueError, match=match):
            attention(q, k, v, "cosformer", position=position)
    with pytest.raises(ValueError, match="position goes with attn_mask alone"):
        attention(q, k, v, "cosformer", position=3, causal=True)
    assert explain(q, k, v, "cosformer", position=3).engine == "chunked"
