"""Real training, in seconds: a layer that mostly has nothing to say needs a sink under softmax.

Trigger-conditional averaging (after arXiv:2603.11487): at a trigger the layer must give the mean
of the vectors before it, elsewhere zero. Softmax can only stay silent by attending to a token
with nothing in it, the first one; softpick can give its rows no weight.
"""

import pytest
import torch
from torch import nn

from attnvariants import attention

CONTENT, TOKENS, BATCH, STEPS = 14, 16, 64, 500


class Layer(nn.Module):
    def __init__(self, variant):
        super().__init__()
        self.variant = variant
        self.qkv = nn.Linear(CONTENT + 2, 3 * 16)
        self.out = nn.Linear(16, CONTENT, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        y, weights = attention(
            q, k, v, self.variant, causal=True, impl="chunked", return_weights=True
        )
        return self.out(y.squeeze(1)), weights.squeeze(1)


def batch(generator):
    content = torch.randn(BATCH, TOKENS, CONTENT, generator=generator)
    content[:, 0] = 0
    trigger = torch.rand(BATCH, TOKENS, generator=generator) < 0.25
    trigger[:, :2] = False
    first = torch.zeros(BATCH, TOKENS)
    first[:, 0] = 1
    before = (content.cumsum(1) - content) / (torch.arange(TOKENS) - 1).clamp(min=1).view(-1, 1)
    target = before * trigger.unsqueeze(-1)
    return (
        torch.cat([content, 2 * trigger.unsqueeze(-1), 2 * first.unsqueeze(-1)], -1),
        trigger,
        target,
    )


def idle_weight_on_the_first_token(variant, seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layer = Layer(variant)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x, _, target = batch(generator)
        loss = (layer(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, trigger, target = batch(generator)
    with torch.no_grad():
        y, weights = layer(x)
    error = (y - target).square().mean() / target.square().mean()
    idle = ~trigger
    idle[:, 0] = False
    return float(weights[..., 0][idle].mean()), float(error)


@pytest.mark.parametrize("seed", [0, 1])
def test_softmax_parks_its_weight_and_softpick_does_not(seed):
    on_first, error = idle_weight_on_the_first_token("softmax", seed)
    assert error < 0.15
    assert on_first > 0.8
    on_first, error = idle_weight_on_the_first_token("softpick", seed)
    assert error < 0.15
    assert on_first < 0.1
