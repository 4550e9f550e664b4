"""The functional call alone: any normaliser, one contract, no model and no GPU."""

import torch

from attnvariants import attention, attention_varlen, list_variants

torch.manual_seed(0)
# eight query heads share two key heads; four new queries after a cache of twelve keys
query = torch.randn(2, 8, 4, 64, requires_grad=True)
key, value = torch.randn(2, 2, 16, 64), torch.randn(2, 2, 16, 64)
# the first sequence is padded on the left by three tokens
visible = torch.ones(2, 1, 1, 16, dtype=torch.bool)
visible[0, ..., :3] = False

print("variant      row mass (mean)  largest weight  |dq|")
for name in list_variants():
    options = {"max_len": 1024} if name == "cosformer" else {}
    out, stats = attention(
        query, key, value, name, attn_mask=visible, causal=True, return_stats=True, **options
    )
    (grad,) = torch.autograd.grad(out.sum(), query)
    figures = f"{stats.mass.mean():15.3f} {stats.largest.max():15.3f} {grad.norm():5.2f}"
    print(f"{name:12s} {figures}")

# a learned temperature, one per head, gets its gradient
s = torch.full((8,), 0.4, requires_grad=True)
attention(query, key, value, "ssmax", s=s, causal=True).sum().backward()
print("gradient of ssmax's s:", [round(g, 3) for g in s.grad.tolist()])

# packed sequences of 5 and 7 tokens, in flash-attn's layout
packed = torch.randn(12, 8, 64)
bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
out = attention_varlen(packed, packed, packed, bounds, bounds, variant="softpick", causal=True)
print("packed:", list(out.shape))
