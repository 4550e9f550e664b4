"""The command line: `attnvariants list | show | diagnose | demo | models | patch-check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from attnvariants import __version__
from attnvariants.registry import Option, get_variant, list_variants

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: the command line needs {error.name}; pip install 'attnvariants[cli]'."
    ) from None

app = typer.Typer(
    name="attnvariants",
    help="Attention variants: what there is, and what attention does in a model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app()


@contextmanager
def _errors() -> Iterator[None]:
    """Bad input ends with one sentence on stderr and exit code 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnvariants {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Attention variants: what there is, and what attention does in a model."""


@app.command("list")
def list_command(
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table.")] = False,
) -> None:
    """List the variants with their row sums, options and sources."""
    if markdown:
        typer.echo(variants_markdown())
        return
    variants = [get_variant(name) for name in list_variants()]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("variant", "what it is", "rows sum to", "options", "arXiv"):
        table.add_column(heading, no_wrap=heading in ("variant", "rows sum to", "arXiv"))
    for variant in variants:
        options = ", ".join(
            f"{name}={_default(option)}{' (learned)' if option.learned else ''}"
            for name, option in variant.options.items()
        )
        table.add_row(variant.name, variant.summary, variant.row_sum, options, variant.arxiv)
    Console().print(table)


def variants_markdown() -> str:
    """The table of variants, in Markdown."""
    lines = [
        "| Variant | What it is | Rows sum to | Learned per head | Options and defaults | Source |",
        "|---|---|---|---|---|---|",
    ]
    for variant in map(get_variant, list_variants()):
        learned = ", ".join(
            f"`{name}`" if name in variant.default_learned else f"`{name}` (if given)"
            for name in variant.learned
        )
        options = ", ".join(
            f"`{name}={_default(option)}`" for name, option in variant.options.items()
        )
        source = f"[{variant.arxiv}](https://arxiv.org/abs/{variant.arxiv})"
        cells = (
            f"`{variant.name}`",
            variant.summary.rstrip(".").replace("|", "\\|"),
            variant.row_sum,
            learned or "none",
            options or "none",
            source if variant.arxiv else "none",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _default(option: Option) -> str:
    return option.default if isinstance(option.default, str) else f"{option.default}"


@app.command()
def show(variant: Annotated[str, typer.Argument(help="Name of a variant, see `list`.")]) -> None:
    """Show a variant: formula, options, what it refuses, presets, source."""
    with _errors():
        found = get_variant(variant)
    lines = [f"{found.name}: {found.summary}", "", *(f"    {x}" for x in found.formula.split("\n"))]
    lines += ["", f"rows sum to: {found.row_sum}"]
    lines += [f"weights: {'>= 0' if found.nonnegative else 'of either sign'}"]
    own = f"its own, {found.scale:g}; a model's is not passed" if found.own_scale else ""
    lines += [f"scale: {own or '1/sqrt(head_dim) unless given'}"]
    lines += ["", "options:" if found.options else "options: none"]
    for name, option in found.options.items():
        notes = [f"default {_default(option)}", option.accepts()]
        if option.learned:
            always = name in found.default_learned
            notes.append("learned in patched models" + ("" if always else " if given"))
        if option.from_config:
            notes.append(f"patched models take the config's {option.from_config}")
        lines += [f"  {name}: {option.doc}", *(f"      {note}" for note in notes)]
    if found.refuses:
        lines += ["", "refuses:", *(f"  {name}: {why}" for name, why in found.refuses.items())]
    if found.presets:
        lines += ["", "presets (values for models trained at 1,024 and at 8,192 tokens):"]
        for name, preset in found.presets.items():
            values = [", ".join(f"{k}={v:.4g}" for k, v in preset(n).items()) for n in (1024, 8192)]
            lines.append(f"  {name}: {values[0]} and {values[1]}")
    if found.arxiv:
        lines += ["", f"source: https://arxiv.org/abs/{found.arxiv}"]
    typer.echo("\n".join(lines))


@app.command()
def diagnose(
    model: Annotated[Path, typer.Argument(help="Model folder, with a tokenizer; on disk.")],
    variant: Annotated[
        str | None, typer.Option(help="Also measure the model with this variant put in, untrained.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of the variant's values.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, an option of the variant; repeatable.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text; default Python's own help topics.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 64,
    windows: Annotated[int, typer.Option(min=1, help="At most so many sequences.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")] = 4,
    threshold: Annotated[float, typer.Option(help="Weight that makes a sink.")] = 0.3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a picture, layers by heads; one more with _VARIANT in its name."),
    ] = None,
    definitions: Annotated[bool, typer.Option(help="Print what each figure means.")] = True,
) -> None:
    """Measure sinks, row mass, entropy, outliers and dead heads of a model folder.

    The text is cut into consecutive windows; each gets the tokenizer's special tokens. Sink rates
    fall with the window, so compare them at one window only.
    """
    with _errors():
        _diagnose(
            model,
            variant,
            dict(preset=preset, **_parse_options(option or [])),
            text,
            (window, windows, batch_size, threshold),
            (json_path, plot),
            definitions,
        )


def _diagnose(
    folder: Path,
    variant: str | None,
    settings: dict[str, Any],
    text_path: Path | None,
    sizes: tuple[int, int, int, float],
    outputs: tuple[Path | None, Path | None],
    definitions: bool,
) -> None:
    if variant is None and any(value is not None for value in settings.values()):
        raise ValueError("--preset and --option set up a variant; name it with --variant.")
    if variant is not None:
        get_variant(variant)
    window, windows, batch_size, threshold = sizes
    json_path, plot_path = outputs
    for path in outputs:
        _check_writable(path)
    if plot_path is not None:
        _check_picture(plot_path)

    from attnvariants.diagnostics import local
    from attnvariants.diagnostics.metrics import check_threshold

    check_threshold(threshold)
    local.check_folder(folder)
    text = local.default_text() if text_path is None else local.read_text(text_path)
    import transformers

    from attnvariants.diagnostics import DEFINITIONS, diagnose
    from attnvariants.diagnostics.report import compare
    from attnvariants.hf import patch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = local.load_tokenizer(folder)
    ids = local.text_windows(tokenizer, text, window, windows)
    model, missing = local.load_model(folder)
    local.check_fits(model, ids)
    if missing:
        typer.echo(
            f"warning: {folder} lacks {len(missing)} of the model's weights, which are random "
            f"now: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}",
            err=True,
        )
    if variant is not None:
        # bad options are found before anything is measured
        patch(model, variant, **settings).unpatch()

    def measure(label: str) -> Any:
        with _progress(label, len(ids)) as advance:
            return diagnose(
                model, ids, sink_threshold=threshold, batch_size=batch_size, progress=advance
            )

    reports = {"as saved": measure("as saved")}
    if variant is not None:
        with patch(model, variant, **settings):
            reports[variant] = measure(variant)

    console = Console()
    console.print(
        f"{folder.name}: {len(ids)} windows of {window} tokens, sink threshold {threshold:g}"
    )
    for label, report in reports.items():
        console.print(report.table(title=label))
        if report.hidden:
            console.print(report.hidden_table(title=label))
    console.print(compare(reports))
    for name, reason in reports["as saved"].skipped.items():
        console.print(f"not measured: {name}: {reason}")
    if definitions:
        named = {n for report in reports.values() for n in report.summary()} | {"dead_head"}
        for name, definition in DEFINITIONS.items():
            if name in named:
                console.print(f"[bold]{name}[/bold]: {definition}", highlight=False)
    if json_path is not None:
        record = {label: report.to_dict() for label, report in reports.items()}
        json_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if plot_path is not None:
        for label, report in reports.items():
            path = plot_path
            if len(reports) > 1 and label == variant:
                path = plot_path.with_stem(f"{plot_path.stem}_{variant}")
            report.plot(path)


# arguments of `patch` and `check` that are no options of a variant, nor of its preset
_NOT_OPTIONS = (
    "backend", "impl", "layers", "masks", "model", "penalties", "preset", "trainable", "variant",
    "verify",
)  # fmt: skip


def _parse_options(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it parses as such, else a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier() or name in _NOT_OPTIONS:
            raise ValueError(f"--option takes NAME=VALUE, got {pair!r}.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _check_writable(path: Path | None) -> None:
    """Raise ValueError before any work is done if a file cannot be written there."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file to write.")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} into.")
    try:
        exists = path.exists()
        with path.open("a"):
            pass
        if not exists:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}.") from None


def _check_picture(path: Path) -> None:
    """Raise ValueError unless matplotlib can write a picture of that ending."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"matplotlib writes no {path.suffix or 'file without an ending'}; give {path.stem} "
            f"one of the endings {', '.join(known)}."
        )


@contextmanager
def _progress(label: str, total: int) -> Iterator[Any]:
    """A progress bar on stderr, gone when done; yields a function (done, total)."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done, _: bar.update(task, completed=done)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and variants.")] = False,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    variants: Annotated[
        str | None, typer.Option(help="Comma-separated variants; default the demo's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for figures and results.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at once.")] = None,
) -> None:
    """Train tiny models until softmax grows a sink, and compare the variants; no GPU needed."""
    with _errors():
        numbers = _parse_seeds(seeds)
        names = None if variants is None else [name.strip() for name in variants.split(",")]
        for name in names or ():
            get_variant(name)
        _make_folder(out)
        from attnvariants.demo import run_demo

        run_demo(seeds=numbers, variants=names, quick=quick, out=out, jobs=jobs, console=Console())


def _parse_seeds(seeds: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or max(numbers) >= 2**63:
        raise ValueError(f"--seeds takes integers >= 0 with commas, below 2^63, got {seeds!r}.")
    return numbers


def _make_folder(out: Path | None) -> None:
    """Make the folder, or raise ValueError if nothing can be written into it."""
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write into.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".attnvariants"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}.") from None


# at the end, because these commands use what is above
from attnvariants import cli_models  # noqa: E402

app.command()(cli_models.models)
app.command("patch-check")(cli_models.patch_check)
