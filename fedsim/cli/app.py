"""Commands and their options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from fedsim import __version__

app = typer.Typer(
    name="fedsim",
    help="Federated learning of audio-to-visual adapters, simulated on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# typer reads annotations at run time: Optional is what Python 3.10 accepts in all of them.
ConfigFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Argument(metavar="[CONFIG]", help="YAML or JSON file; default: the embedded quickstart"),
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. --set federation.alpha=0.1; repeatable"),
]
Address = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--address", help="Ray cluster to join (same as resources.address); default: a private Ray"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="warnings and the result only")]


def _version(value: bool) -> None:
    if value:
        print(f"fedsim {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Federated learning of audio-to-visual adapters, simulated on Ray."""


def _log_to(console: Console, *, quiet: bool = False) -> None:
    """Log records of fedsim go to the console, one plain line each."""
    logger = logging.getLogger("fedsim")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.handlers = [_Lines(console)]
    logger.propagate = False
    logging.captureWarnings(True)


class _Lines(logging.Handler):
    """Prints messages as they are, never wrapped; warnings and errors say that they are."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self._console.print(prefix + record.getMessage(), markup=False, highlight=False, soft_wrap=True)


def _with_address(overrides: list[str] | None, address: str | None) -> list[str]:
    return [*(overrides or []), *([f"resources.address={address}"] if address else [])]


@app.command()
def run(
    config: ConfigFile = None,
    overrides: Overrides = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", help="run directory, new or empty (default: <experiment.output_dir>/<name>-<time>)"),
    ] = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment."""
    console = Console(soft_wrap=True)
    _log_to(console, quiet=quiet)
    from fedsim.config import load_config

    resolved = load_config(config, _with_address(overrides, address))
    from fedsim.cli import session

    session.run(resolved, output=output, console=console)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="run directory of an interrupted run")],
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Go on with an interrupted run from its newest checkpoint; the result is that of an uninterrupted run."""
    console = Console(soft_wrap=True)
    _log_to(console, quiet=quiet)
    from fedsim.cli import session

    session.resume(run_dir, address=address, console=console)


@app.command()
def sync(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="run directories, also of trials")],
    quiet: Quiet = False,
) -> None:
    """Deliver to MLflow what it lacks of runs whose store was away; nothing arrives twice."""
    _log_to(Console(soft_wrap=True), quiet=quiet)
    from fedsim.cli import session

    for run_dir in run_dirs:
        session.sync(run_dir)


@app.command()
def search(
    config: ConfigFile = None,
    overrides: Overrides = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", help="folder of the search, new or empty (default: <output_dir>/<name>-search-<time>)"
        ),
    ] = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Search hyper-parameters (section `search`) with Ray Tune, ASHA and Optuna."""
    console = Console(soft_wrap=True)
    _log_to(console, quiet=quiet)
    from fedsim.config import load_config

    resolved = load_config(config, _with_address(overrides, address))
    from fedsim.cli import session

    session.search(resolved, output=output, console=console)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run directories")],
    csv: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--csv", help="also write the table to this file"),
    ] = None,
) -> None:
    """Compare runs: final metrics, and the configuration keys that differ."""
    from fedsim.report.compare import compare_runs, render, write_csv

    comparison = compare_runs(runs)
    if csv is not None:
        write_csv(comparison, csv)
    Console(soft_wrap=False).print(render(comparison))


@app.command()
def embed(config: ConfigFile = None, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Fill the embedding cache of an experiment, without running it."""
    console = Console(soft_wrap=True)
    _log_to(console, quiet=quiet)
    from fedsim.config import load_config

    resolved = load_config(config, overrides or [])
    from fedsim.cli import session

    setup = session.prepare_with_bar(resolved, console)
    print(f"{len(setup.labels)} recordings, {len(setup.class_names)} classes, {setup.used['audio_encoder']}")
    print(f"embeddings: {setup.store_path}")


@app.command("config")
def show_config(
    config: ConfigFile = None,
    overrides: Overrides = None,
    explain: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--explain", metavar="KEY", help="what a key or section means, its default, unit and limits"),
    ] = None,
) -> None:
    """Print the resolved configuration, or explain one key."""
    from fedsim import config as configuration

    if explain is not None:
        print(configuration.explain(explain))
    else:
        print(configuration.resolved_yaml(configuration.load_config(config, overrides or [])), end="")


@app.command()
def doctor() -> None:
    """Check the installation: versions, cores, GPUs, data, cache, MLflow, Ray."""
    from fedsim.cli.doctor import examine

    raise typer.Exit(examine(Console(soft_wrap=True)))
