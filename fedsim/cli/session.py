"""A run from configuration to result: puts data, tracker, Ray and server together."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsim import __version__
from fedsim.config import Config, config_from_mapping, flatten, load_config
from fedsim.errors import CheckpointError, ConfigError
from fedsim.federation.checkpoint import ServerState, load_checkpoint
from fedsim.federation.experiment import Experiment, ExperimentHandle, RunFiles, run_rounds
from fedsim.federation.pool import InProcessPool
from fedsim.federation.run_directory import create_run_directory, keep_rounds
from fedsim.federation.server import Server
from fedsim.federation.setup import Setup, choose_device, prepare
from fedsim.federation.tracker import Tracker
from fedsim.tracking.mlflow_tracker import MlflowTracker, create_run, default_uri
from fedsim.tracking.null_tracker import NullTracker
from fedsim.tracking.progress import ProgressDisplay

log = logging.getLogger(__name__)


def run(config: Config, *, output: Path | None = None, console: Console | None = None) -> dict[str, Any]:
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
    run_dir = (output or Path(config.experiment.output_dir) / f"{config.experiment.name}-{stamp}").absolute()
    create_run_directory(run_dir, config)
    setup = prepare_with_bar(config, console)
    return _run(setup, run_dir, None, None, console)


def resume(run_dir: Path, *, address: str | None = None, console: Console | None = None) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint.

    Args:
        run_dir: the run directory.
        address: Ray cluster to join.
        console: where progress is shown.

    Returns:
        The contents of result.json.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of another configuration.
    """
    run_dir = run_dir.absolute()
    if not (run_dir / "config.yaml").is_file():
        raise CheckpointError(f"{run_dir} is not a run directory: it has no config.yaml")
    config = load_config(run_dir / "config.yaml", [f"resources.address={address}"] if address else [])
    state, mlflow_run_id = load_checkpoint(run_dir, config)
    console = console or Console(quiet=True)
    if state.round_number >= config.federation.global_rounds and (run_dir / "result.json").is_file():
        log.info("%s is finished: %d rounds", run_dir, state.round_number)
        finished: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
        return finished
    log.info("going on after round %d", state.round_number)
    keep_rounds(run_dir, up_to=state.round_number)
    return _run(prepare_with_bar(config, console), run_dir, state, mlflow_run_id, console)


def prepare_with_bar(config: Config, console: Console) -> Setup:
    """`prepare`, with a progress bar while recordings are embedded."""
    columns = (
        TextColumn("embedding"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
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
    with _ended_by_signals(), ProgressDisplay(config.federation.global_rounds, console) as display:
        with open_experiment(setup, run_dir, state, mlflow_run_id, status=display.update) as experiment:
            result = run_rounds(experiment, rounds, display.round_done)
    _tell(result, run_dir, console)
    return result


@contextmanager
def open_experiment(
    setup: Setup,
    run_dir: Path,
    state: ServerState | None,
    mlflow_run_id: str | None,
    *,
    status: Callable[[Mapping[str, Any]], None],
    parent_run_id: str | None = None,
) -> Iterator[ExperimentHandle]:
    """An experiment in this process (`resources.client_actors: 0`) or in a server actor; closed in any case."""
    config = setup.config
    if config.resources.client_actors == 0:
        tracker, files = _track(setup, run_dir, mlflow_run_id, parent_run_id)
        device = choose_device(max(config.resources.server_gpus, config.resources.client_gpus))
        server = Server(setup, InProcessPool(setup, device), device=device, state=state, status=status)
        with _closing(Experiment(server, files, tracker), tracker) as experiment:
            yield experiment
        return
    from fedsim.cluster.handle import RemoteExperiment, demand_of, stop_ray
    from fedsim.cluster.resources import check_fits, start_ray

    resources = config.resources
    started = start_ray(address=resources.address, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
    try:
        if started:
            check_fits(demand_of(setup))
        tracker, files = _track(setup, run_dir, mlflow_run_id, parent_run_id)
        with _closing(RemoteExperiment(setup, files, tracker, state=state, status=status), tracker) as experiment:
            yield experiment
    finally:
        if started:
            stop_ray()


@contextmanager
def _closing(experiment: ExperimentHandle, tracker: Tracker) -> Iterator[ExperimentHandle]:
    """Close the experiment; a run that ends early is marked FAILED, or KILLED when it was interrupted."""
    try:
        yield experiment
    except (KeyboardInterrupt, SystemExit) as stop:
        # Ray Tune ends a trial that its scheduler stops by SystemExit: that trial is finished, not broken.
        early = isinstance(stop, SystemExit) and not stop.code
        tracker.finish("FINISHED" if early else "KILLED", {}, {"fedsim.stopped_early": "true"} if early else {})
        raise
    except BaseException:
        tracker.finish("FAILED", {}, {})
        raise
    finally:
        experiment.close()


def _track(
    setup: Setup, run_dir: Path, mlflow_run_id: str | None, parent_run_id: str | None
) -> tuple[Tracker, RunFiles]:
    """Create or reopen the MLflow run."""
    config = setup.config
    settings, federation = config.tracking, config.federation
    uri, tracker = None, None
    if settings.enabled:
        uri = default_uri(run_dir.parent, settings.uri)
        tags = {
            "fedsim.version": __version__,
            "fedsim.kind": "trial" if parent_run_id else "run",
            "fedsim.run_dir": str(run_dir),
            "fedsim.data_fingerprint": setup.data_fingerprint,
            "mlflow.note.content": config.experiment.description,
            "mlflow.source.git.commit": git_commit(),
            **{f"fedsim.used.{part}": what for part, what in setup.used.items()},
        }
        algorithm = (
            config.feda2v.generator_type if config.feda2v.use_generator else config.feda2v.adapter_aggregation_mode
        )
        handle = create_run(
            uri,
            experiment=settings.experiment or config.experiment.name,
            run_name=f"{algorithm}-{config.data.name}-{federation.num_clients}c-s{config.experiment.seed}",
            params=flatten(config),
            tags={key: value for key, value in tags.items() if value},
            parent_run_id=parent_run_id,
            run_id=mlflow_run_id,
        )
        tracker, mlflow_run_id = MlflowTracker(handle), handle.run_id
    files = RunFiles(
        run_dir=run_dir,
        mlflow_run_id=mlflow_run_id,
        mlflow_uri=uri,
        checkpoint_every=config.experiment.checkpoint_every,
        last_round=federation.global_rounds,
    )
    return tracker or NullTracker(), files


def git_commit() -> str:
    """Commit of the checkout in the current folder, "" outside of one."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends a run like Ctrl-C does: cleanly, and marked KILLED."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, where signals aren't ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(result: Mapping[str, Any], run_dir: Path, console: Console) -> None:
    """The last lines of a run: accuracy before and after refinement, digest, where to look."""
    metrics = result["metrics"]
    if "eval/top1" in metrics:
        console.print(
            f"held-out top-1 after {result['rounds']} rounds: {metrics['eval/top1_averaged']:.1%} averaged, "
            f"{metrics['eval/top1']:.1%} after refinement",
            highlight=False,
        )
    console.print(f"digest {result['digest']}", highlight=False)
    shown = os.path.relpath(run_dir) if Path.cwd() in run_dir.parents else run_dir
    console.print(f"results: {shown}", highlight=False)
    if result["mlflow_uri"]:
        console.print(f"look:    mlflow ui --backend-store-uri {result['mlflow_uri']}", highlight=False)


def search(config: Config, *, output: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Search hyper-parameters; see `fedsim.search`.

    Raises:
        ConfigError: the search space is empty.
    """
    from fedsim.search.tune import run_search

    if not config.search.space:
        raise ConfigError(
            "search.space is empty: name keys to search, e.g. "
            "--set 'search.space.training.learning_rate={low: 1e-4, high: 1e-2, log: true}'"
        )
    return run_search(config, output=output, console=console or Console(quiet=True))


__all__ = ["config_from_mapping", "open_experiment", "prepare_with_bar", "resume", "run", "search"]
