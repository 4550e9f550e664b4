"""The figures of the diagnostics from their definitions, with loops over dense weights."""

import math

import torch


def visible(shape, causal=False, window_size=None, attn_mask=None, **_):
    """[batch, heads, q_len, kv_len] bool, from the definition."""
    _, _, q_len, kv_len = shape
    distance = torch.arange(kv_len) - (torch.arange(q_len)[:, None] + kv_len - q_len)
    keep = torch.ones(shape, dtype=torch.bool)
    if causal:
        keep &= distance <= 0
    if window_size is not None:
        keep &= distance >= -window_size[0]
    return keep if attn_mask is None else keep & attn_mask


def brute_force(weights, keep, out=None, query_mask=None, threshold=0.3):
    """Every figure from its sentence, with loops."""
    batch, heads, q_len, _ = weights.shape
    figures = {name: [] for name in (
        "sink_rate", "sink_rate_without_query_0", "sink_rate_proportional", "sink_share",
        "sink_weight", "row_mass", "dead_rows", "entropy", "sparsity", "dead_tokens", "dead_head",
    )}  # fmt: skip

    def mean(numbers):
        return sum(numbers) / len(numbers) if numbers else 0.0

    for h in range(heads):
        sinks, choosing, proportional, alphas = [], [], [], []
        on_sink = over_all = 0.0
        masses, dead, entropies, zeros, silent = [], [], [], [], []
        for b in range(batch):
            rows = [
                i for i in range(q_len)
                if keep[b, h, i].any() and (query_mask is None or query_mask[b, i])
            ]  # fmt: skip
            if not rows:
                continue
            token_0 = min(int(keep[b, h, i].nonzero()[0]) for i in rows)
            seeing = [i for i in rows if keep[b, h, i, token_0]]
            later = [i for i in seeing if keep[b, h, i].sum() > 1]
            alpha = mean([float(weights[b, h, i, token_0]) for i in seeing])
            alphas.append(alpha)
            sinks.append(alpha > threshold)
            if later:
                choosing.append(mean([float(weights[b, h, i, token_0]) for i in later]) > threshold)
            shares = []
            for i in rows:
                w = weights[b, h, i]
                total = float(w.abs().sum())
                masses.append(float(w.sum()))
                dead.append(total < 1e-6)
                zeros += [float(x) == 0.0 for x in w[keep[b, h, i]]]
                if i in later:
                    on_sink += abs(float(w[token_0]))
                    over_all += total
                if total >= 1e-6:
                    p = [abs(float(x)) / total for x in w]
                    entropies.append(-sum(x * math.log(x) for x in p if x > 0))
                    if i in seeing:
                        shares.append(p[token_0])
                if out is not None:
                    silent.append(float(out[b, h, i].abs().max()) < 1e-6)
            proportional.append(mean(shares) > threshold)
        for name, value in (
            ("sink_rate", mean(sinks)),
            ("sink_rate_without_query_0", mean(choosing)),
            ("sink_rate_proportional", mean(proportional)),
            ("sink_share", on_sink / over_all if over_all else 0.0),
            ("sink_weight", mean(alphas)),
            ("row_mass", mean(masses)),
            ("dead_rows", mean(dead)),
            ("entropy", mean(entropies)),
            ("sparsity", mean(zeros)),
            ("dead_tokens", mean(silent)),
            ("dead_head", float(bool(silent) and mean(silent) >= 0.95)),
        ):
            figures[name].append(value)
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def check(found, expected, tolerance=1e-10):
    """Compare all figures of `AttentionMetrics` with a mapping of expected ones."""
    for name, value in found.figures().items():
        assert value.dtype == torch.float64
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)
