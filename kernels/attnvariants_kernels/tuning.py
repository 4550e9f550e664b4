"""Block configurations that ship: per architecture, width, kernel and variant, the best first."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from attnvariants_kernels._triton import triton
from attnvariants_kernels.launch import Config, Launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = ("forward", "delta", "dq", "dkv")
WIDTHS = (64, 128, 256)
# of `Hooks.cost`
COSTS = (0, 1, 2, 3)

_Blocks = tuple[int, int, int, int]


def _row(*blocks: _Blocks) -> tuple[Config, ...]:
    """One configuration for each of COSTS, the last given for the rest."""
    found = [Config(*one) for one in blocks]
    return tuple(found + found[-1:] * (len(COSTS) - len(found)))


# The largest blocks that leave no register in memory, by `bench.static`: where to look after a
# change.
_HOPPER = {
    (64, "forward"): _row((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2)),
    (128, "forward"): _row((128, 128, 8, 3)),
    (256, "forward"): _row((128, 64, 8, 2)),
    (64, "dq"): _row((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2)),
    (128, "dq"): _row((128, 64, 8, 2)),
    (256, "dq"): _row((128, 32, 8, 2)),
    (64, "dkv"): _row((64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
    (128, "dkv"): _row((64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 1)),
    (256, "dkv"): _row((64, 64, 8, 1), (32, 64, 8, 1)),
}
_BLACKWELL = {
    **_HOPPER,
    (256, "dq"): _row((64, 64, 8, 1)),
    # its accumulators are not in registers
    (128, "dkv"): _row((64, 128, 8, 2)),
    (256, "dkv"): _row((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 2)),
}
_AMPERE = {
    (64, "forward"): _row((128, 64, 8, 3)),
    (128, "forward"): _row((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    (256, "forward"): _row((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
    (64, "dq"): _row((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    (128, "dq"): _row((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)),
    (256, "dq"): _row((64, 32, 8, 2)),
    (64, "dkv"): _row((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
    (128, "dkv"): _row((64, 64, 8, 2)),
    (256, "dkv"): _row((32, 64, 8, 1)),
}
# 64 lanes a wave, 64 KiB a workgroup, 512 registers
_CDNA3 = {
    (64, "forward"): _row((128, 64, 4, 2)),
    (128, "forward"): _row((128, 32, 4, 1)),
    (256, "forward"): _row((64, 16, 4, 1)),
    (64, "dq"): _row((64, 64, 4, 1)),
    (128, "dq"): _row((64, 32, 4, 1)),
    (256, "dq"): _row((32, 32, 4, 1)),
    (64, "dkv"): _row((64, 64, 4, 1), (32, 64, 4, 1)),
    (128, "dkv"): _row((32, 64, 4, 1)),
    (256, "dkv"): _row((32, 32, 4, 1), (16, 32, 4, 1)),
}
_HALF = {"sm_80": _AMPERE, "sm_90": _HOPPER, "sm_100": _BLACKWELL, "gfx942": _CDNA3}
_FLOAT32 = {64: Config(64, 32, 4, 2), 128: Config(32, 32, 4, 2), 256: Config(16, 32, 4, 1)}


def shared(kernel: str, config: Config, width: int, itemsize: int) -> int:
    """Bytes of the tiles of a configuration that are kept in shared memory, about."""
    fixed, moving = config.block_m, config.block_n
    if kernel == "dkv":
        fixed, moving = moving, fixed
    kept = fixed if kernel == "forward" else 2 * fixed
    return (kept + 2 * moving * config.num_stages) * width * itemsize


def configs(
    kernel: str, architecture: str, width: int, itemsize: int, rows: int, keys: int, cost: int = 0
) -> tuple[Config, ...]:
    """Configurations to try in turn: the tuned one, then ever smaller ones.

    Args:
        kernel: one of `KERNELS`.
        architecture: one of `ARCHITECTURES`.
        width: the wider of head_dim and value_dim.
        itemsize: bytes of an element.
        rows: number of queries, which bounds useful tiles.
        keys: number of keys.
        cost: one of `COSTS`, the variant's.
    """
    kernel = "dq" if kernel == "delta" else kernel
    widest = _widest(width)
    best = _FLOAT32[widest] if itemsize > 2 else _HALF[architecture][widest, kernel][cost]
    found = [best]
    while (smaller := _smaller(found[-1])) != found[-1]:
        found.append(smaller)
    trimmed = [trim(config, rows, keys) for config in found]
    return tuple(dict.fromkeys(trimmed))


def _widest(width: int) -> int:
    return next((one for one in WIDTHS if width <= one), WIDTHS[-1])


def _smaller(config: Config) -> Config:
    """Less shared memory: fewer stages, then half the longer side, down to 16 x 16."""
    block_m, block_n, num_warps, num_stages = config
    if num_stages > 1:
        return config._replace(num_stages=num_stages - 1)
    if block_m >= block_n and block_m > 16:
        block_m //= 2
    elif block_n > 16:
        block_n //= 2
    return Config(block_m, block_n, _warps(block_m, block_n, num_warps), num_stages)


def trim(config: Config, rows: int, keys: int) -> Config:
    """No taller and no wider than the call has use for."""
    block_m, block_n, num_warps, num_stages = config
    while block_m > 16 and block_m >= 2 * rows:
        block_m //= 2
    while block_n > 16 and block_n >= 2 * keys:
        block_n //= 2
    if (block_m, block_n) == config[:2]:
        return config
    return Config(block_m, block_n, _warps(block_m, block_n, num_warps), num_stages)


def _warps(block_m: int, block_n: int, num_warps: int) -> int:
    return num_warps if block_m * block_n >= 64 * 64 else min(num_warps, 4)


# Autotuning: off, so that the first call of a shape does not wait for it.
_autotune = os.environ.get("ATTNVARIANTS_AUTOTUNE", "0") == "1"
_chosen: dict[Hashable, Config] = {}


def set_autotune(on: bool) -> None:
    """Time a few configurations at the first call of a kind, and keep the fastest.

    Off unless ATTNVARIANTS_AUTOTUNE=1 was in the environment at import. A kind is kernel,
    architecture, width, dtype, cost of the variant, and the lengths up to the next power of two.
    What was chosen holds for the process; calls while off use what ships.

    Args:
        on: whether to.
    """
    global _autotune
    _autotune = bool(on)


def autotunes() -> bool:
    """Whether autotuning is on."""
    return _autotune


def alternatives(
    kernel: str, architecture: str, width: int, itemsize: int, rows: int, keys: int, cost: int = 0
) -> tuple[Config, ...]:
    """A handful of configurations worth timing, the one that ships first; as of `configs`."""
    best = configs(kernel, architecture, width, itemsize, rows, keys, cost)[0]
    found = [best]
    for other in COSTS:
        found.append(configs(kernel, architecture, width, itemsize, rows, keys, other)[0])
    for one in tuple(found):
        found += [one._replace(num_stages=stages) for stages in (1, 2, 3)]
    return tuple(dict.fromkeys(found))


def choose(
    kind: Hashable,
    candidates: Sequence[Config],
    make: Callable[[Config], Sequence[Launch]],
    time: Callable[[Callable[[], None]], float] | None = None,
) -> Config:
    """The fastest of the candidates, timed once for each kind of call.

    Candidates that do not fit the device or do not compile are left out; where none is left, it
    is the first, whose own error a run then raises.

    Args:
        kind: what the choice depends on.
        candidates: the one that ships first.
        make: the launches of a configuration; running them again must change nothing.
        time: milliseconds that a function takes; `triton.testing.do_bench` if None.
    """
    if kind not in _chosen:
        times = {one: _time(make(one), time) for one in candidates}
        best = min(candidates, key=lambda one: times[one])
        _chosen[kind] = best
    return _chosen[kind]


def _time(launches: Sequence[Launch], time: Callable[[Callable[[], None]], float] | None) -> float:
    def run() -> None:
        for launch in launches:
            launch.run()

    try:
        return float((time or _do_bench)(run))
    except triton.runtime.errors.TritonError:
        return float("inf")


def _do_bench(run: Callable[[], None]) -> float:
    found: Any = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    return float(found)


def kind_of(
    kernel: str, architecture: str, width: int, dtype: Any, rows: int, keys: int, cost: int
) -> Hashable:
    """What a choice depends on, the lengths rounded up to a power of two."""
    rounded = [1 << max(0, length - 1).bit_length() for length in (rows, keys)]
    return kernel, architecture, width, str(dtype), cost, *rounded
