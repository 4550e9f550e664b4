"""The commands `attnvariants models` and `attnvariants patch-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attnvariants import cli
from attnvariants.registry import get_variant

_STYLES = {
    "identical": "green",
    "by hook": "green",
    "passed": "green",
    "refused": "yellow",
    "different": "red",
    "hidden keys counted": "red",
    "FAILED": "red",
}


def models(
    types: Annotated[
        list[str] | None, typer.Argument(help="Model types, as config.json names them; all.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one type.")] = 120.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Keep the results here.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Do not repeat what the file of --json holds.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
) -> None:
    """Try every architecture of the installed transformers: which can be patched, and why not.

    Each is built tiny with random weights, patched with softmax and compared with itself, and with
    other variants, to which hidden keys must be absent. All of them take about twenty minutes; exit
    code 1 if one came out different or counts hidden keys.
    """
    with cli._errors():
        for path in (json_path, markdown):
            cli._check_writable(path)
        if resume and json_path is None:
            raise ValueError("--resume continues the file of --json; pass --json too.")
        _need_transformers()
        from attnvariants.hf.architectures.sweep import check_types, summary, sweep
        from attnvariants.hf.architectures.table import models_markdown

        check_types(types)
        # not before all else is known to be right: it may be ten minutes' work
        if json_path is not None and not resume:
            json_path.unlink(missing_ok=True)
        with _progress() as advance:
            result = sweep(types, jobs=jobs, timeout=timeout, path=json_path, progress=advance)
        if markdown is not None:
            markdown.write_text(models_markdown(result), encoding="utf-8")
    console = Console()
    console.print(_models_table(result))
    console.print(summary(result))
    raise typer.Exit(1 if result.bad else 0)


def _progress() -> Any:
    """A progress bar on stderr; yields what `sweep` calls."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def bar():
        console = Console(stderr=True)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            task = progress.add_task("model types", total=None)
            yield lambda done, total, outcome: progress.update(
                task, completed=done, total=total, description=outcome.model_type
            )

    return bar()


def _models_table(result: Any) -> Table:
    from attnvariants.hf.architectures.table import row_of

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("type", "model", "verdict", "difference", "hidden", "attention", "notes"):
        figure = heading in ("difference", "hidden")
        table.add_column(heading, no_wrap=figure or heading in ("type", "verdict"))
    for outcome in result.outcomes.values():
        cells = row_of(outcome)
        verdict = f"[{_STYLES.get(cells[2], 'dim')}]{cells[2]}[/]"
        table.add_row(cells[0].strip("`"), cells[1], verdict, *cells[3:])
    return table


def patch_check(
    model: Annotated[
        Path, typer.Argument(help="Model folder on disk; or a config.json, or a folder with one.")
    ],
    variant: Annotated[
        list[str] | None, typer.Option(help="Variant to test; repeatable. Default softmax.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of the variant's values.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, an option of the variant; repeatable.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="As in patch: dispatch, or softmax-hook.")
    ] = None,
    masks: Annotated[str | None, typer.Option(help="As in patch: lazy or bool.")] = None,
) -> None:
    """Test identity, future leak, padding, caches and restoring of a patch on one model.

    A bare config gives a model with random weights, of toy sizes if the config's are large. Only
    safetensors files are read and no code of the folder is run. Exit code 1 if a test failed.
    """
    with cli._errors():
        names = variant or ["softmax"]
        settings: dict[str, Any] = cli._parse_options(option or [])
        for name in names:
            get_variant(name)
        given = {"preset": preset, "backend": backend, "masks": masks}
        settings.update({name: value for name, value in given.items() if value is not None})
        _need_transformers()
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        from attnvariants.hf.architectures.check import check

        results = [check(model, name, **settings) for name in names]
    console = Console()
    for result in results:
        console.print(_check_table(result))
        words = "all tests passed" if result.passed else "FAILED"
        console.print(f"{result.model} with {result.variant}: {words}\n", highlight=False)
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


def _check_table(result: Any) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("test", "result", "figure", "what was compared"):
        table.add_column(heading, no_wrap=heading != "what was compared")
    words = {True: "passed", False: "FAILED", None: "not applicable"}
    for entry in result.checks:
        word = words[entry.passed]
        figure = "" if entry.figure is None else f"{entry.figure:.2g}"
        table.add_row(entry.name, f"[{_STYLES.get(word, 'dim')}]{word}[/]", figure, entry.note)
    return table


def _need_transformers() -> None:
    """Raise ValueError unless models can be patched here."""
    try:
        from attnvariants.hf import masks

        masks.register()
    except ImportError as error:
        raise ValueError(f"{error}") from error
