"""What the sink experiment measures, from a model's logits and attention weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

METRICS = {
    "loss": "cross-entropy of the next token on held-out sequences, in nats",
    "excess_loss": "loss above that of the process which made the sequences; 0 is perfect",
    "copy_accuracy": "share of the tokens after a trigger that are predicted right",
    "sink_rate": (
        "share of sequences whose raw weight on token 0, averaged over all queries, exceeds 0.3 "
        "(arXiv:2410.10781)"
    ),
    "sink_rate_without_query_0": (
        "the sink rate without query 0, which sees nothing but token 0 and so has no choice"
    ),
    "sink_share": "weight on token 0 over all weight, queries from 1 on: rows count by their mass",
    "row_mass": "mean sum of a row's weights; 1 for softmax",
    "sparsity": "share of exact zeros among the weights of visible keys",
    "entropy": "mean entropy in nats of the rows, each divided by its sum; empty rows left out",
}
SINK_THRESHOLD = 0.3


@torch.no_grad()
def measure_sinks(
    model: nn.Module, tokens: Tensor, copied: Tensor, nats: Tensor
) -> tuple[dict[str, float], Tensor]:
    """Metrics (see `METRICS`) of a language model on sequences, and its map of the first one."""
    out = model(tokens[:, :-1], output_attentions=True)
    targets = tokens[:, 1:]
    right = out.logits.argmax(-1) == targets
    loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten()).item()
    metrics = {
        "loss": loss,
        "excess_loss": loss - nats[:, 1:].mean().item(),
        "copy_accuracy": right[copied[:, 1:]].double().mean().item(),
    }
    weights = out.attentions[0]
    return metrics | weight_metrics(weights), weights[0, 0]


def weight_metrics(weights: Tensor) -> dict[str, float]:
    """Metrics of causal attention weights `[batch, heads, length, length]`; see `METRICS`."""
    weights = weights.double()
    at_first, size = weights[..., 0], weights.abs().sum(-1)
    visible = torch.ones(weights.shape[-2:], dtype=torch.bool).tril()
    live = size > 1e-6
    shares = weights.abs() / size.clamp(min=1e-6)[..., None]
    entropy = torch.special.entr(shares).sum(-1)[live]
    figures = {
        "sink_rate": (at_first.mean(-1) > SINK_THRESHOLD).double().mean(),
        "sink_rate_without_query_0": (
            (at_first[..., 1:].mean(-1) > SINK_THRESHOLD).double().mean()
        ),
        "sink_share": at_first[..., 1:].abs().sum() / size[..., 1:].sum().clamp(min=1e-12),
        "row_mass": weights.sum(-1).mean(),
        "sparsity": (weights == 0)[..., visible].double().mean(),
        "entropy": entropy.mean() if entropy.numel() else entropy.sum(),
    }
    return {name: value.item() for name, value in figures.items()}
