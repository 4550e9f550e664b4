"""Block configurations that ship: per architecture, width and kernel, the best first."""

from __future__ import annotations

from attnvariants_kernels.launch import Config

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

# (architecture, widest head_dim, kernel) -> configurations, each needing less memory than the last
_HALF: dict[tuple[str, int, str], tuple[Config, ...]] = {
    ("sm_80", 64, "forward"): (Config(128, 64, 4, 3),),
    ("sm_80", 128, "forward"): (Config(128, 64, 8, 3),),
    ("sm_80", 256, "forward"): (Config(64, 32, 4, 2),),
    ("sm_80", 64, "dq"): (Config(128, 64, 8, 2),),
    ("sm_80", 128, "dq"): (Config(64, 64, 4, 2),),
    ("sm_80", 256, "dq"): (Config(64, 32, 8, 2),),
    ("sm_80", 64, "dkv"): (Config(64, 128, 8, 2),),
    ("sm_80", 128, "dkv"): (Config(64, 64, 4, 2),),
    ("sm_80", 256, "dkv"): (Config(32, 64, 8, 1),),
    ("sm_90", 64, "forward"): (Config(128, 128, 8, 3),),
    ("sm_90", 128, "forward"): (Config(128, 128, 8, 2),),
    ("sm_90", 256, "forward"): (Config(128, 64, 8, 2),),
    ("sm_90", 64, "dq"): (Config(128, 128, 8, 2),),
    ("sm_90", 128, "dq"): (Config(128, 64, 8, 2),),
    ("sm_90", 256, "dq"): (Config(64, 64, 8, 1),),
    ("sm_90", 64, "dkv"): (Config(64, 128, 8, 2),),
    ("sm_90", 128, "dkv"): (Config(64, 128, 8, 2),),
    ("sm_90", 256, "dkv"): (Config(64, 64, 8, 1),),
}
_SMALLEST = (Config(32, 32, 4, 1), Config(16, 16, 4, 1))
_FLOAT32 = {
    64: (Config(64, 32, 4, 2),),
    128: (Config(32, 32, 4, 2),),
    256: (Config(16, 32, 4, 1),),
}


def configs(
    kernel: str, architecture: str, width: int, itemsize: int, rows: int, keys: int, heavy: bool
) -> tuple[Config, ...]:
    """Configurations to try in turn: the tuned one, then smaller ones.

    Args:
        kernel: "forward", "delta", "dq" or "dkv".
        architecture: one of `ARCHITECTURES`; others are taken for the nearest older one.
        width: the wider of head_dim and value_dim.
        itemsize: bytes of an element.
        rows: number of queries, which bounds useful tiles.
        keys: number of keys.
        heavy: whether the variant needs more registers than the others.
    """
    widest = 64 if width <= 64 else 128 if width <= 128 else 256
    if itemsize > 2:
        found = _FLOAT32[widest]
    else:
        like = {"sm_100": "sm_90", "gfx942": "sm_80"}.get(architecture, architecture)
        found = _HALF[like, widest, "dq" if kernel == "delta" else kernel]
    best = found[0]
    smaller = [best._replace(num_stages=1)] if best.num_stages > 1 else []
    return tuple(trim(config, rows, keys) for config in (*found, *smaller, *_SMALLEST))


def trim(config: Config, rows: int, keys: int) -> Config:
    """No taller and no wider than the call has use for."""
    block_m, block_n, num_warps, num_stages = config
    while block_m > 16 and block_m >= 2 * rows:
        block_m //= 2
    while block_n > 16 and block_n >= 2 * keys:
        block_n //= 2
    while num_warps > 4 and block_m * block_n < 64 * 64:
        num_warps //= 2
    return Config(block_m, block_n, num_warps, num_stages)
