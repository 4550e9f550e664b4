"""The speed and accuracy targets on an H100 or H200, judged from the measured JSON."""

from __future__ import annotations

import math

from bench import gpu_cases

MET, MISSED, UNMEASURED = "met", "missed", "not measured"
# Where the targets of the forward hold, and those of the backward too.
HEAD_DIM, LENGTH = 128, 4096
OVER_FLASH, OF_CUDNN, OVER_SOFTMAX, POINTWISE_TFLOPS = 1.2, 0.7, 1.15, 500.0


class Measured:
    """The timed rows of a result by what they are of."""

    def __init__(self, result):
        self._rows = {self._key(row): row for row in result["rows"] if "ms" in row}

    @staticmethod
    def _key(row):
        return tuple(row[k] for k in ("case", "direction", "head_dim", "length", "causal"))

    def get(self, case, direction, head_dim, length, causal):
        """The row, or None."""
        return self._rows.get((case, direction, head_dim, length, causal))

    def places(self, case, direction):
        """(head_dim, length, causal) of every row of a case."""
        return [key[2:] for key in self._rows if key[:2] == (case, direction)]

    def speedup(self, case, base, direction, place):
        """Times faster than `base` at the same place, or None."""
        one, other = (self.get(name, direction, *place) for name in (case, base))
        return other["ms"] / one["ms"] if one and other else None

    def total(self, case, place):
        """Milliseconds of forward and backward together, or None."""
        rows = [self.get(case, direction, *place) for direction in ("forward", "backward")]
        return sum(row["ms"] for row in rows) if all(rows) else None


def where(place):
    head_dim, length, causal = place
    return f"{'causal' if causal else 'full'}, head_dim {head_dim}, {length:,} tokens"


def verdict(row, case, needed, figures, unit="x", at_least=True):
    """One line: the worst of {place: figure}, against what is needed."""
    found = {place: value for place, value in figures.items() if value is not None}
    line = {"target": row, "case": case, "needed": needed, "unit": unit, "at_least": at_least}
    if not found:
        return {**line, "measured": None, "where": "", "status": UNMEASURED}
    place = (min if at_least else max)(found, key=found.get)
    worst = found[place]
    good = worst >= needed if at_least else worst <= needed
    return {
        **line,
        "measured": worst,
        "where": where(place) if isinstance(place, tuple) else place,
        "status": MET if good else MISSED,
    }


def _long_places(measured, case, direction):
    return [
        place
        for place in measured.places(case, direction)
        if place[0] == HEAD_DIM and place[1] >= LENGTH
    ]


def _against(measured, row, case, base, direction, needed, places=None):
    places = _long_places(measured, case, direction) if places is None else places
    figures = {p: measured.speedup(case, base, direction, p) for p in places}
    return verdict(f"{row}, over {base}", case, needed, figures)


def speed_targets(measured):
    lines = []
    families = {
        gpu_cases.ONE_PASS: ("one-pass forward", 1.0),
        gpu_cases.TWO_SWEEP: ("two-sweep forward, 2/3 of one-pass", 2 / 3),
    }
    for case in gpu_cases.OURS:
        if case.family in families:
            row, share = families[case.family]
            for base, needed in ((gpu_cases.FLASH, OVER_FLASH), (gpu_cases.CUDNN, OF_CUDNN)):
                lines.append(
                    _against(measured, row, case.name, base, "forward", round(share * needed, 3))
                )
    for case in gpu_cases.OURS:
        if case.family == gpu_cases.POINTWISE:
            row = "pointwise forward"
            lines.append(_against(measured, row, case.name, "softmax", "forward", OVER_SOFTMAX))
            figures = {
                place: measured.get(case.name, "forward", *place)["tflops"]
                for place in _long_places(measured, case.name, "forward")
            }
            lines.append(verdict(row, case.name, POINTWISE_TFLOPS, figures, " TFLOP/s"))
    for case in gpu_cases.OURS:
        if case.family in (gpu_cases.ONE_PASS, gpu_cases.POINTWISE):
            lines.append(
                _against(measured, "backward", case.name, gpu_cases.FLASH, "backward", 1.0)
            )
    for direction in ("forward", "backward"):
        original = gpu_cases.ORIGINAL_SOFTPICK
        places = measured.places(original, direction)
        lines.append(_against(measured, direction, "softpick", original, direction, 3.0, places))
    return lines


def sparse_and_linear_targets(measured):
    lines = []
    sparse = "sparsemax peaked"
    causal = [p for p in measured.places(sparse, "backward") if p[2]]
    for row, places in (
        ("forward + backward at 8k", [p for p in causal if p[1] == 8192]),
        ("forward + backward beyond 8k", [p for p in causal if p[1] > 8192]),
    ):
        figures = {}
        for place in places:
            mine, flash = (measured.total(name, place) for name in (sparse, gpu_cases.FLASH))
            figures[place] = flash / mine if mine and flash else None
        lines.append(verdict(f"{row}, over {gpu_cases.FLASH}", sparse, 1.0, figures))
    for direction in ("forward", "backward"):
        places = [p for p in measured.places("cosformer", direction) if p[1] == 8192 and p[2]]
        row = f"causal {direction} at 8k"
        lines.append(_against(measured, row, "cosformer", gpu_cases.FLASH, direction, 1.0, places))
    return [*lines, _linear_memory(measured)]


def _linear_memory(measured):
    """Growth of cosFormer's memory per token from the shortest to the longest batch of one."""
    figures = {}
    for head_dim, causal in {(p[0], p[2]) for p in measured.places("cosformer", "backward")}:
        per_token = {}
        for place in measured.places("cosformer", "backward"):
            row = measured.get("cosformer", "backward", *place)
            alike = (place[0], place[2]) == (head_dim, causal)
            if alike and row["batch"] == 1 and row.get("peak_mib"):
                per_token[place[1]] = row["peak_mib"] / place[1]
        if len(per_token) > 1:
            first, last = min(per_token), max(per_token)
            figures[head_dim, last, causal] = per_token[last] / per_token[first]
    return verdict(
        "memory per token, longest over shortest", "cosformer", 1.1, figures, at_least=False
    )


def accuracy_targets(result):
    lines = []
    worst, repeatable = {}, {}
    for entry in result["accuracy"]:
        name = entry["case"]
        if "error" in entry:
            continue
        value = math.inf if entry["worst"] is None else entry["worst"]
        place = f"{entry['dtype']}, {'causal' if entry['causal'] else 'full'}"
        worst.setdefault(name, {})[place] = value
        repeatable.setdefault(name, {})[place] = float(entry["repeatable"])
    for case in gpu_cases.OURS:
        lines.append(
            verdict(
                "error of out and gradients, times plain PyTorch's",
                case.name, 2.0, worst.get(case.name, {}), at_least=False,
            )
        )  # fmt: skip
    for case in gpu_cases.OURS:
        figures = repeatable.get(case.name, {})
        lines.append(verdict("bitwise repeatable, 1 = yes", case.name, 1.0, figures, ""))
    return lines


def evaluate(result):
    """Every target with what was measured at its worst place, and "met", "missed" or neither."""
    measured = Measured(result)
    return [
        *speed_targets(measured),
        *sparse_and_linear_targets(measured),
        *accuracy_targets(result),
    ]
