"""Dropout: reproducible, the same in every engine, right in expectation and in the gradient."""

import pytest
import torch

from attnvariants import attention, blocks
from attnvariants.dropout import philox


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_philox_known_answers():
    # Philox4x32-10 test vectors of Random123 (Salmon et al., 2011), counter (c, 0, 0, 0), key 0
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0, torch.tensor([0])).tolist() == [words]


@pytest.mark.parametrize("name", ["softmax", "softpick", "relu"])
def test_engines_drop_the_same(name, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 4)
    leaves = [torch.randn(2, 4, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    results = []
    for impl in ("reference", "chunked"):
        out, w = attention(
            *leaves, name, causal=True, dropout_p=0.4, generator=seeded(), impl=impl,
            return_weights=True,
        )  # fmt: skip
        torch.testing.assert_close(w @ leaves[2], out)
        results.append([out, w, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_rate_and_expectation():
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    full, w = attention(q, k, v, return_weights=True)
    _, dropped = attention(q, k, v, dropout_p=0.25, generator=seeded(), return_weights=True)
    kept = dropped != 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    torch.testing.assert_close(dropped[kept], w[kept] / 0.75)
    runs = [attention(q, k, v, dropout_p=0.25, generator=seeded(i)) for i in range(200)]
    assert float((torch.stack(runs).mean(0) - full).abs().max()) < 0.2


def test_seeds():
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))

    def run(generator=None):
        return attention(q, k, v, dropout_p=0.5, generator=generator)

    assert torch.equal(run(seeded(1)), run(seeded(1)))
    assert not torch.equal(run(seeded(1)), run(seeded(2)))
    torch.manual_seed(3)
    first = run()
    assert not torch.equal(first, run())
    torch.manual_seed(3)
    assert torch.equal(first, run())
    assert torch.equal(attention(q, k, v, dropout_p=1.0), torch.zeros_like(q))
