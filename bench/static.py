"""`python -m bench.static`: every shipped kernel compiled ahead of time and read from its SASS.

No GPU is needed. For each kernel: registers, stack, local and shared memory, and for its loop over
full tiles the instructions per score element that are not tensor-core instructions, beside a plain
hand-written softmax flash forward of the same blocks, compiled in the same run.

An element is one score of the tile, so a thread of a loop of I instructions, M of them tensor-core
ones, spends (I - M) / (BLOCK_M BLOCK_N / threads). Kernels have separate loops for full tiles and
for tiles at an edge; the loop over full tiles is the one with the fewest of those.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import sass

DISASSEMBLED = ("sm_80", "sm_90", "sm_100")
COMPILED = (*DISASSEMBLED, "gfx942")
HEAD_DIMS = (64, 128, 256)
HANDWRITTEN = "handwritten softmax"
# Options beside the default that get a row of their own.
MORE_CELLS = {"sa_softmax": ({"form": "x"},)}
# Fewer key heads than query heads, so that the loop over a group is there.
HEADS, KV_HEADS, TOKENS = 16, 4, 4096

# What must hold, bf16, causal and full alike. Every key but "field" and "at_most" selects rows.
SM90 = {"target": ["sm_90"], "head_dim": [128]}
SMALL = {"head_dim": [64, 128]}
LIMITS = (
    *(
        {"field": "non_mma", "at_most": most, "cell": [cell], "kernel": [kernel], **SM90}
        for cell, kernel, most in (
            ("softmax", "forward", 8.5),
            ("softpick", "forward", 10.5),
            ("lssa", "forward", 14.0),
            ("sa_softmax form=x", "forward", 11.0),
            ("relu", "forward", 4.5),
            ("softmax", "dq", 12.0),
            ("softmax", "dkv", 18.0),
            ("softpick", "dq", 1.2 * 12.0),
            ("softpick", "dkv", 1.2 * 18.0),
        )
    ),
    {"field": "times_handwritten", "at_most": 1.02, "cell": ["softmax"], "kernel": ["forward"],
     **SM90},
    {"field": "stack_and_local", "at_most": 0, "target": ["sm_80", "sm_90"], "pass": ["forward"],
     **SMALL},
    {"field": "stack_and_local", "at_most": 0, "target": ["sm_90"], "pass": ["backward"], **SMALL},
    {"field": "stack_and_local", "at_most": 64, "target": ["sm_80"], "kernel": ["dkv"], **SMALL},
)  # fmt: skip


def cell_name(variant, options):
    return " ".join([variant, *(f"{name}={value}" for name, value in options.items())])


def cells():
    """`(variant, options)` of every registered variant, and of some options more."""
    from attnvariants import list_variants

    return [
        (name, options)
        for name in list_variants()
        for options in ({}, *MORE_CELLS.get(name, ()))
    ]  # fmt: skip


def launches(variant, options, **where):
    """`{kernel: Launch}`; empty where a variant has no kernels."""
    from attnvariants import fused
    from bench import handwritten

    if variant != HANDWRITTEN:
        return fused.shipped(variant, options, **where)
    config = fused.shipped("softmax", {}, **where)["forward"].config
    return handwritten.shipped(config=config, **where)


def measure(launch, target, head_dim, kernel="forward", disassemble=True, opcodes=False):
    """Compile one launch and read it: a row of the result."""
    compiled = launch.compile(target)
    config = launch.config
    row = {"config": list(config), "shared": compiled.metadata.shared}
    if disassemble and target in DISASSEMBLED:
        resources, loops = sass.read(compiled.asm["cubin"])
        loop, figures = sass.full_tile_loop(loops, kernel, config, head_dim)
        row |= {
            "registers": resources.registers,
            "stack": resources.stack,
            "local": resources.local,
            "stack_and_local": resources.stack + resources.local,
            "loops": len(loops),
            **(figures or {}),
        }
        if opcodes and loop:
            row["opcodes"] = loop.opcodes()
    return row


def work(job):
    """All rows of one job; what does not compile says so in "error"."""
    target, variant, options, head_dim, causal, disassemble, opcodes = job
    where = {"target": target, "head_dim": head_dim, "causal": causal}
    about = {**where, "cell": cell_name(variant, options)}
    try:
        found = launches(
            variant, options, heads=HEADS, kv_heads=KV_HEADS, tokens=TOKENS, **where
        ).items()  # fmt: skip
    except Exception as error:
        return [{**about, "kernel": "all", "error": f"{type(error).__name__}: {error}"}]
    rows = []
    for kernel, launch in found:
        which = "forward" if kernel.startswith("forward") else "backward"
        row = {**about, "kernel": kernel, "pass": which}
        try:
            row |= measure(launch, target, head_dim, kernel, disassemble, opcodes)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows or [{**about, "kernel": "no kernels"}]


def _start_worker(cache):
    import triton

    # a cache of this run alone: nothing comes from an earlier compile, twins compile once
    triton.knobs.cache.dir = cache


def run(jobs, tick=lambda: None, workers=None):
    """Rows of all jobs, in their order, from a pool of fresh processes."""
    with (
        tempfile.TemporaryDirectory(prefix="attnvariants-static-") as cache,
        concurrent.futures.ProcessPoolExecutor(
            min(len(jobs), workers or os.cpu_count() or 1),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(cache,),
        ) as pool,
    ):
        futures = [pool.submit(work, job) for job in jobs]
        for _ in concurrent.futures.as_completed(futures):
            tick()
        return with_ratio([row for future in futures for row in future.result()])


def with_ratio(rows):
    """Softmax's forward rows get "times_handwritten"."""

    def key(row):
        return row["target"], row["head_dim"], row["causal"]

    plain = {key(row): row.get("non_mma") for row in rows if row["cell"] == HANDWRITTEN}
    for row in rows:
        mine = (
            row.get("non_mma") if (row["cell"], row["kernel"]) == ("softmax", "forward") else None
        )
        if mine and plain.get(key(row)):
            row["times_handwritten"] = round(mine / plain[key(row)], 4)
    return rows


def jobs_of(
    targets,
    variants=None,
    head_dims=HEAD_DIMS,
    masks=(True, False),
    disassemble=True,
    opcodes=False,
):
    """Jobs, the handwritten kernel first; `variants` None means all."""
    chosen = [cell for cell in cells() if variants is None or cell[0] in variants]
    return [
        (target, variant, options, head_dim, causal, disassemble, opcodes)
        for target in targets
        for head_dim in head_dims
        for causal in masks
        for variant, options in ([(HANDWRITTEN, {})] if target in DISASSEMBLED else []) + chosen
    ]


def describe(row):
    mask = "causal" if row["causal"] else "full"
    return f"{row['cell']}, {row['kernel']}, {row['target']}, head_dim {row['head_dim']}, {mask}"


def check(rows):
    """What must hold: `[{"limit", "rows", "worst", "missed": [...]}]`; no row is a miss too."""
    ours = [row for row in rows if row["cell"] != HANDWRITTEN]
    verdicts = []
    for limit in LIMITS:
        selects = {key: limit[key] for key in limit if key not in ("field", "at_most")}
        found = [row for row in ours if all(row.get(key) in selects[key] for key in selects)]
        field, most = limit["field"], limit["at_most"]
        values = [row[field] for row in found if row.get(field) is not None]
        missed = [
            f"{describe(row)}: {field} {row.get(field)} > {most:g}"
            if row.get(field) is not None
            else f"{describe(row)}: {field} could not be read"
            for row in found
            if row.get(field) is None or row[field] > most
        ]
        words = ", ".join(" or ".join(map(str, selects[key])) for key in selects)
        verdicts.append(
            {
                "limit": f"{field} <= {most:g}: {words}",
                "rows": len(found),
                "worst": max(values, default=None),
                "missed": missed if found else [f"nothing measured for {field}: {words}"],
            }
        )
    return verdicts


def table(rows):
    grid = Table(title="per score element of the loop over full tiles; bytes of memory")
    for column in ("target, head_dim", "variant", "kernel", "blocks, warps, stages"):
        grid.add_column(column, no_wrap=True)
    fields = {name: name for name in ("registers", "stack", "local", "shared")}
    fields |= {"non-MMA": "non_mma", "MUFU": "mufu", "/ handwritten": "times_handwritten"}
    for column in fields:
        grid.add_column(column, justify="right")
    for row in rows:
        where = f"{row['target']} {row['head_dim']} {'causal' if row['causal'] else 'full'}"
        values = [row.get(key, "") for key in fields.values()]
        grid.add_row(
            where,
            row["cell"],
            "[red]does not compile[/red]" if "error" in row else row["kernel"],
            " ".join(map(str, row.get("config", ()))),
            *(f"{one:.2f}" if isinstance(one, float) else str(one) for one in values),
        )
    return grid


def machine(targets):
    import torch
    import triton

    from attnvariants import __version__

    return {
        "triton": triton.__version__,
        "ptxas": {name: sass.ptxas_version(name) for name in targets if name in DISASSEMBLED},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "attnvariants": __version__,
    }


def compact(result):
    """JSON with one row a line."""
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    rest = json.dumps({**result, "rows": "@"}, indent=1)
    return rest.replace('"@"', f"[\n  {rows}\n ]") + "\n"


def _names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def arguments_of(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", type=_names, default=list(DISASSEMBLED))
    parser.add_argument("--variants", type=_names, help="all if not given")
    parser.add_argument(
        "--head-dims", type=lambda text: [int(one) for one in _names(text)], default=list(HEAD_DIMS)
    )
    parser.add_argument("--quick", action="store_true", help="sm_90, head_dim 128, causal alone")
    parser.add_argument("--opcodes", action="store_true", help="count the loops' opcodes too")
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    parser.add_argument(
        "--workers", type=int, help="processes; as many as there are CPUs if not given"
    )
    parser.add_argument("--json", type=Path, default=None, help="where to write")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.targets if name not in COMPILED]
    if unknown:
        parser.error(f"--targets takes {', '.join(COMPILED)}; got {', '.join(unknown)}.")
    known = {name for name, _ in cells()}
    if wrong := [name for name in arguments.variants or () if name not in known]:
        parser.error(f"--variants takes {', '.join(sorted(known))}; got {', '.join(wrong)}.")
    return arguments


def main():
    arguments = arguments_of()
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    masks = (True,) if arguments.quick else (True, False)
    if arguments.quick:
        arguments.targets, arguments.head_dims = ["sm_90"], [128]
    jobs = jobs_of(
        arguments.targets, arguments.variants, arguments.head_dims, masks, True, arguments.opcodes
    )  # fmt: skip
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=len(jobs))
        rows = run(jobs, lambda: progress.advance(task), arguments.workers)
    verdicts = check(rows)
    console.print(table(rows))
    for row in rows if arguments.opcodes else ():
        if "opcodes" in row:
            console.print(f"{describe(row)}: {row['opcodes']}")
    failed = [
        f"{describe(row)}: does not compile: {row['error']}" for row in rows if "error" in row
    ]
    selected = [
        one
        for one, limit in zip(verdicts, LIMITS, strict=True)
        if one["rows"] or asked(limit, arguments)
    ]
    missed = failed + [line for one in selected for line in one["missed"]]
    for one in selected:
        good = "[red]missed[/red]" if one["missed"] else "[green]met[/green]"
        console.print(f"{good} {one['limit']}; worst of {one['rows']} kernels: {one['worst']}")
    result = {**machine(arguments.targets), "rows": rows, "checks": selected}
    path = arguments.json or (None if partial(arguments) else Path("bench/results/static.json"))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(compact(result))
        console.print(f"written to {path}")
    if missed:
        console.print("missed:\n" + "\n".join(missed), style="red", markup=False)
    if arguments.check and missed:
        sys.exit(f"{len(missed)} targets missed.")


def partial(arguments):
    """Whether only some of the cells were asked for."""
    targets, head_dims = set(arguments.targets), set(arguments.head_dims)
    whole = targets >= set(DISASSEMBLED) and head_dims >= set(HEAD_DIMS)
    return arguments.quick or arguments.variants is not None or not whole


def asked(limit, arguments):
    """Whether a run with these arguments has to have rows for a limit."""
    if not partial(arguments):
        return True
    variants = [cell.split()[0] for cell in limit.get("cell", ())]
    return bool(
        set(limit["target"]) & set(arguments.targets)
        and set(limit["head_dim"]) & set(arguments.head_dims)
        and set(variants) & set(variants if arguments.variants is None else arguments.variants)
    )


if __name__ == "__main__":
    main()
