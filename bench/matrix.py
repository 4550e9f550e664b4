"""`python -m bench.matrix`: the versions that are promised, each in an environment of its own.

Writes docs/compatibility.md and the results behind it, and fails if a test of them fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/compatibility.json"
PAGE = ROOT / "docs/compatibility.md"
SECONDS = 900
TOOLS = ("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "einops", "numpy", "entmax")


@dataclass(frozen=True)
class Group:
    """A part of the compatibility set: arguments for pytest.

    Attributes:
        title: what it tests.
        tests: files and options.
        interpreted: in Triton's interpreter, which reads its variable when it is imported.
        models: needs transformers.
    """

    title: str
    tests: tuple[str, ...]
    interpreted: bool = False
    models: bool = True


GROUPS = {
    "call": Group(
        "the call, torch engines",
        ("tests/test_golden.py", "tests/test_engines.py", "tests/test_errors.py"),
        models=False,
    ),
    "kernels": Group(
        "the kernels, interpreted",
        ("tests/test_golden.py", "tests/kernels/test_linear_engine.py"),
        interpreted=True,
        models=False,
    ),
    "patcher": Group("the patcher", ("tests/test_hf.py", "tests/test_hf_names.py")),
    "verify": Group("the self-test", ("tests/test_hf_verify.py",)),
    "save": Group("save and load", ("tests/test_hf_checkpoint.py",)),
    "generation": Group("generation", ("tests/test_hf_generate.py", "-k", "not compile")),
}


@dataclass(frozen=True)
class Column:
    """An environment.

    Attributes:
        why: what it stands for, for readers.
        packages: what is installed; empty for the pinned environment.
        overlay: whether the packages lie over the pinned environment, which has the rest.
        groups: which parts of the set it runs.
    """

    why: str
    packages: tuple[str, ...] = ()
    overlay: bool = False
    groups: tuple[str, ...] = tuple(GROUPS)


def columns() -> dict[str, Column]:
    """The environments by name; the oldest versions are those of pyproject.toml."""
    promised = (ROOT / "pyproject.toml").read_text()
    oldest = [
        f"{name}=={re.search(rf'{name}>=([0-9.]+)', promised)[1]}.*"  # type: ignore[index]
        for name in ("torch", "transformers", "triton")
    ]
    models = tuple(name for name, group in GROUPS.items() if group.models)
    clients = ("transformers", "accelerate", "peft", "safetensors")
    return {
        "oldest": Column(
            "the oldest torch and transformers that are promised; its Triton is too old for the "
            "kernels",
            (*oldest[:2], *clients[1:], *TOOLS),
            groups=("call", *models),
        ),
        "pinned": Column("requirements.lock, what `make test` runs in"),
        "oldest-triton": Column(
            "the pinned environment with the oldest Triton that is promised",
            (oldest[2],),
            overlay=True,
            groups=("kernels",),
        ),
        "newest-transformers": Column(
            "the pinned environment with the newest transformers of the registry",
            ("transformers",),
            overlay=True,
            groups=models,
        ),
        "newest": Column(
            "the newest torch, Triton and transformers of the registry",
            ("torch", *clients, *TOOLS),
        ),
    }


def build(column: Column, folder: Path, pinned: Path) -> tuple[Path, list[str]]:
    """The Python of an environment and what its path begins with; installed where needed.

    Raises:
        subprocess.CalledProcessError: it cannot be installed.
    """
    python = pinned / "bin" / "python"
    # this package's own settings are those of the lock
    uv = [str(pinned / "bin" / "uv"), "--no-config"]
    if not column.packages:
        return python, []
    # the newest of today is not that of yesterday, and what is there already is not fetched again
    install = [*uv, "pip", "install", "--quiet", "--upgrade", *column.packages]
    if column.overlay:
        run_quietly([*install, "--python", str(python), "--target", str(folder)])
        return python, [str(folder)]
    own = folder / "bin" / "python"
    if not own.exists():
        run_quietly([*uv, "venv", "--quiet", "--python", str(python), str(folder)])
    run_quietly([*install, "--python", str(own)])
    return own, []


def run_quietly(words: list[str]) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def environment_of(path: list[str], interpreted: bool = False) -> dict[str, str]:
    """Variables for a run of this checkout."""
    paths = [*path, str(ROOT), str(ROOT / "kernels")]
    more = {"TRITON_INTERPRET": "1"} if interpreted else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def versions(python: Path, path: list[str]) -> dict[str, str]:
    """What is installed, by name."""
    code = (
        "import json, platform\nfrom importlib.metadata import version, PackageNotFoundError\n"
        "found = {'Python': platform.python_version()}\n"
        "for name in ('torch', 'transformers', 'triton'):\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: found[name] = '-'\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [str(python), "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=environment_of(path),
    )
    return json.loads(done.stdout)


def test(group: Group, python: Path, path: list[str]) -> dict:
    """Outcomes of one group: counts, seconds, and the names of what failed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        words = [str(python), "-m", "pytest", *group.tests, "-n", "auto", "-p", "no:cacheprovider"]
        words += ["--timeout", str(SECONDS), f"--junitxml={report}"]
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=environment_of(path, group.interpreted),
            capture_output=True,
            text=True,
        )
        seconds = round(time.monotonic() - started)
        if not report.exists():
            failed = [f"pytest ended with code {done.returncode}: {done.stderr[-300:].strip()}"]
            return {"passed": 0, "skipped": 0, "failed": failed, "seconds": seconds}
        result = read(report.read_text())
    if not result["passed"] and not result["failed"]:
        result["failed"] = ["no test ran"]
    for name in result["failed"]:
        print(f"FAILED {name}", flush=True)
    if result["failed"]:
        print(done.stdout[-6000:], flush=True)
    return {**result, "seconds": seconds}


def read(report: str) -> dict:
    """Counts and failures of a JUnit report."""
    outcomes: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
    for case in ElementTree.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"
        outcomes[kind].append(f"{case.get('classname')}::{case.get('name')}")
    counts = {name: len(found) for name, found in outcomes.items() if name != "failed"}
    return {**counts, "failed": sorted(outcomes["failed"])}


def measure(column: Column, folder: Path, pinned: Path) -> dict:
    """One environment's results."""
    today = datetime.date.today().isoformat()
    result: dict = {"date": today, "why": column.why, "versions": {}, "groups": {}}
    try:
        python, path = build(column, folder, pinned)
    except subprocess.CalledProcessError as error:
        return {**result, "error": " ".join(error.stderr.split())[:500]}
    result["versions"] = versions(python, path)
    if path and column.packages == ("transformers",) and result["versions"] == versions(python, []):
        # the registry has nothing newer than the lock
        return {**result, "same": "pinned"}
    for name in column.groups:
        result["groups"][name] = test(GROUPS[name], python, path)
        print(f"  {name}: {cell(result['groups'][name])}", flush=True)
    return result


def is_good(result: dict) -> bool:
    """Whether an environment was built, and every group of it passed."""
    return not result.get("error") and not any(g["failed"] for g in result["groups"].values())


def cell(group: dict | None) -> str:
    """One group's outcome in the table."""
    if group is None:
        return "-"
    counts = [f"{group['passed']} passed"]
    counts += [f"{group['skipped']} skipped"] if group["skipped"] else []
    counts += [f"**{len(group['failed'])} failed**"] if group["failed"] else []
    return f"{', '.join(counts)}, {group['seconds']} s"


def markdown(results: dict) -> str:
    """The page."""
    lines = [
        "# Compatibility",
        "",
        "Written by `make matrix`. Each column is an environment of its own, on a CPU; the set is",
        "the call, the patcher, its self-test, saving and loading, and generation. "
        f"{results['machine']}.",
        "",
        f"| | {' | '.join(results['columns'])} |",
        "|---" * (len(results["columns"]) + 1) + "|",
    ]
    found = results["columns"].values()
    rows = [("measured", [column["date"] for column in found])]
    for name in ("Python", "torch", "transformers", "triton"):
        rows.append((name, [column["versions"].get(name, "-") for column in found]))
    for name, group in GROUPS.items():
        cells = [
            f"as {column['same']}" if column.get("same") else cell(column["groups"].get(name))
            for column in found
        ]
        rows.append((group.title, cells))
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows]
    lines += [
        "",
        *(f"- **{name}**: {column['why']}." for name, column in results["columns"].items()),
    ]
    for name, column in results["columns"].items():
        if column.get("error"):
            lines += ["", f"{name} could not be installed: {column['error']}"]
        for group in column["groups"].values():
            lines += [f"- {name}, failed: `{test}`" for test in group["failed"]]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    """Measure the environments that are asked for; the others keep what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = columns()
    parser.add_argument("--folder", type=Path, required=True, help="where environments are kept")
    parser.add_argument("--pinned", type=Path, required=True, help="the pinned environment")
    parser.add_argument("--only", action="append", choices=list(known), help="one column")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"columns": {}}
    kept = {name: before["columns"][name] for name in known if name in before["columns"]}
    fresh = {}
    for name in options.only or known:
        print(f"{name}: {known[name].why}", flush=True)
        folder = options.folder.resolve() / name
        fresh[name] = measure(known[name], folder, options.pinned.resolve())
        if fresh[name].get("error"):
            print(f"  could not be installed: {fresh[name]['error']}", flush=True)
    merged = {name: {**kept, **fresh}[name] for name in known if name in {**kept, **fresh}}
    if not options.check:
        machine = f"{platform.system()} {platform.machine()}"
        results = {"machine": machine, "columns": merged}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(markdown(results))
    return 0 if all(map(is_good, fresh.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
