"""`python -m bench.readme [--check]`: the README's generated tables, from registry and results."""

import argparse
import json
import re
import sys
from pathlib import Path

from attnvariants.cli import variants_markdown

ROOT = Path(__file__).parents[1]


def bench_markdown():
    """The table of `bench/results/cpu.json`."""
    result = json.loads((ROOT / "bench/results/cpu.json").read_text())
    machine = result["machine"]
    lines = [
        "| Variant | Forward, times faster than dense | Forward, time / SDPA's "
        "| Forward + backward, times faster than dense | Forward + backward, time / SDPA's |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"`{row['variant']}`"]
        for what in ("forward", "forward_backward"):
            faster, ratio = (row[what][key] for key in ("times_faster_than_dense", "times_sdpa"))
            cells += [f"{faster:.1f}", f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{result['tokens']:,} tokens, batch 1, 8 heads, head_dim 64, float32, causal; "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}. The dense "
        "formula of sparsemax is the entmax package's; of sa_softmax, form `x` was measured.",
    ]
    lines += [
        f"Forward + backward of {row['variant']} at {row['tokens']:,} tokens takes "
        f"{row['peak_gib_above_inputs']:.2f} GiB above its inputs."
        for row in result["memory"]
    ]
    return "\n".join(lines)


def static_markdown():
    """The table of `bench/results/static.json`: forward, dq and dk/dv on sm_90, head_dim 128."""
    result = json.loads((ROOT / "bench/results/static.json").read_text())
    kernels = {"forward": "Forward", "dq": "dq", "dkv": "dk/dv"}
    found = {}
    for row in result["rows"]:
        if (row["target"], row["head_dim"]) == ("sm_90", 128) and row["kernel"] in kernels:
            found.setdefault(row["cell"], {}).setdefault(row["kernel"], []).append(row)

    def worst(rows, field, digits=2):
        values = [row[field] for row in rows or () if row.get(field) is not None]
        return f"{max(values):.{digits}f}" if values else "-"

    heads = [f"{title}, {what}" for title in kernels.values() for what in ("instructions", "MUFU")]
    columns = ["Kernels", *heads, "Registers", "Stack + local bytes"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    # the yardstick first
    for cell in sorted(found, key=lambda name: (not name.startswith("handwritten"), name)):
        per_kernel = [found[cell].get(kernel) for kernel in kernels]
        cells = [cell if cell.startswith("handwritten") else f"`{cell}`"]
        for rows in per_kernel:
            cells += [worst(rows, "non_mma"), worst(rows, "mufu")]
        for field in ("registers", "stack_and_local"):
            cells.append(" / ".join(worst(rows, field, 0) for rows in per_kernel if rows))
        lines.append(f"| {' | '.join(cells)} |")
    missed = sum(len(one["missed"]) for one in result["checks"])
    lines += [
        "",
        "Instructions per score element of the loop over full tiles that are not tensor-core "
        "instructions, and those of the special function unit; sm_90, bf16, head_dim 128, the "
        "worse of causal and full, in the shipped blocks. Read from SASS, with no GPU; Triton "
        f"{result['triton']}, ptxas {result['ptxas']['sm_90']}.",
        f"Targets missed, of all kernels on {', '.join(result['ptxas'])}: {missed}.",
    ]
    return "\n".join(lines)


TABLES = {"variants": variants_markdown, "bench": bench_markdown, "static": static_markdown}


def refreshed(text):
    """The README with every `<!-- NAME -->` ... `<!-- /NAME -->` block made anew."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"README.md has no block <!-- {name} --> ... <!-- /{name} -->.")
        text = block.sub(lambda found, make=make: found[1] + make() + "\n" + found[2], text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    text = path.read_text()
    fresh = refreshed(text)
    if check and fresh != text:
        sys.exit("README.md is stale; run `make docs`.")
    if not check:
        path.write_text(fresh)


if __name__ == "__main__":
    main()
