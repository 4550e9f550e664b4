"""Row-by-row float64 oracles, written from the papers' formulas and sharing no code with us.

Each row gathers its visible keys first, so there is no masking anywhere: what a formula says of a
set of scores is computed on exactly that set.
"""

import math

import torch


def softmax(x, n, q_len, kv_len):
    return torch.softmax(x, 0)


def softpick(x, n, q_len, kv_len, eps=1e-6):
    m = max(float(x.detach().max()), 0.0)
    e = torch.exp(x - m) - math.exp(-m)
    return e.relu() / (e.abs().sum() + eps)


def lssa(x, n, q_len, kv_len):
    w = torch.log1p(torch.exp(x))
    return w / w.sum()


def lssar(x, n, q_len, kv_len, p=15.0, offset=1.0, exempt_rows=3):
    u = n * lssa(x, n, q_len, kv_len) - (0.0 if n <= exempt_rows else offset)
    if not bool((u > 0).any()):
        return u * 0
    r = u.relu() / u.detach().max()
    return r**p / (r**p).sum()


def sa_softmax(x, n, q_len, kv_len, form="minmax0", detach_minmax=False):
    if form == "x":
        return x * torch.softmax(x, 0)
    source = x.detach() if detach_minmax else x
    a, b = source.min().clamp(max=0), source.max().clamp(min=0)
    return (x - a) / (b - a + 1e-10) * torch.softmax(x, 0)


ACTS = {
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
    "relu6": lambda x: x.clamp(0, 6),
    "softplus": lambda x: torch.log1p(torch.exp(x)),
    "sigmoid": torch.sigmoid,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x * torch.sigmoid(x),
    "identity": lambda x: x,
}


def relu(x, n, q_len, kv_len, act="relu", length="visible", power=1.0):
    size = {"visible": n, "kv": kv_len}.get(length, length)
    return ACTS[act](x) / size**power


def sparsemax(x, n, q_len, kv_len):
    z, _ = torch.sort(x, descending=True)
    k = torch.arange(1, n + 1, dtype=x.dtype)
    total = z.cumsum(0)
    size = int((1 + k * z > total).sum())
    return (x - (total[size - 1] - 1) / size).relu()


def cosformer(x, n, q_len, kv_len, max_len=None):
    return x / x.sum().clamp(min=1e-6)


FORMULAS = {
    f.__name__: f for f in (softmax, softpick, lssa, lssar, sa_softmax, relu, sparsemax, cosformer)
}


def attention(
    query, key, value, variant, *, keep, shift=None, bias=None, slopes=None, softcap=None,
    scale=None, s=1.0, b=0.0, **options,
):  # fmt: skip
    """Output of a call; keep is bool [batch, heads, q_len, kv_len], bias and slopes full-size."""
    batch, heads, q_len, dim = query.shape
    kv_len, group = key.shape[2], heads // key.shape[1]
    shift = kv_len - q_len if shift is None else shift
    own = variant in ("lssa", "lssar", "cosformer")
    scale = (1.0 if own else dim**-0.5) if scale is None else scale
    formula = FORMULAS["softmax" if variant == "ssmax" else variant]
    lines = []
    for i_batch in range(batch):
        for head in range(heads):
            k, v = key[i_batch, head // group], value[i_batch, head // group]
            for i in range(q_len):
                seen = keep[i_batch, head, i].nonzero()[:, 0]
                n = len(seen)
                if n == 0:
                    lines.append(query.new_zeros(value.shape[-1]))
                    continue
                q_row, k_row = query[i_batch, head, i], k[seen]
                distance = (i + shift - seen).abs()
                if variant in ("lssa", "lssar"):
                    q_row = q_row / q_row.norm() * math.log(dim) * math.log(n)
                    k_row = k_row / k_row.norm(dim=-1, keepdim=True)
                if variant == "ssmax":
                    s_head = s[head % s.numel()] if torch.is_tensor(s) else s
                    b_head = b[head % b.numel()] if torch.is_tensor(b) else b
                    q_row = q_row * (s_head * math.log(n) + b_head)
                if variant == "cosformer":
                    longest = options.get("max_len") or max(q_len, kv_len)
                    cos = torch.cos(math.pi / 2 * distance.to(query.dtype) / longest)
                    x = scale * (k_row.relu() @ q_row.relu()) * cos
                else:
                    x = scale * (k_row @ q_row)
                if softcap:
                    x = softcap * torch.tanh(x / softcap)
                if slopes is not None:
                    x = x - slopes[i_batch, head] * distance
                if bias is not None:
                    x = x + bias[i_batch, head, i, seen]
                lines.append(formula(x, n, q_len, kv_len, **options) @ v[seen])
    if not lines:
        return query.new_zeros(batch, heads, q_len, value.shape[-1])
    return torch.stack(lines).view(batch, heads, q_len, value.shape[-1])
