"""`python -m attnvariants.testing fuzz`: random calls against the float64 reference."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from attnvariants.testing import fuzz


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 if a call is off."""
    parser = argparse.ArgumentParser(prog="python -m attnvariants.testing", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "fuzz", help="random calls of an engine against the float64 reference"
    )
    command.add_argument("--cases", type=int, default=1000, help="how many calls")
    command.add_argument("--seed", type=int, default=0, help="another seed, other calls")
    command.add_argument(
        "--impl",
        default="chunked",
        choices=["chunked", "triton", "sdpa"],
        help="engine; triton needs a GPU or TRITON_INTERPRET=1",
    )
    command.add_argument("--workers", type=int, default=1, help="processes")
    command.add_argument("--out", type=Path, help="folder for coverage.json and coverage.md")
    command.add_argument("--only", help="one case, as a failure prints it")
    given = parser.parse_args(arguments)
    return _only(given.only) if given.only is not None else _fuzz(given)


def _only(text: str) -> int:
    case = json.loads(text)
    try:
        faults = fuzz.faults_of(case)
    except fuzz.Refused as refusal:
        print(f"refused: {refusal}")
        return 0
    print("\n".join(faults) or "nothing is off")
    return int(bool(faults))


def _fuzz(given: argparse.Namespace) -> int:
    from rich.progress import Progress

    tally = fuzz.Tally()
    # lines that reproduce failures go to the output, progress does not
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("calls", total=given.cases)
        for part in fuzz.run_all(given.seed, given.cases, given.impl, given.workers):
            tally.add(part)
            progress.advance(task, part.cases + part.refused.total())
            for finding in part.findings:
                print(finding, flush=True)
    if given.out is not None:
        fuzz.write_coverage(tally, given.out)
    if not tally.cases:
        print("no call could be run:", *tally.refused, sep="\n  ")
        return 1
    print(
        f"{tally.cases} calls of impl={given.impl!r} judged, {tally.refused.total()} refused, "
        f"{len(tally.findings)} off."
    )
    return int(bool(tally.findings))


if __name__ == "__main__":
    sys.exit(main())
