"""Tables and the plot of a result of `bench.gpu`."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.markup import escape
from rich.table import Table

from attnvariants.demo.plots import COLOURS, MARKERS
from bench import gpu_cases, gpu_targets

_GREYS = ("#000000", "#777777")


def cases_in(result, **wanted):
    """Names of the cases with a timed row like that, in the order of the tables."""
    rows = [r for r in result["rows"] if all(r[k] == v for k, v in wanted.items()) and "ms" in r]
    found = {row["case"] for row in rows}
    return [name for name in gpu_cases.known() if name in found]


def figures_in(result, key):
    return sorted({row[key] for row in result["rows"] if "ms" in row})


def table(result, direction, causal, head_dim):
    """TFLOP/s at each length, and times SDPA-flash's speed in brackets."""
    wanted = {"direction": direction, "causal": causal, "head_dim": head_dim}
    names = cases_in(result, **wanted)
    if not names:
        return None
    measured = gpu_targets.Measured(result)
    lengths = sorted({p[1] for n in names for p in measured.places(n, direction)
                      if p[0] == head_dim and p[2] == causal})  # fmt: skip
    grid = Table(
        title=f"{direction}, {'causal' if causal else 'full'}, head_dim {head_dim}: "
        f"TFLOP/s as if dense (x {gpu_cases.FLASH})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    grid.add_column("case", no_wrap=True)
    for length in lengths:
        grid.add_column(f"{length:,}", justify="right", no_wrap=True)
    for name in names:
        cells = []
        for length in lengths:
            place = head_dim, length, causal
            row = measured.get(name, direction, *place)
            ratio = measured.speedup(name, gpu_cases.FLASH, direction, place)
            cell = "" if row is None else _speed(row["tflops"])
            cells.append(cell if ratio is None else f"{cell} ({ratio:.2f})")
        grid.add_row(name, *cells)
    return grid


def _speed(tflops):
    return f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.2g}"


def accuracy_table(result):
    """The worst of each case over dtypes and masks; all of them are in the JSON."""
    grid = Table(
        title="Error against float64, times plain PyTorch's, at its worst", box=box.SIMPLE_HEAD,
        title_justify="left",
    )  # fmt: skip
    for column in ("case", "worst", "tensor", "relative error", "where", "repeatable"):
        grid.add_column(column, no_wrap=column == "case")
    by_case: dict[str, list] = {}
    for entry in result["accuracy"]:
        by_case.setdefault(entry["case"], []).append(entry)
    for name, entries in by_case.items():
        for entry in entries:
            if "error" in entry:
                reason = f"{entry['error']['kind']}: {entry['error']['reason']}"
                grid.add_row(name, "[red]failed[/]", "", escape(reason[:60]), _setting(entry), "")
        entries = [entry for entry in entries if "error" not in entry]
        if not entries:
            continue
        entry = max(entries, key=lambda e: _ratio(e["worst"]))
        at = max(entry["tensors"], key=lambda n: _ratio(entry["tensors"][n]["times_plain"]))
        error = entry["tensors"][at]["relative_error"]
        grid.add_row(
            name,
            f"{_ratio(entry['worst']):.2f}",
            at,
            "not finite" if error is None else f"{error:.1e}",
            _setting(entry),
            "yes" if all(e["repeatable"] for e in entries) else "[red]no[/]",
        )
    return grid


def _setting(entry):
    return f"{entry['dtype']}, {'causal' if entry['causal'] else 'full'}"


def _ratio(value):
    # what is not finite is stored as nothing
    return float("inf") if value is None else value


def targets_table(targets):
    colours = {gpu_targets.MET: "green", gpu_targets.MISSED: "red"}
    grid = Table(title="Targets", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("target", "case", "needed", "worst", "", "where"):
        grid.add_column(column, no_wrap=column in ("case", ""))
    for line in targets:
        if line["status"] == gpu_targets.UNMEASURED:
            continue
        sign = ">=" if line["at_least"] else "<="
        colour = colours[line["status"]]
        grid.add_row(
            line["target"],
            line["case"],
            f"{sign} {line['needed']:g}{line['unit']}",
            f"{line['measured']:.3g}",
            f"[{colour}]{line['status']}[/]",
            line["where"],
        )
    return grid


def show(result, console):
    """Print all tables; what failed and what was not reached comes last."""
    for head_dim in reversed(figures_in(result, "head_dim")):
        for direction in ("forward", "backward"):
            for causal in (True, False):
                grid = table(result, direction, causal, head_dim)
                if grid is not None:
                    console.print(grid)
    if result["accuracy"]:
        console.print(accuracy_table(result))
    console.print(targets_table(result["targets"]))
    counts = Counter(line["status"] for line in result["targets"])
    console.print("Targets: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    unmeasured: dict[str, list[str]] = {}
    for line in result["targets"]:
        if line["status"] == gpu_targets.UNMEASURED:
            unmeasured.setdefault(line["target"], []).append(line["case"])
    for target, names in unmeasured.items():
        console.print(f"  not measured: {target}: {', '.join(names)}", style="dim", markup=False)
    for line in failures(result):
        console.print(line, style="yellow", markup=False)
    if result["not_reached"]:
        console.print(f"not reached in {result['config']['budget']:.0f} s: "
                      f"{', '.join(_compact(result['not_reached']))}", style="yellow",
                      markup=False)  # fmt: skip
    if result.get("tests"):
        console.print(tests_line(result["tests"]), markup=False)


def failures(result):
    """A line for each case and reason, with the first place and the number of them."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in (*result["rows"], *result["warm_failures"]):
        if "error" in row:
            place = row["head_dim"], row["length"], row["causal"]
            why = f"{row['error']['kind']}: {row['error']['reason']}"
            what = f"{row.get('direction', 'compiling')}, {gpu_targets.where(place)}"
            places.setdefault((row["case"], why), []).append(what)
    lines = [
        f"{case}: {why} ({found[0]}{f', and {len(found) - 1} more' if len(found) > 1 else ''})"
        for (case, why), found in places.items()
    ]
    told = {why for _, why in places}
    left_out = result["left_out"].items()
    return lines + [f"{n} left out: {'see above' if why in told else why}" for n, why in left_out]


def _compact(missed):
    """Shapes that were not reached, with the number of cases each."""
    counts = Counter(
        (job["kind"], job["head_dim"], job["length"], "causal" if job["causal"] else "full")
        for job in missed
    )
    return [
        f"{kind} {mask} d{d} {n:,} ({many} cases)" for (kind, d, n, mask), many in counts.items()
    ]


def tests_line(tests):
    counts = ", ".join(f"{len(tests[what])} {what}" for what in ("failed", "skipped"))
    line = f"pytest -m gpu: {tests['passed']} passed, {counts}, {tests['ended']}"
    return "\n  failed: ".join([line, *tests["failed"]])


def style_of(name, names):
    """Colour and marker of a case; peers are grey, dashed and without one."""
    ours = [n for n in names if n in {case.name for case in gpu_cases.OURS}]
    if name in ours:
        at = ours.index(name)
        return {
            "color": COLOURS[at % len(COLOURS)],
            "marker": MARKERS[at % len(MARKERS)],
            "linestyle": "-" if at < len(COLOURS) else ":",
        }
    others = [n for n in names if n not in ours]
    at = others.index(name)
    styles = ("--", ":", "-.")
    return {"color": _GREYS[at % 2], "linestyle": styles[at // 2 % 3], "marker": ""}


def plot(result, path):
    """TFLOP/s against length: forward and backward above each other, causal and full beside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = gpu_targets.Measured(result)
    names = cases_in(result)
    head_dims = list(reversed(figures_in(result, "head_dim")))
    columns = [(head_dim, causal) for head_dim in head_dims for causal in (True, False)]
    figure = Figure(figsize=(4.2 * max(1, len(columns)) + 2, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, max(1, len(columns)), squeeze=False)
    lines = {}
    for row, direction in enumerate(("forward", "backward")):
        for axis, (head_dim, causal) in zip(axes[row], columns, strict=False):
            axis.set_title(f"{direction}, {'causal' if causal else 'full'}, head_dim {head_dim}")
            for name in names:
                places = sorted(p for p in measured.places(name, direction)
                                if p[0] == head_dim and p[2] == causal)  # fmt: skip
                if places:
                    speeds = [measured.get(name, direction, *p)["tflops"] for p in places]
                    lines[name], = axis.plot(
                        [p[1] for p in places], speeds, label=name, markersize=4, linewidth=1.4,
                        **style_of(name, names),
                    )  # fmt: skip
            axis.set_xscale("log", base=2)
            ticks = figures_in(result, "length")
            axis.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:.0f}")
            axis.grid(alpha=0.3)
            axis.set_xlabel("tokens")
    for row in range(2):
        axes[row][0].set_ylabel("TFLOP/s as if dense")
    if lines:
        ordered = [name for name in names if name in lines]
        figure.legend([lines[n] for n in ordered], ordered, loc="outside right upper", fontsize=9)
    machine = result["machine"]
    figure.suptitle(
        f"{machine.get('gpu') or 'rehearsal on a CPU'}, bfloat16, "
        f"{result['config']['tokens']:,} tokens, heads x head_dim = {result['config']['width']:,}"
    )
    figure.savefig(path, dpi=110)
