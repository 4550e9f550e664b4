"""Transforms of torch.func, forward-mode derivatives, and tensors without values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import attnvariants
from attnvariants import attention, attention_varlen, explain, list_variants
from attnvariants.api import iter_weights

VARIANTS = list_variants()


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def qkv(*lead, q_len=4, kv_len=5):
    sizes = (4, q_len, 3), (2, kv_len, 3), (2, kv_len, 2)
    return [random(*lead, 1, *size, seed=i) for i, size in enumerate(sizes)]


WEIGHS = random(1, 4, 4, 2, seed=7)


def loss(variant, impl="auto", **call):
    return lambda q, k, v: (attention(q, k, v, variant, impl=impl, **call) * WEIGHS).sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_transforms_give_what_a_loop_of_autograd_gives(variant):
    call = {"causal": True, "attn_mask": random(1, 1, 4, 5, seed=5) > -1}
    q, k, v = qkv(3)
    got = torch.func.vmap(torch.func.grad(loss(variant, **call), argnums=(0, 1, 2)))(q, k, v)
    tangent = random(1, 4, 4, 3, seed=9)
    for i in range(3):
        leaves = [tensor[i].clone().requires_grad_() for tensor in (q, k, v)]
        want = torch.autograd.grad(loss(variant, "reference", **call)(*leaves), leaves)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one[i], other)
    function = loss(variant, **call)
    _, slope = torch.func.jvp(lambda q: function(q, k[2], v[2]), (q[2],), (tangent,))
    torch.testing.assert_close(slope, (want[0] * tangent).sum())
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(q[2], tangent), k[2], v[2])
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, slope)


def test_hessians_and_jacobians_agree():
    q, k, v = qkv()
    for variant in ("softpick", "softmax", "sparsemax"):
        whole = loss(variant, causal=True)

        def function(q, whole=whole):
            return whole(q, k, v)

        leaf = q.clone().requires_grad_()
        want = torch.autograd.functional.hessian(function, leaf)
        for transform in (torch.func.hessian(function),
                          torch.func.jacrev(torch.func.jacrev(function)),
                          torch.func.jacrev(torch.func.jacfwd(function))):  # fmt: skip
            torch.testing.assert_close(transform(q), want)


def test_masks_learned_options_and_slopes_are_mapped():
    q, k, v = qkv(3)
    cases = (
        ("ssmax", {"s": random(3, 4, seed=8)}),
        ("lssa", {"attn_mask": random(3, 1, 1, 1, 5, seed=4) > -0.5}),
        (
            "relu",
            {"attn_mask": random(3, 4, 5, seed=4).masked_fill(random(3, 4, 5) > 1, -torch.inf)},
        ),
        ("softpick", {"alibi_slopes": random(3, 4).abs(), "bias": random(3, 4, 5)}),
    )
    for variant, mapped in cases:
        names = list(mapped)

        def run(q, k, v, *rest, variant=variant, names=names):
            call = dict(zip(names, rest, strict=True))
            return attention(q, k, v, variant, return_weights=True, return_stats=True, **call)

        for shared in (False, True):
            dims = (0, None if shared else 0, 0, *(0 for _ in names))
            got = torch.func.vmap(run, in_dims=dims)(q, k[0] if shared else k, v, *mapped.values())
            for i in range(3):
                want = run(q[i], k[0 if shared else i], v[i], *(t[i] for t in mapped.values()))
                for one, other in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
                    torch.testing.assert_close(one[i], other)


def test_dropout_under_vmap_follows_its_randomness():
    q, k, v = qkv()

    def run(q):
        return attention(q, k, v, "softpick", dropout_p=0.5)

    many = q.expand(3, *q.shape)
    same = torch.func.vmap(run, randomness="same")(many)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(run, randomness="different")(many)
    assert not torch.equal(different[0], different[1])


def dual(function, q):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(q[0], q[1]))


TRANSFORMS = {
    "vmap": lambda function, q: torch.func.vmap(function)(q),
    "grad": lambda function, q: torch.func.grad(function)(q[0]),
    "jvp": lambda function, q: torch.func.jvp(function, (q[0],), (q[1],)),
    "forward": dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("impl", ["chunked", "sdpa"])
def test_a_named_engine_refuses_what_it_cannot_do(transform, impl):
    q, k, v = qkv(2)

    def function(q):
        return attention(q, k[0], v[0], "softmax", impl=impl).sum()

    if impl == "sdpa" and transform in ("vmap", "grad"):
        TRANSFORMS[transform](function, q)
        return
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot run .*Use impl='reference'"):
        TRANSFORMS[transform](function, q)


def test_explain_names_the_transform():
    q, k, v = qkv(2)
    seen = []

    def run(q):
        seen.append(explain(q, k[0], v[0], "softpick"))
        return q.sum()

    torch.func.vmap(torch.func.grad(run))(q)
    assert seen[0].engine == "reference"
    assert "torch.func's vmap of torch.func's grad" in str(seen[0])


def test_weights_block_by_block_under_vmap():
    q, k, _ = qkv(3)

    def total(q, k):
        blocks = list(iter_weights(q, k, "softpick", causal=True))
        return sum(block.weights.sum() for block in blocks)

    got = torch.func.vmap(total)(q, k)
    torch.testing.assert_close(got, torch.stack([total(*pair) for pair in zip(q, k, strict=True)]))


def test_packed_sequences_and_drop_ins_under_transforms():
    x, bounds = random(3, 7, 2, 3), torch.tensor([0, 3, 7])

    def run(x):
        packed = attention_varlen(x, x, x, bounds, bounds, variant="lssa", causal=True)
        four = x[None]
        flash = attnvariants.flash_attn_func(four, four, four, variant="lssa", causal=True)
        torch_s = attnvariants.scaled_dot_product_attention(four, four, four, variant="lssa")
        return (packed + flash[0] * 2 + torch_s[0] * 3).sin().sum()

    got = torch.func.vmap(torch.func.grad(run))(x)
    for i in range(3):
        leaf = x[i].clone().requires_grad_()
        torch.testing.assert_close(got[i], torch.autograd.grad(run(leaf), leaf)[0])
    with pytest.raises(ValueError, match="must be the same for all that vmap maps"):
        torch.func.vmap(lambda b: attention_varlen(x[0], x[0], x[0], b, b, variant="lssa"))(
            bounds.expand(2, 3)
        )


def test_make_fx_records_operators():
    q, k, v = qkv()
    graph = make_fx(lambda q: attention(q, k, v, "softpick", causal=True))(q)
    assert "chunked_forward" in str(graph.graph)
    torch.testing.assert_close(graph(-q), attention(-q, k, v, "softpick", causal=True))


def test_patched_models_under_transforms():
    transformers = pytest.importorskip("transformers")
    model = model_of(transformers)
    attnvariants.patch(model, "ssmax")
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def run(parameters, ids, mask):
        call = {"input_ids": ids[None], "attention_mask": mask[None], "use_cache": False}
        logits = torch.func.functional_call(model, parameters, (), call).logits
        return (logits[0] * mask[:, None]).sin().sum()

    each = torch.func.vmap(torch.func.grad(run), in_dims=(None, 0, 0))(parameters, ids, mask)
    total = sum(run(dict(model.named_parameters()), *pair) for pair in zip(ids, mask, strict=True))
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)


def model_of(transformers):
    import tiny

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SMALL)).eval()


PLACES = {"fake": FakeTensorMode, "meta": lambda: torch.device("meta")}
KINDS = {
    "plain": lambda: {"causal": True},
    "bool": lambda: {"attn_mask": torch.ones(2, 1, 1, 5, dtype=torch.bool), "causal": True},
    "float": lambda: {"attn_mask": torch.zeros(4, 5)},
    "window": lambda: {"window_size": (2, 1), "softcap": 2.0},
    "bias": lambda: {"bias": torch.zeros(4, 4, 5), "alibi_slopes": torch.ones(4)},
    "dropout": lambda: {"dropout_p": 0.5},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_values_have_shapes(place, kind):
    for variant in VARIANTS:
        for impl in ("auto", "reference", "chunked"):
            with PLACES[place]():
                call = KINDS[kind]()
                if variant == "cosformer" and kind in ("float", "window", "bias"):
                    continue
                q = torch.empty(2, 4, 4, 8, dtype=torch.bfloat16, requires_grad=True)
                k = torch.empty(2, 2, 5, 8, dtype=torch.bfloat16)
                v = torch.empty(2, 2, 5, 6, dtype=torch.bfloat16)
                more = {"return_weights": True, "return_stats": True}
                out, weights, stats = attention(q, k, v, variant, impl=impl, **more, **call)
                (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
                second = torch.autograd.grad(grad.sum(), q)[0] if kind == "bool" else grad
                assert explain(q, k, v, variant, impl=impl, **call).engine != "none"
            assert (out.shape, out.dtype, out.device) == ((2, 4, 4, 6), q.dtype, q.device)
            assert (weights.shape, weights.dtype) == ((2, 4, 4, 5), torch.float32)
            assert [part.shape for part in stats] == [(2, 4, 4)] * 4
            assert grad.shape == second.shape == q.shape


@pytest.mark.parametrize("place", PLACES)
def test_the_rest_of_the_calls_have_shapes_too(place):
    with PLACES[place]():
        x = torch.empty(7, 4, 8)
        bounds = torch.zeros(3, dtype=torch.int32)
        for variant in VARIANTS:
            out, stats = attention_varlen(
                x, x, x, bounds, bounds, variant=variant, causal=True, return_stats=True
            )
            assert out.shape == x.shape
            assert stats.mass.shape == (4, 7)
            assert explain(x, x, x, variant, cu_seqlens_q=bounds, cu_seqlens_k=bounds).engine
            four = x[None]
            out = attnvariants.flash_attn_func(four, four, four, variant=variant)
            assert out.shape == four.shape
            swapped = four.transpose(1, 2)
            assert sum(b.weights.shape[2] for b in iter_weights(swapped, swapped, variant)) == 7
        with pytest.raises(ValueError, match="return_weights must be False"):
            attention_varlen(x, x, x, bounds, bounds, return_weights=True)


def test_fake_tensors_outside_of_their_mode():
    mode = FakeTensorMode()
    q, k, v = (mode.from_tensor(tensor) for tensor in qkv())
    for variant in VARIANTS:
        assert attention(q, k, v, variant, causal=True).shape == (1, 4, 4, 2)


def test_real_tensors_within_a_fake_mode():
    q, k, v = qkv()
    mask = random(4, 5) > 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        for variant in VARIANTS:
            out = attention(q, k, v, variant, attn_mask=mask, dropout_p=0.5)
            assert out.shape == (1, 4, 4, 2)


@pytest.mark.parametrize("variant", ["softmax", "softpick", "lssa", "cosformer"])
def test_patched_models_have_shapes(variant):
    transformers = pytest.importorskip("transformers")
    for place in PLACES.values():
        with place():
            model = model_of(transformers)
            attnvariants.patch(model, variant)
            ids = torch.ones(2, 6, dtype=torch.int64)
            for mask in (None, torch.ones_like(ids)):
                logits = model(input_ids=ids, attention_mask=mask).logits
                assert logits.shape == (2, 6, 99)
