"""Launches of `attnvariants_kernels.threshold`: the solver, and the lists of the other kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants_kernels.launch import Config, Launch
from attnvariants_kernels.threshold import list_kernel, solve_kernel
from attnvariants_kernels.tuning import trim

# scores that a row may have over its bound, in all and in one tile
CANDIDATES = 64
_IN_TILE = 12
_CHUNK = 128


class Tiles(NamedTuple):
    """Tiles to visit, per program: `counts` full ones and then edge ones, their starts in `places`.

    In the dk/dv kernel a place is (head in group) * rounded rows + row.
    """

    places: Any
    counts: Any
    width: Any


def _picked(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: arguments[name] for name in names}


_SHAPE = ("extra", "heads", "kv_heads", "M", "N", "offset", "total_q", "plane")


def configs(width: int, itemsize: int, rows: int, keys: int) -> tuple[Config, ...]:
    """Configurations of the solver to try in turn, as tall as its bits and no wider.

    Args:
        width: the wider of head_dim and value_dim.
        itemsize: bytes of an element.
        rows: the most queries of a sequence.
        keys: the most keys of a sequence.
    """
    if itemsize > 2:
        best = Config(64 if width <= 64 else 32 if width <= 128 else 16, 32, 4, 2)
    else:
        best = Config(128, 64, 8, 3 if width <= 128 else 2)
    best = trim(best, rows, keys)
    return best, best._replace(num_stages=1), best._replace(block_n=16, num_stages=1)


def plan_solve(
    common: dict[str, Any], constants: dict[str, Any], saved: Tensor, rows: int, keys: int,
    wide: int, config: Config, sweeps: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch of the solver.

    Args:
        common: arguments that the streaming kernels share.
        constants: likewise, compile-time.
        saved: [4, B, H, M]; planes 0, 1 and 3 are written.
        rows: the most queries of a sequence.
        keys: the most keys of a sequence.
        wide: keys that a bit stands for.
        config: as tall as the bits.
        sweeps: int32 [programs, 2] for the number of sweeps and of tiles visited by them.
    """
    q = common["q_ptr"]
    cu_q = common["extra"].cu_q
    sequences = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    grid = (-(-rows // config.block_m), common["heads"], sequences)
    programs = grid[0] * grid[1] * grid[2]
    width = -(-keys // config.block_n) + 1
    arguments = {
        **_picked(common, *_SHAPE, "q_ptr", "k_ptr", "q_strides", "k_strides", "scale"),
        "saved_ptr": saved,
        "kept_ptr": q.new_empty(programs * config.block_m * CANDIDATES, dtype=torch.float32),
        "places_ptr": q.new_empty(programs * width, dtype=torch.int32),
        "sweeps_ptr": sweeps,
        "width": width,
    }
    constants = {
        **_picked(constants, "OPS", "DIM", "BLOCK_DIM", "PRECISION"),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "KEEP": CANDIDATES,
        "MOST": _IN_TILE,
        "WIDE": wide,
    }
    return Launch(solve_kernel, grid, arguments, constants, config)


def plan_lists(
    launch: Launch, saved: Tensor, rows: int, keys: int, by_key: bool, bits: tuple[int, int]
) -> list[Launch]:
    """The launch that lists the tiles of a streaming one, and that one with the lists.

    Args:
        launch: of a streaming kernel.
        saved: as the solver left it.
        rows: the most queries of a sequence.
        keys: the most keys of a sequence.
        by_key: whether the programs of `launch` are blocks of keys.
        bits: (rows, keys) that a bit stands for.
    """
    common, config = launch.arguments, launch.config
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    if by_key:
        width = (common["heads"] // common["kv_heads"]) * (-(-rows // config.block_m) + 1)
    else:
        width = -(-keys // config.block_n) + 1
    tiles = Tiles(
        places=saved.new_empty(programs * width, dtype=torch.int32),
        counts=saved.new_empty(programs * 2, dtype=torch.int32),
        width=width,
    )
    arguments = {
        **_picked(common, *_SHAPE),
        "saved_ptr": saved,
        "places_ptr": tiles.places,
        "counts_ptr": tiles.counts,
        "width": width,
    }
    constants = {
        "BY_KEY": by_key,
        "TALL": bits[0],
        "WIDE": bits[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CHUNK": _CHUNK,
    }
    lists = Launch(list_kernel, launch.grid, arguments, constants, Config(*config[:2], 4, 1))
    listed = {**common, "extra": common["extra"]._replace(tiles=tiles)}
    return [lists, replace(launch, arguments=listed)]
