"""The linear kernels behind the public call: when they run, and what torch makes of them."""

import pytest
import torch

pytest.importorskip("triton")

from engines import kernels_run as runs

from attnvariants import Variant, attention, attention_varlen, explain, fused, linear_ops, ops
from attnvariants.testing import conformance, make_inputs, pad, random
from attnvariants_kernels._triton import INTERPRETED

DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
LONG = {"batch": 1, "heads": 1, "kv_heads": 1, "q_len": 70, "kv_len": 70}
OPTIONS = {"variant": "cosformer", "max_len": 128}

CALLS = {
    "causal": (LONG, {"causal": True}),
    "full": (LONG, {}),
    "odd": ({**LONG, "q_len": 41, "kv_len": 67, "dim": 11, "value_dim": 5}, {"causal": True}),
    "gqa": ({"batch": 1, "heads": 4, "q_len": 5, "kv_len": 40}, {"causal": True}),
    "padding": ({"heads": 1, "kv_heads": 1, "kv_len": 40, "q_len": 40}, {"causal": True,
                "attn_mask": pad(40, 23, kv_len=40, left=True)}),
    "one padding": ({}, {"attn_mask": pad(4, kv_len=7, left=False).view(7)}),
    "decode": ({"batch": 1, "q_len": 1, "kv_len": 70}, {"causal": True}),
    "scale": ({}, {"scale": 0.3}),
    "scale of 0": ({}, {"scale": 0.0}),
    "no limit": ({}, {"window_size": (-1, 0)}),
}  # fmt: skip
OTHERS = {
    "window": {"window_size": (3, 0)},
    "lookahead": {"window_size": (-1, 2)},
    "mask": {"attn_mask": random(2, 1, 7, 7) > 0, "causal": True},
    "mask of heads": {"attn_mask": random(1, 2, 1, 7) > 0},
}


@pytest.fixture
def poison():
    """Not here: torch.compile needs functions with names; tests of the kernels have it."""


class Taken(Exception):
    pass


def forbidden(*_):
    raise Taken


@pytest.fixture
def linear_alone(monkeypatch):
    monkeypatch.setattr(ops, "streaming", forbidden)


def qkv(dtype=torch.float32, **sizes):
    return [x.to(DEVICE, dtype).requires_grad_() for x in make_inputs(**sizes)]


def run(leaves, impl="triton", function=attention, **call):
    out = function(*leaves, impl=impl, **call)
    grad = random(*out.shape, seed=9).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def close(found, wanted, tolerance=1e-5):
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert one.shape == other.shape
        size = max(1.0, float(other.abs().max()))
        assert float((one.double() - other).abs().max()) <= tolerance * size, name


def exact(leaves, **call):
    return run([x.detach().double().requires_grad_() for x in leaves], "reference", **call)


@runs
@pytest.mark.usefixtures("linear_alone")
@pytest.mark.parametrize("case", CALLS)
def test_linear_calls_are_the_reference(case):
    sizes, call = CALLS[case]
    call = {n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in call.items()} | OPTIONS
    leaves = qkv(**sizes)
    close(run(leaves, **call), exact(leaves, **call))


@runs
@pytest.mark.usefixtures("linear_alone")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_packed_sequences_are_the_reference(causal):
    bounds = torch.tensor([0, 5, 5, 40, 42, 77], dtype=torch.int32, device=DEVICE)
    leaves = [
        x[0].transpose(0, 1).detach().contiguous().requires_grad_()
        for x in qkv(batch=1, heads=2, kv_heads=1, q_len=77, kv_len=77)
    ]
    call = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "causal": causal, **OPTIONS}
    call["function"] = attention_varlen
    close(run(leaves, **call), exact(leaves, **call))


@runs
@pytest.mark.parametrize("case", OTHERS)
def test_all_other_calls_stream(case, monkeypatch):
    monkeypatch.setattr(linear_ops, "linear", forbidden)
    call = {n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in OTHERS[case].items()} | OPTIONS
    leaves = qkv()
    close(run(leaves, **call), exact(leaves, **call))


@runs
def test_dropout_streams(monkeypatch):
    monkeypatch.setattr(linear_ops, "linear", forbidden)
    found, wanted = (
        attention(
            *qkv(), impl=impl, dropout_p=0.4, generator=torch.Generator().manual_seed(3), **OPTIONS
        )
        for impl in ("triton", "chunked")
    )
    torch.testing.assert_close(found, wanted)


@runs
def test_other_variants_stream(monkeypatch):
    monkeypatch.setattr(linear_ops, "linear", forbidden)
    attention(*qkv(), impl="triton")


@runs
@pytest.mark.usefixtures("linear_alone")
def test_every_part_of_the_contract():
    names = ["cache", "more_queries", "length_one", "left_pad", "right_pad", "value_dim"]
    conformance("cosformer", cases=names, device=DEVICE)


@runs
@pytest.mark.usefixtures("linear_alone")
def test_a_linear_variant_needs_no_hooks():
    """Its own positive features, twice as wide."""

    def prepare(query, key, rows):
        query, key = (torch.cat([x.relu(), x.abs()], -1) for x in (query, key))
        return query, key

    mine = Variant(
        doc="",
        ratio=lambda scores, rows: (scores, scores.sum(-1, keepdim=True).clamp(min=0.5)),
        prepare=prepare,
        hidden=0.0,
        width_factor=2,
        linear_eps=0.5,
    )
    leaves = qkv(q_len=40, kv_len=40)
    call = {"variant": mine, "causal": True}
    close(run(leaves, **call), exact(leaves, **call))
    with pytest.raises(
        ValueError, match=r"cannot run this call: \(1\) this variant has no kernels"
    ):
        attention(*leaves, mine, impl="triton", window_size=(3, 0))


@runs
@pytest.mark.usefixtures("linear_alone")
def test_features_wider_than_the_streaming_kernels_take():
    leaves = qkv(batch=1, heads=1, kv_heads=1, q_len=3, kv_len=3, dim=136)
    close(run(leaves, **OPTIONS), exact(leaves, **OPTIONS))


def test_reasons_are_those_of_the_kernels_that_would_run():
    def why(dim, **call):
        q = torch.empty(1, 2, 7, dim, device="meta")
        return " ".join(explain(q, q, q, "cosformer", impl="triton", **call).reasons["triton"])

    # of what is on the meta device alone
    assert "features" not in why(256, causal=True)
    assert "features" not in why(128, window_size=(3, 0))
    assert "head_dim 260 makes 520 features, over 512" in why(260)
    assert (
        "head_dim 136 makes 272 features, over 256, and the linear kernels, which take 512, have "
        "no window and no dropout"
    ) in why(136, window_size=(3, 0), dropout_p=0.5)
    wide = torch.empty(65536, 1, 1, 8, device="meta")
    assert "65536" not in str(explain(wide, wide, wide, "cosformer", impl="triton"))
    assert "65536" in str(explain(wide, wide, wide, "softmax", impl="triton"))


def arguments(mask=None, packed=False, grad=True):
    sizes = {"batch": 1 if packed else 2, "heads": 1, "kv_heads": 1, "q_len": 5, "kv_len": 5}
    tensors = [x.relu().detach().requires_grad_(grad) for x in qkv(**sizes)]
    cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE) if packed else None
    return (*tensors, mask, cu, cu, 0.7, 1e-6, True, 0, 5, 5)


@runs
@pytest.mark.parametrize("case", ["mask", "packed"])
def test_opcheck(case):
    call = {"packed": True} if case == "packed" else {"mask": MASK}
    torch.library.opcheck(torch.ops.attnvariants.linear_forward.default, arguments(**call))
    args = arguments(**call, grad=False)
    out, norm = linear_ops.linear_forward(*args)
    args = torch.randn_like(out), *args[:3], out, norm, *args[3:]
    torch.library.opcheck(torch.ops.attnvariants.linear_backward.default, args)


MASK = pad(5, 3, kv_len=5, left=True)[:, 0, 0].to(DEVICE)


@runs
@pytest.mark.usefixtures("linear_alone")
def test_one_graph_serves_all_lengths():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def call(q, k, v, mask):
        return attention(q, k, v, causal=True, attn_mask=mask, impl="triton", **OPTIONS)

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for q_len, kv_len in ((7, 7), (9, 9), (5, 21), (6, 37)):
        leaves = qkv(q_len=q_len, kv_len=kv_len)
        mask = pad(kv_len, kv_len - 2, kv_len=kv_len, left=True).to(DEVICE)
        torch.testing.assert_close(compiled(*leaves, mask), call(*leaves, mask))
    # square calls may have one of their own
    assert len(graphs) <= 2


@runs
@pytest.mark.usefixtures("linear_alone")
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_in_one_graph_with_its_backward(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = qkv(batch=1, heads=4, q_len=9, kv_len=9)
    call = {"causal": True, **OPTIONS}
    for one, other in zip(run(leaves, function=compiled, **call), run(leaves, **call), strict=True):
        torch.testing.assert_close(one, other)


@runs
@pytest.mark.usefixtures("linear_alone")
def test_exports_with_any_length():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True, impl="triton", **OPTIONS)

    tokens = torch.export.Dim("tokens", min=2, max=128)
    inputs = tuple(x.detach() for x in qkv())
    exported = torch.export.export(Layer(), inputs, dynamic_shapes=[{2: tokens}] * 3)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "attnvariants.linear_forward.default" in targets
    longer = [x.detach() for x in qkv(q_len=12, kv_len=12)]
    torch.testing.assert_close(exported.module()(*longer), Layer()(*longer))


@runs
@pytest.mark.usefixtures("linear_alone")
def test_func_grad_and_vmap():
    sizes = {"batch": 4, "heads": 1, "kv_heads": 1, "q_len": 5, "kv_len": 5}
    q, k, v = (x.detach().unflatten(0, (2, 2)) for x in qkv(**sizes))
    # one row for both of a batch
    mask = (random(2, 1, 1, 1, 5, seed=4) > -1).to(DEVICE)

    def loss(q, k, v, mask):
        return attention(q, k, v, attn_mask=mask, impl="triton", **OPTIONS).square().sum()

    every = torch.func.grad(loss, argnums=(0, 1, 2))
    got = torch.func.vmap(every, in_dims=(0, None, 0, 0))(q, k[0], v, mask)
    shared = torch.func.vmap(every, in_dims=(0, 0, 0, None))(q, k, v, mask[0])
    for i in range(2):
        torch.testing.assert_close(tuple(x[i] for x in got), every(q[i], k[0], v[i], mask[i]))
        torch.testing.assert_close(tuple(x[i] for x in shared), every(q[i], k[i], v[i], mask[0]))


@runs
@pytest.mark.usefixtures("linear_alone")
def test_only_what_is_wanted_is_differentiated():
    q, k, v = qkv()
    attention(q, k.detach(), v, impl="triton", **OPTIONS).sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is not None


@runs
@pytest.mark.usefixtures("linear_alone")
def test_second_derivatives_are_refused():
    leaves = qkv()
    out = attention(*leaves, impl="triton", **OPTIONS)
    (grad,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="use impl='reference' to differentiate twice"):
        grad.sum().backward()


@runs
@pytest.mark.usefixtures("linear_alone")
def test_bitwise_repeatable():
    leaves = qkv(batch=1, q_len=40, kv_len=40)
    first, second = (run(leaves, causal=True, **OPTIONS) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@runs
@pytest.mark.usefixtures("linear_alone")
def test_half_precision_stays_half():
    leaves = qkv(torch.bfloat16, batch=1, heads=1, kv_heads=1, q_len=40, kv_len=40)
    found = run(leaves, causal=True, **OPTIONS)
    assert {x.dtype for x in found} == {torch.bfloat16}
    close(found, exact(leaves, causal=True, **OPTIONS), 2e-2)


def test_what_ships():
    def names(variant, head_dim, causal=True):
        return set(fused.shipped(variant, target="sm_90", head_dim=head_dim, causal=causal))

    backward = {"delta", "state", "dq", "state_reverse", "dk", "dv"}
    linear = {"forward_state", "forward_read", *(f"linear_{name}" for name in backward)}
    streaming = {"forward_streaming", "streaming_delta", "streaming_dq", "streaming_dkv"}
    assert names("cosformer", 128) == linear | streaming | {"forward_prefill"}
    assert names("cosformer", 64, causal=False) == linear | streaming
    assert names("cosformer", 256) == linear | {"forward_prefill"}
    assert names("softmax", 256) == {"forward", "delta", "dq", "dkv"}
