"""`python -m bench.cpu`: the chunked engine beside the plain dense formula and torch's SDPA.

Ratios of one run, float32, causal. Sparsemax's plain formula is the entmax package's.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from attnvariants import __version__, attention
from bench import plain

HEADS, HEAD_DIM = 8, 64
TARGETS = (
    "Targets at 4,096 tokens: forward >= 8x the dense formula and <= 1.7x SDPA's time, forward + "
    "backward >= 4x dense autograd (one-pass variants); sparsemax >= 4x entmax; < 3 GiB at 32,768."
)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs(tokens, requires_grad):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator).requires_grad_(requires_grad)
        for _ in range(3)
    ]


def seconds(call, tensors, backward):
    start = time.perf_counter()
    out = call(*tensors)
    if backward:
        torch.autograd.grad(out.sum(), tensors)
    return time.perf_counter() - start


def side_by_side(calls, tokens, backward, rounds, tick):
    """Median seconds of each call, taken in turns."""
    tensors = inputs(tokens, backward)
    seen = {name: [] for name in calls}
    for call in calls.values():
        seconds(call, tensors, backward)
    for _ in range(rounds):
        for name, call in calls.items():
            seen[name].append(seconds(call, tensors, backward))
        tick()
    return {name: statistics.median(times) for name, times in seen.items()}


def measure(name, tokens, rounds, tick):
    options, dense, one_pass = plain.ROWS[name]

    def ours(q, k, v):
        return attention(q, k, v, name, causal=True, impl="chunked", **options)

    row = {"variant": name, "options": options, "one_pass": one_pass}
    for what, backward in (("forward", False), ("forward_backward", True)):
        times = side_by_side(
            {"ours": ours, "dense": dense, "sdpa": sdpa}, tokens, backward, rounds, tick
        )
        row[what] = {
            "seconds": times,
            "times_faster_than_dense": times["dense"] / times["ours"],
            "times_sdpa": times["ours"] / times["sdpa"],
        }
    return row


def memory_kib(field):
    """KiB of memory: "VmRSS" in use now, "VmHWM" at most so far.

    getrusage would count what the parent had at the fork; it serves where there is no /proc.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = [line for line in status.read_text().splitlines() if line.startswith(field)]
        return int(found[0].split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _memory(name, tokens, threads, pipe):
    torch.set_num_threads(threads)
    options = plain.ROWS[name][0]
    tensors = inputs(tokens, True)
    before = memory_kib("VmRSS")
    start = time.perf_counter()
    out = attention(*tensors, name, causal=True, impl="chunked", **options)
    torch.autograd.grad(out.sum(), tensors)
    after = memory_kib("VmHWM")
    pipe.send(((after - before) / 2**20, time.perf_counter() - start))


def memory(name, tokens):
    """GiB of peak memory above the inputs of forward + backward, and its seconds."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_memory, args=(name, tokens, torch.get_num_threads(), send))
    child.start()
    send.close()
    gib, took = receive.recv()
    child.join()
    return {"variant": name, "tokens": tokens, "peak_gib_above_inputs": gib, "seconds": took}


def machine():
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "attnvariants": __version__,
    }


def table(result):
    grid = Table(title=f"{result['tokens']:,} tokens, 8 heads, head_dim 64, float32, causal")
    for column in ("variant", "forward\nx dense", "forward\n/ SDPA", "fwd+bwd\nx dense",
                   "fwd+bwd\n/ SDPA"):  # fmt: skip
        grid.add_column(column, justify="left" if column == "variant" else "right")
    for row in result["rows"]:
        cells = [
            f"{row[what][key]:.{digits}f}"
            for what in ("forward", "forward_backward")
            for key, digits in (("times_faster_than_dense", 1), ("times_sdpa", 2))
        ]
        grid.add_row(row["variant"], *cells)
    return grid


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="*", default=list(plain.ROWS), choices=plain.ROWS)
    parser.add_argument("--memory-tokens", type=int, default=32768, help="0 leaves it out")
    parser.add_argument("--memory-variants", nargs="*", default=["softpick"], choices=plain.ROWS)
    parser.add_argument("--json", type=Path, default=Path("bench/results/cpu.json"))
    arguments = parser.parse_args()

    console = Console()
    result = {"machine": machine(), "tokens": arguments.tokens, "rows": [], "memory": []}
    rounds = arguments.rounds
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=2 * rounds * len(arguments.variants))
        for name in arguments.variants:
            progress.update(task, description=name)
            row = measure(name, arguments.tokens, rounds, lambda: progress.advance(task))
            result["rows"].append(row)
        for name in arguments.memory_variants if arguments.memory_tokens else ():
            progress.update(task, description=f"memory of {name}")
            result["memory"].append(memory(name, arguments.memory_tokens))
    console.print(table(result))
    for row in result["memory"]:
        console.print(
            f"{row['variant']} at {row['tokens']:,} tokens, forward + backward: "
            f"{row['peak_gib_above_inputs']:.2f} GiB above the inputs, {row['seconds']:.0f} s"
        )
    console.print(TARGETS, style="dim")
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
