"""Fused sparsemax: thresholds against a sort in float64, few sweeps, and tiles that are skipped."""

import pytest
import torch

pytest.importorskip("triton")

from engines import kernels_run

from attnvariants import attention, attention_varlen
from attnvariants.variants.sparsemax import HOOKS
from attnvariants_kernels import streaming, threshold_plan
from attnvariants_kernels._triton import INTERPRETED

pytestmark = kernels_run
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


def by_sort(scores):
    z, _ = scores.sort(-1, descending=True)
    k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    total = z.cumsum(-1)
    size = (1 + k * z > total).sum(-1, keepdim=True)
    return (scores - (total.gather(-1, size - 1) - 1) / size).relu()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Scored:
    """A call whose scores are given: they are the bias of a query of zeros."""

    def __init__(self, scores, width=16):
        rows, keys = scores.shape
        self.scores = scores.to(DEVICE)
        self.q = torch.zeros(1, 1, rows, 16, device=DEVICE)
        self.k = torch.zeros(1, 1, keys, 16, device=DEVICE)
        self.v = normal(1, 1, keys, width)
        self.call = streaming.Call(scale=1.0, bias=self.scores[None, None])

    def forward(self):
        return streaming.forward(self.q, self.k, self.v, self.call, HOOKS)

    def backward(self, grad_out, out, saved):
        return streaming.backward(
            grad_out, self.q, self.k, self.v, out, saved, self.call, HOOKS, True
        )

    def sweeps(self):
        """(sweeps, tiles visited) of the first block of rows, and the tiles of one sweep."""
        config = streaming.solver_configs(self.q, self.k, self.v, self.call)[0]
        found = torch.zeros(self.q.shape[2], 2, dtype=torch.int32, device=DEVICE)
        saved = torch.zeros(4, 1, 1, self.q.shape[2], device=DEVICE)
        streaming.plan_solve(self.q, self.k, self.v, saved, self.call, HOOKS, config, found).run()
        return *found[0].tolist(), -(-self.k.shape[2] // config.block_n)

    def visits(self, kernel, out, saved):
        """Tiles that a kernel goes through, of how many."""
        sizes = self.q.shape[2], self.k.shape[2]
        config = streaming.configs(kernel, "sm_90", self.q, self.v, HOOKS, *sizes)[0]
        plan = streaming.plan_forward(self.q, self.k, self.v, out, saved, self.call, HOOKS, config)
        if kernel == "dkv":
            grads = streaming.Grads(saved, self.q, self.k, self.v, None, None)
            plan = streaming.plan_backward(
                kernel, self.q, self.k, self.v, out, saved, out, grads, self.call, HOOKS, config
            )
        lists, listed = streaming.with_lists(kernel, plan, self.v, saved, self.call, HOOKS)
        lists.run()
        total = -(-sizes[0] // config.block_m) * -(-sizes[1] // config.block_n)
        return int(listed.arguments["extra"].tiles.counts.sum()), total


KEYS = 400
ROWS = {
    "gaussian": normal(16, KEYS),
    "far from zero": normal(16, KEYS) + 1e4,
    "huge": normal(16, KEYS) * 1e4,
    "equal": torch.zeros(16, KEYS),
    "ties": (torch.arange(KEYS) % 5).float().repeat(16, 1),
    "ties at tau": -(torch.arange(KEYS) % 2).float().repeat(16, 1),
    "one dominates": normal(16, KEYS).index_fill(1, torch.tensor([17], device=DEVICE), 50.0),
    "broad": normal(16, KEYS) * 0.01,
    "geometric": -(2.0 ** -torch.arange(40.0)).flip(0).repeat(16, 10),
    "slow decay": -(0.98 ** torch.arange(KEYS)).repeat(16, 1),
    "mixed": normal(16, KEYS) * torch.tensor([0.02, 10.0], device=DEVICE).repeat(8)[:, None],
}


@pytest.mark.parametrize("rows", ROWS)
def test_thresholds_and_gradients(rows):
    scored = Scored(ROWS[rows])
    s = scored.scores.double().requires_grad_()
    v = scored.v[0, 0].double().requires_grad_()
    want = by_sort(s) @ v
    out, saved = scored.forward()
    grad_out = normal(*out.shape, seed=1)
    ds, dv = torch.autograd.grad(want, (s, v), grad_out[0, 0].double())
    got = scored.backward(grad_out, out, saved)
    for found, expected in ((out, want), (got[3], ds), (got[2], dv)):
        error = (found[0, 0].double() - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max().clamp(min=1)
    # values that are all one sum the weights
    scored.v = torch.ones_like(scored.v)
    assert (scored.forward()[0] - 1).abs().max() < 2e-6
    # exact zeros: no gradient at all outside of the support
    assert (got[3][0, 0][by_sort(scored.scores.double()) == 0] == 0).all()


def test_few_sweeps_on_gaussian_scores():
    sweeps, visited, tiles = Scored(normal(16, 2048)).sweeps()
    assert sweeps <= 4
    assert visited <= 4 * tiles


def test_rows_with_too_many_candidates_sweep_on():
    scores = normal(16, KEYS) * 0.02
    assert int((by_sort(scores) > 0).sum(-1).max()) > threshold_plan.CANDIDATES
    assert Scored(scores).sweeps()[0] > 2


def test_tiles_without_support_are_skipped():
    position = torch.arange(256.0)
    scored = Scored(-(position[:, None] - position).abs())
    out, saved = scored.forward()
    for kernel in "forward", "dkv":
        visited, tiles = scored.visits(kernel, out, saved)
        assert visited < tiles / 2
    sweeps, visited, tiles = scored.sweeps()
    assert visited < (1 + 0.6 * sweeps) * tiles


def test_bitwise_repeatable():
    scored = Scored(normal(33, 100))

    def run():
        out, saved = scored.forward()
        return out, *scored.backward(normal(*out.shape, seed=1), out, saved)[:4]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def both(call):
    """Output and gradients of the kernels and of the reference."""
    results = []
    for impl in "triton", "reference":
        leaves = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(call.shapes)]
        out = call(*leaves, impl)
        results.append([out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=4))])
    return zip(*results, strict=True)


def test_grouped_heads_of_odd_lengths_with_dropout():
    def call(q, k, v, impl):
        generator = torch.Generator().manual_seed(3)
        return attention(
            q, k, v, "sparsemax", causal=True, dropout_p=0.3, generator=generator, impl=impl
        )

    call.shapes = (1, 4, 45, 24), (1, 2, 61, 24), (1, 2, 61, 8)
    for found, expected in both(call):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_packed_sequences():
    cu_q = torch.tensor([0, 37, 37, 38, 61], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor([0, 40, 41, 60, 61], dtype=torch.int32, device=DEVICE)

    def call(q, k, v, impl):
        return attention_varlen(q, k, v, cu_q, cu_k, variant="sparsemax", causal=True, impl=impl)

    call.shapes = (61, 2, 16), (61, 1, 16), (61, 1, 16)
    for found, expected in both(call):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
