"""Dropout of attention weights by a counter: the same mask in every engine, block size and device.

The random numbers are Philox4x32-10 (Salmon et al., 2011) keyed by the seed: the weight of a row
and column takes word `column % 4` at the counter
`((batch * heads + head) * q_len + row) * ceil(kv_len / 4) + column // 4`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox(seed: int | Tensor, counter: Tensor) -> Tensor:
    """The four words of Philox4x32-10 at int64 counters, `[..., 4]`, int64 in [0, 2^32)."""
    key = [seed & _LOW, (seed >> 32) & _LOW]
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        # int64 products wrap, which leaves their 64 bits as unsigned arithmetic would
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _LOW) ^ c1 ^ key[0], ((p0 >> 32) & _LOW) ^ c3 ^ key[1]
        c1, c3 = p1 & _LOW, p0 & _LOW
        key = [(k + w) & _LOW for k, w in zip(key, _WEYL, strict=True)]
    return torch.stack([c0, c1, c2, c3], -1)


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability `p` under a 62-bit seed, over a call of the given sizes.

    The seed is a tensor where a call being compiled draws it.
    """

    p: float
    seed: int | Tensor
    heads: int
    q_len: int
    kv_len: int

    def factor(self, batch: slice, heads: slice, rows: slice, cols: slice, like: Tensor) -> Tensor:
        """`[batch, heads, rows, cols]`: 0 where dropped, 1 / (1 - p) where kept."""
        if self.p >= 1:
            return torch.zeros((), dtype=like.dtype, device=like.device)

        def index(part: slice) -> Tensor:
            return torch.arange(part.start, part.stop, device=like.device)

        line = index(batch).view(-1, 1, 1) * self.heads + index(heads).view(-1, 1)
        line = line * self.q_len + index(rows)
        fours = slice(cols.start // 4, -(-cols.stop // 4))
        counter = line.unsqueeze(-1) * -(-self.kv_len // 4) + index(fours)
        words = philox(self.seed, counter).flatten(-2)[..., cols.start - 4 * fours.start :]
        kept = words[..., : cols.stop - cols.start] >= int(self.p * 2**32)
        return kept.to(like.dtype) / (1 - self.p)
