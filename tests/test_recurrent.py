"""Decoding with a state: the same as attention of the whole, on any engine."""

import pytest
import torch
from engines import KERNELS_RUN, kernels_run

import attnvariants
from attnvariants import Variant, attention, recurrent
from attnvariants.testing import make_inputs, pad
from attnvariants_kernels._triton import INTERPRETED

DEVICE = "cuda" if KERNELS_RUN and not INTERPRETED else "cpu"
PREFILLS = [0, 1, 5, 131]


def decoded(q, k, v, length, sizes=(1, 1, 1), **call):
    """Prefill of so many tokens, then steps of these sizes."""
    parts = [slice(0, length)]
    for size in sizes:
        parts.append(slice(parts[-1].stop, parts[-1].stop + size))
    cuts = [[x[:, :, part] for x in (q, k, v)] for part in parts]
    out, state = recurrent.prefill(*cuts[0], **call)
    outs = [out]
    for cut in cuts[1:]:
        out, state = recurrent.step(*cut, state)
        outs.append(out)
    return torch.cat(outs, 2), state


def inputs(tokens, dtype=torch.float64, **sizes):
    sizes = {"heads": 4, "kv_heads": 2, "value_dim": 6, **sizes}
    return [x.to(DEVICE, dtype) for x in make_inputs(q_len=tokens, kv_len=tokens, **sizes)]


def whole(q, k, v, max_len, mask=None, **call):
    mask = None if mask is None else mask[:, None, None]
    q, k, v = (x.double() for x in (q, k, v))
    return attention(
        q, k, v, "cosformer", causal=True, max_len=max_len, attn_mask=mask, impl="reference", **call
    )


@pytest.mark.parametrize("length", PREFILLS)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_token_by_token_is_the_whole(length, dtype, within):
    tensors = inputs(length + 3, dtype)
    found, state = decoded(*tensors, length, max_len=300, impl="chunked")
    want = whole(*tensors, 300)
    assert found.dtype == dtype
    assert float((found - want).abs().max()) <= within
    assert state.position == length + 3
    assert state.memory.shape == (2, 2, 16, 6)
    assert state.total.shape == (2, 2, 16)
    assert state.memory.dtype == dtype


def test_a_step_takes_several_tokens():
    tensors = inputs(150)
    found, _ = decoded(*tensors, 3, sizes=(2, 1, 140, 0, 4), max_len=150)
    assert float((found - whole(*tensors, 150)).abs().max()) <= 1e-9


def test_padding_on_the_left():
    q, k, v = inputs(9)
    mask = pad(9, 5, kv_len=9, left=True)[:, 0, 0]
    mask = mask.to(DEVICE)
    want = whole(q, k, v, 64, mask)
    # what is hidden is never read
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    found, state = decoded(q, k, v, 6, max_len=64, key_mask=mask[:, :6])
    assert float((found - want).abs().max()) <= 1e-9
    # what the distances make of it: a sequence alone, not padded
    alone = [x[1:, :, 4:] for x in (q, k, v)]
    assert float((whole(*alone, 64) - found[1:, :, 4:]).abs().max()) <= 1e-9
    assert state.position == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_state_of_single(dtype):
    tensors = inputs(40, dtype)
    found, state = decoded(*tensors, 37, max_len=64)
    assert found.dtype == dtype
    assert state.memory.dtype == state.total.dtype == torch.float32
    torch.testing.assert_close(found, whole(*tensors, 64).to(dtype), rtol=2e-2, atol=2e-2)


def test_the_scale_is_kept():
    # far enough down that the clamp of the sum bites
    tensors = inputs(6)
    found, _ = decoded(*tensors, 3, max_len=64, scale=1e-7)
    want = whole(*tensors, 64, scale=1e-7)
    assert float(want.abs().max()) < 0.5 * float(whole(*tensors, 64).abs().max())
    assert float((found - want).abs().max()) <= 1e-9


def test_gradients_flow_through_plain_torch():
    leaves = [x.requires_grad_() for x in inputs(8)]
    found, _ = decoded(*leaves, 5, max_len=64)
    grad = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(whole(*leaves, 64), leaves, grad),
        strict=True,
    ):
        assert float((one - other).abs().max()) <= 1e-9


def test_a_state_is_left_as_it_was_and_can_be_rearranged():
    q, k, v = inputs(4)
    _, state = recurrent.prefill(q[:, :, :3], k[:, :, :3], v[:, :, :3], max_len=8)
    before = state.memory.clone()
    last = [x[:, :, 3:] for x in (q, k, v)]
    first, _ = recurrent.step(*last, state)
    assert torch.equal(state.memory, before)
    beams = torch.tensor([1, 0, 1], device=DEVICE)
    swapped = state._replace(memory=state.memory[beams], total=state.total[beams])
    out, _ = recurrent.step(*(x[beams] for x in last), swapped)
    torch.testing.assert_close(out, first[beams])


def test_a_linear_variant_of_ones_own():
    mine = Variant(
        doc="",
        ratio=lambda scores, rows: (scores, scores.sum(-1, keepdim=True).clamp(min=0.5)),
        prepare=lambda query, key, rows: (query.exp(), key.exp()),
        hidden=0.0,
        linear_eps=0.5,
    )
    q, k, v = inputs(7)
    found, _ = decoded(q, k, v, 4, variant=mine, max_len=7)
    want = attention(q, k, v, mine, causal=True, impl="reference")
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_a_step_compiles_once_for_all_positions():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    q, k, v = inputs(9)
    out, state = recurrent.prefill(q[:, :, :3], k[:, :, :3], v[:, :, :3], max_len=64)
    compiled = torch.compile(recurrent.step, fullgraph=True, backend=backend)
    outs = [out]
    for i in range(3, 9):
        out, state = compiled(*(x[:, :, i : i + 1] for x in (q, k, v)), state)
        outs.append(out)
    assert float((torch.cat(outs, 2) - whole(q, k, v, 64)).abs().max()) <= 1e-9
    # the first is for one position, the second for any
    assert len(graphs) == 2


def test_autocast():
    q, k, v = inputs(5, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, state = decoded(q, k, v, 3, max_len=64)
    want, _ = decoded(*(x.bfloat16() for x in (q, k, v)), 3, max_len=64)
    assert torch.equal(found, want)
    assert state.memory.dtype == torch.float32


@kernels_run
@pytest.mark.parametrize("length", [0, 1, 40])
def test_kernels_prefill(length, monkeypatch):
    from attnvariants_kernels import linear

    calls = []

    def spy(*args, _forward=linear.forward, **call):
        calls.append(call)
        return _forward(*args, **call)

    monkeypatch.setattr(linear, "forward", spy)
    tensors = inputs(length + 2, torch.float32, heads=2, kv_heads=1)
    mask = torch.ones(2, length + 2, dtype=torch.bool, device=DEVICE)
    mask[1, : length // 3] = False
    call = {"max_len": 64, "key_mask": mask[:, :length]}
    found, state = decoded(*tensors, length, (1, 1), impl="triton", **call)
    assert len(calls) == 1
    assert float((found - whole(*tensors, 64, mask)).abs().max()) <= 1e-5
    _, plain = decoded(*tensors, length, (1, 1), impl="chunked", **call)
    for one, other in zip(state[:2], plain[:2], strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@kernels_run
def test_kernels_have_no_gradient_here():
    leaves = [x.requires_grad_() for x in inputs(3, torch.float32)]
    with pytest.raises(ValueError, match=r"gives a state no gradient; call prefill under"):
        recurrent.prefill(*leaves, max_len=8, impl="triton")
    with torch.no_grad():
        out, _ = recurrent.prefill(*leaves, max_len=8, impl="triton")
    assert not out.requires_grad


def test_is_a_submodule_imported_on_demand():
    assert attnvariants.recurrent is recurrent
    assert "recurrent" in dir(attnvariants)


def test_going_past_max_len():
    q, k, v = inputs(5)
    with pytest.raises(ValueError, match=r"5 tokens from position 0 on go past max_len 4"):
        recurrent.prefill(q, k, v, max_len=4)
    _, state = recurrent.prefill(q, k, v, max_len=5)
    one = [x[:, :, :1] for x in (q, k, v)]
    with pytest.raises(
        ValueError, match=r"^1 token from position 5 on goes past max_len 5"
    ) as caught:
        recurrent.step(*one, state)
    assert str(caught.value).endswith("prefill with max_len >= 6.")


WRONG = {
    "max_len": ({"max_len": None}, "max_len must be an integer >= 1"),
    "max_len 0": ({"max_len": 0}, "got 0"),
    "softmax": ({"variant": "softmax"}, "softmax cannot be decoded with a state"),
    "name": ({"variant": "cosfomer"}, "did you mean 'cosformer'"),
    "impl": ({"impl": "tritn"}, "unknown impl 'tritn'"),
    "sdpa": ({"impl": "sdpa"}, "cannot run this call"),
    "option": ({"power": 2}, "cosformer takes max_len; got 'power'"),
    "scale": ({"scale": -1.0}, "scale must be >= 0"),
    "mask": ({"key_mask": torch.ones(2, 5)}, "key_mask must be a bool tensor"),
    "mask shape": ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, r"\[2, 5\], got \[2, 4\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_prefills(case):
    call, sentence = WRONG[case]
    with pytest.raises(ValueError, match=sentence) as caught:
        recurrent.prefill(*inputs(5), **{"max_len": 64, **call})
    assert "\n" not in str(caught.value)


def test_wrong_sizes():
    q, k, v = inputs(5)
    with pytest.raises(ValueError, match="as many tokens, those that are new, got 2 and 5"):
        recurrent.prefill(q[:, :, :2], k, v, max_len=64)
    _, state = recurrent.prefill(q, k, v, max_len=64)
    one = [x[:, :, :1] for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"must be as at the prefill.*= \[2, 2, 16, 6\]"):
        recurrent.step(one[0][:1], one[1][:1], one[2][:1], state)
    with pytest.raises(ValueError, match=r"torch\.float32 on"):
        recurrent.step(*(x.float() for x in one), state)
