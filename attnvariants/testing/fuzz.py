"""A differential fuzz: random calls of an engine against the float64 reference.

Cases are drawn by number from a seed (`cases`), judged with regard to their condition (`judge`),
shrunk where they fail, and counted by variant, feature and engine.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnvariants import blocks
from attnvariants.testing import judge
from attnvariants.testing.cases import DEFAULTS, Case, build, complete, draw, shorten

# Engines that multiply in half precision where the inputs are.
_HALF_PRODUCTS = "triton", "sdpa"
_BATCH = 25
_MOST_SHRINKS = 80


@dataclass
class Finding:
    """A case that fails, as it was drawn and shrunk, and what is wrong with it."""

    case: Case
    faults: list[str]

    def __str__(self) -> str:
        return f"--only '{json.dumps(self.case)}'  # {'; '.join(self.faults)}"


@dataclass
class Tally:
    """What a run came to.

    Attributes:
        cases: how many were judged.
        refused: how many the engine said it cannot run, by reason.
        covered: cases by (variant, feature, engine).
        findings: those that fail.
    """

    cases: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    covered: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another's as one's own."""
        self.cases += other.cases
        self.refused.update(other.refused)
        self.covered.update(other.covered)
        self.findings += other.findings


class Refused(Exception):
    """The engine says in a sentence that it cannot run the case."""


def faults_of(case: Mapping[str, Any], hasty: bool = False) -> list[str]:
    """What is wrong with an engine's results for a case; empty if nothing is. `hasty` as `compare`.

    Raises:
        Refused: neither the engine nor its reference runs it, or it is beyond the engine.
    """
    full = complete(case)
    dtype, impl = getattr(torch, full["dtype"]), full["impl"]
    unit = None
    if impl in _HALF_PRODUCTS and dtype in (torch.float16, torch.bfloat16):
        unit = torch.finfo(dtype).eps
    call = build(case)
    try:
        wanted = call.run("reference", torch.float64)
    except ValueError as refusal:
        wanted, reason = None, str(refusal)
    try:
        with _small_blocks(full["blocks"]):
            found = call.run(impl, dtype)
    except ValueError as refusal:
        if wanted is None or f"impl={impl!r} cannot run" in str(refusal):
            raise Refused(str(refusal)) from None
        return [f"refused, which the reference is not: {refusal}"]
    except Exception as error:
        return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    if wanted is None:
        return [f"accepted, which the reference is not: {reason}"]
    faults = judge.compare(found, wanted, dtype, call.again, unit, hasty)
    return [str(fault) for fault in judge.as_plain(call, faults, found, dtype)]


@contextmanager
def _small_blocks(sizes: list[int] | None) -> Iterator[None]:
    """The chunked engine with blocks of a few rows and scores, so that small calls have many."""
    before = blocks._BLOCK_ROWS, blocks._THREAD_SCORES
    try:
        if sizes is not None:
            blocks._BLOCK_ROWS, blocks._THREAD_SCORES = sizes
        yield
    finally:
        blocks._BLOCK_ROWS, blocks._THREAD_SCORES = before


def shrink(case: Mapping[str, Any]) -> Case:
    """A smaller case that fails too, each field as near to its default as that allows."""
    best, left = complete(case), _MOST_SHRINKS
    shrunk = True
    while shrunk and left > 0:
        shrunk = False
        for name in DEFAULTS:
            for smaller in _smaller(name, best[name]):
                trial = {**best, name: smaller}
                left -= 1
                if left > 0 and _fails(trial):
                    best, shrunk = trial, True
                    break
    return shorten(best)


def _fails(case: Case) -> bool:
    try:
        return bool(faults_of(case, hasty=True))
    except (Refused, ValueError):
        return False


def _smaller(name: str, value: Any) -> list[Any]:
    """Simpler values of a field, the simplest first."""
    default = DEFAULTS[name]
    if value == default or name in ("variant", "impl", "seed"):
        return []
    found = [default]
    if isinstance(value, dict):
        found += [{k: v for k, v in value.items() if k != gone} for gone in value]
    elif name == "sizes":
        found += [[*value[:i], 1.0, *value[i + 1 :]] for i in range(len(value)) if value[i] != 1]
    elif name == "packed":
        found += [value[:i] + value[i + 1 :] for i in range(len(value)) if len(value) > 1]
    elif isinstance(value, int) and not isinstance(value, bool):
        found += [size for size in (1, 2, value // 2, value - 1) if 0 < size < value]
    return [smaller for smaller in found if smaller != value]


def features(case: Mapping[str, Any]) -> list[str]:
    """What a case is a case of, for the table of coverage."""
    full = complete(case)
    q_len, kv_len = full["q_len"], full["kv_len"]
    found = [full["dtype"]]
    for name in ("mask", "bias", "alibi", "layout", "special"):
        if full[name] is not None:
            found.append(f"{name} {full[name]}")
    flags = {
        "causal": full["causal"],
        "window": full["window"] is not None,
        "softcap": full["softcap"] is not None,
        "scale": full["scale"] is not None,
        "dropout": bool(full["dropout"]),
        "packed": full["packed"] is not None,
        "GQA": full["heads"] > full["kv_heads"] > 1,
        "MQA": full["heads"] > full["kv_heads"] == 1,
        "value_dim": full["dim"] != full["value_dim"],
        "no queries or keys": not (q_len and kv_len),
        "one query": q_len == 1,
        "cached keys": 0 < q_len < kv_len,
        "more queries than keys": q_len > kv_len > 0,
        "several tiles": max(q_len, kv_len) > 32,
        "magnitude": full["sizes"] != DEFAULTS["sizes"],
        "extreme magnitude": any(not 1e-4 < size < 1e4 for size in full["sizes"]),
        "small blocks": full["blocks"] is not None,
    }
    found += [name for name, there in flags.items() if there]
    found += [
        f"{name} learned" if value in ("heads", "scalar") else f"option {name}"
        for name, value in full["options"].items()
    ]
    return found


def run(seed: int, start: int, stop: int, impl: str) -> Tally:
    """Judge the cases of these numbers."""
    tally = Tally()
    for index in range(start, stop):
        case = draw(seed, index, impl)
        try:
            faults = faults_of(case)
        except Refused as refusal:
            tally.refused[str(refusal)[:100]] += 1
            continue
        tally.cases += 1
        full = complete(case)
        tally.covered.update((full["variant"], name, impl) for name in ("any", *features(case)))
        if faults:
            small = shrink(case)
            # shrinking is hasty: a jump may have come in its way
            found = faults_of(small)
            tally.findings.append(Finding(small, found) if found else Finding(case, faults))
    return tally


def run_all(seed: int, cases: int, impl: str, workers: int = 1) -> Iterator[Tally]:
    """`run` in parts, by several processes; of a seed and a number of cases always the same."""
    parts = [(seed, start, min(start + _BATCH, cases), impl) for start in range(0, cases, _BATCH)]
    if workers <= 1:
        yield from (run(*part) for part in parts)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(run, *zip(*parts, strict=True))


def write_coverage(tally: Tally, folder: Path) -> None:
    """`coverage.json` and `coverage.md`: how many cases of each variant, feature and engine."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"variant": variant, "feature": feature, "engine": engine, "cases": count}
        for (variant, feature, engine), count in sorted(tally.covered.items())
    ]
    variants, names, engines = (sorted({place[i] for place in tally.covered}) for i in range(3))
    summary = {
        "cases": tally.cases,
        "refused": dict(tally.refused),
        "failures": [{"case": each.case, "faults": each.faults} for each in tally.findings],
        "covered": rows,
    }
    (folder / "coverage.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [f"{tally.cases} cases judged, {len(tally.findings)} failures."]
    for engine in engines:
        lines += ["", f"## {engine}", "", "| feature | " + " | ".join(variants) + " |"]
        lines.append("|---|" + "---:|" * len(variants))
        for name in names:
            counts = (str(tally.covered[variant, name, engine]) for variant in variants)
            lines.append(f"| {name} | " + " | ".join(counts) + " |")
    (folder / "coverage.md").write_text("\n".join(lines) + "\n")
