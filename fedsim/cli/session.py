"""What the commands do: prepare data, open the experiment, run its rounds, show what happens and where it lies."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsim.config import Config, load_config, resolved_yaml
from fedsim.errors import CheckpointError, TrackingError
from fedsim.federation.checkpoint import ServerState, check_data, load_checkpoint
from fedsim.federation.checkpoint_files import checkpoints_of, has_checkpoint, round_of
from fedsim.federation.experiment import finish_record, run_rounds
from fedsim.federation.run_directory import (
    create_run_directory,
    discard_unused,
    keep_rounds,
    read_result,
    write_text,
    writing,
)
from fedsim.federation.run_lock import locked
from fedsim.federation.setup import Setup, prepare
from fedsim.launch.auto import settle
from fedsim.launch.session import open_experiment
from fedsim.launch.signals import ended_by_signals
from fedsim.tracking.ledger import has_record
from fedsim.tracking.mlflow_tracker import WAIT_S, MlflowTracker
from fedsim.tracking.progress import ProgressDisplay

log = logging.getLogger(__name__)


def run(config: Config, *, output: Path | str | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run an experiment.

    Args:
        config: from `load_config`.
        output: run directory, new or empty; None for a new one in `experiment.output_dir`.
        console: where progress is shown.

    Returns:
        The contents of result.json.

    Raises:
        FedsimError: anything a user can mend, in one line.
    """
    console = console or Console(quiet=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = Path(output or Path(config.experiment.output_dir) / f"{config.experiment.name}-{stamp}").absolute()
    with _stoppable(run_dir, config), locked(run_dir, new=True):
        create_run_directory(run_dir, config)
        try:
            return _run(_prepare(config, run_dir, console), run_dir, None, None, console)
        except BaseException:
            discard_unused(run_dir)
            raise


def resume(run_dir: Path | str, *, address: str | None = None, console: Console | None = None) -> dict[str, Any]:
    """Go on with a run from its newest valid checkpoint; damaged ones are passed over, and that is said.

    Args:
        run_dir: the run directory.
        address: Ray cluster to join.
        console: where progress is shown.

    Returns:
        The contents of result.json.

    Raises:
        CheckpointError: no run directory, no valid checkpoint, or one of another configuration or other data.
        ConfigError: another process holds the run directory.
    """
    run_dir = Path(run_dir).absolute()
    if not (run_dir / "config.yaml").is_file():
        raise CheckpointError(f"{run_dir} is not a run directory: it has no config.yaml")
    config = load_config(run_dir / "config.yaml", [f"resources.address={address}"] if address else [])
    with _stoppable(run_dir, config), locked(run_dir):
        return _resume(run_dir, config, console or Console(quiet=True))


def _resume(run_dir: Path, config: Config, console: Console) -> dict[str, Any]:
    if not has_checkpoint(run_dir):
        log.warning("%s holds no checkpoint: the run starts again at round 1", run_dir)
        setup = _prepare(config, run_dir, console)
        with writing(run_dir):
            keep_rounds(run_dir, up_to=0)
        return _run(setup, run_dir, None, None, console)
    state, mlflow_run_id = load_checkpoint(run_dir, config)
    if state.round_number >= config.federation.global_rounds and (finished := read_result(run_dir)):
        log.info("%s is finished: %d rounds", run_dir, state.round_number)
        return finish_record(run_dir, finished, MlflowTracker(run_dir), "FINISHED") if has_record(run_dir) else finished
    setup = _prepare(config, run_dir, console)
    check_data(run_dir, setup.data_fingerprint, round_number=state.round_number)
    log.info("going on after round %d", state.round_number)
    with writing(run_dir):
        keep_rounds(run_dir, up_to=state.round_number)
    return _run(setup, run_dir, state, mlflow_run_id, console)


def sync(run_dir: Path | str) -> None:
    """Deliver to MLflow what it lacks of a run, a trial or a search, finished or not; nothing arrives twice.

    Args:
        run_dir: the run directory.

    Raises:
        TrackingError: the run has no MLflow run, or its store doesn't answer.
    """
    run_dir = Path(run_dir).absolute()
    tracker, result = MlflowTracker(run_dir), read_result(run_dir)
    if result is not None:
        lacks = finish_record(run_dir, result, tracker, "FINISHED")["mlflow_lacks"]
    else:
        lacks = tracker.deliver(wait_s=WAIT_S)
    if lacks:
        raise TrackingError(f"the MLflow store {tracker.uri} still lacks {lacks}")
    log.info("%s: the MLflow run %s holds everything", run_dir, tracker.address()[0])


def _prepare(config: Config, run_dir: Path, console: Console) -> Setup:
    """The setup with settled resources, which are written into the run's configuration."""
    setup = settle(prepare_with_bar(config, console))
    if setup.config != config:
        with writing(run_dir):
            write_text(run_dir / "config.yaml", resolved_yaml(setup.config))
    return setup


@contextmanager
def _stoppable(run_dir: Path, config: Config) -> Iterator[None]:
    """Ctrl-C or SIGTERM ends what is done cleanly, and one line says how to go on."""
    with ended_by_signals():
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            log.warning("%s", _how_to_go_on(run_dir, config.federation.global_rounds))
            raise


def _how_to_go_on(run_dir: Path, rounds: int) -> str:
    if not (run_dir / "config.yaml").is_file():
        return "stopped before a round was finished: nothing is kept"
    kept = checkpoints_of(run_dir)
    done = f"after round {round_of(kept[0])} of {rounds}" if kept else "before a round was kept"
    return f"stopped {done}; go on with `fedsim resume {_shown(run_dir)}`"


def prepare_with_bar(config: Config, console: Console) -> Setup:
    """`prepare`, with a progress bar while recordings are embedded."""
    columns = (
        TextColumn("embedding"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("embedding", total=None, visible=False)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        return prepare(config, show)


def _run(
    setup: Setup, run_dir: Path, state: ServerState | None, mlflow_run_id: str | None, console: Console
) -> dict[str, Any]:
    """Run the remaining rounds in this process or on Ray, and print where to look."""
    config = setup.config
    for part, what in setup.used.items():
        log.info("%s: %s", part, what)
    log.info("%d clients, %d recordings held out", setup.partition.num_clients, len(setup.test_rows))
    first = state.round_number + 1 if state is not None else 1
    rounds = range(first, config.federation.global_rounds + 1)
    with (
        ProgressDisplay(config.federation.global_rounds, console) as display,
        open_experiment(setup, run_dir, status=display.update, state=state, mlflow_run_id=mlflow_run_id) as experiment,
    ):
        result = run_rounds(experiment, rounds, display.round_done)
    _tell(result, run_dir, console)
    return result


def _tell(result: Mapping[str, Any], run_dir: Path, console: Console) -> None:
    """The last lines of a run: accuracy before and after refinement, digest, where to look."""
    metrics, lines = result["metrics"], []
    if "eval/top1" in metrics:
        refined = f", {metrics['eval/top1']:.1%} after refinement" if "server/refinement_kept" in metrics else ""
        top1 = f"{metrics['eval/top1_averaged']:.1%} averaged{refined}"
        lines.append(f"held-out top-1 after {result['rounds']} rounds: {top1}")
    if result["privacy"]["epsilon"] is not None:
        lines.append(f"privacy: {result['privacy']['guarantee']}")
    lines += [f"digest {result['digest']}", f"results: {_shown(run_dir)}"]
    if result["mlflow_uri"]:
        lines.append(f"look:    mlflow ui --backend-store-uri {result['mlflow_uri']}")
    if result["mlflow_lacks"]:
        lines.append(f"MLflow lacks {result['mlflow_lacks']}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _shown(run_dir: Path) -> str:
    return os.path.relpath(run_dir) if Path.cwd() in run_dir.parents else str(run_dir)


def search(config: Config, *, output: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Search hyper-parameters; see `fedsim.search.tune.run_search`."""
    from fedsim.search.tune import run_search

    console = console or Console(quiet=True)
    return run_search(config, output=output, console=console, prepare=lambda found: prepare_with_bar(found, console))
