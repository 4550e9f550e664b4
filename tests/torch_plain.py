"""Plain low-precision torch, the yardstick of the error rule: every step rounds to the dtype."""

import torch

from attnvariants import get_variant
from attnvariants.registry import Rows


def plain_attention(query, key, value, name, **options):
    """Causal attention by a variant's own formula, in the dtype of the inputs throughout."""
    variant, dtype = get_variant(name), query.dtype
    options = variant.resolve(options)
    tokens, dim = query.shape[-2:]
    visible = torch.arange(1, tokens + 1, dtype=dtype).view(1, 1, -1, 1)
    rows = Rows(visible, tokens, tokens, 0)
    if variant.prepare is not None:
        query, key = (x.to(dtype) for x in variant.prepare(query, key, rows, **options))
    scale = dim**-0.5 if variant.scale is None else variant.scale
    scores = query @ key.transpose(-1, -2) * scale
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    shown = scores.masked_fill(hidden, variant.hidden_score(options))
    numerator, denominator = variant.ratio(shown, rows, **options)
    if denominator is not None:
        numerator = numerator / denominator.masked_fill(denominator == 0, 1)
    return numerator.masked_fill(hidden, 0).to(dtype) @ value
