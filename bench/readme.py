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


TABLES = {"variants": variants_markdown, "bench": bench_markdown}


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
