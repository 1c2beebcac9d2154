"""One experiment, opened and closed: in this process or in a server actor, with its MLflow run and its run directory.

The command line runs one experiment this way, a search one per trial.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from fedsim.errors import FedsimError
from fedsim.federation.checkpoint import ServerState
from fedsim.federation.experiment import Experiment, ExperimentHandle, RunFiles
from fedsim.federation.parts import choose_device
from fedsim.federation.pool import InProcessPool
from fedsim.federation.server import Server
from fedsim.federation.setup import Setup
from fedsim.federation.tracker import Tracker
from fedsim.launch.record import Kind, begin_record, store_of
from fedsim.launch.signals import heed, own_handlers
from fedsim.models.encoders.threads import available_cores
from fedsim.tracking.mlflow_tracker import MlflowTracker
from fedsim.tracking.null_tracker import NullTracker
from fedsim.tracking.store import RunHandle, check_store, warm_up
from fedsim.types import Fault

log = logging.getLogger(__name__)


class StoppedEarly(Exception):
    """Raised inside `open_experiment` when a scheduler ends a trial before its last round: finished, not broken."""


@contextmanager
def open_experiment(
    setup: Setup,
    run_dir: Path,
    *,
    status: Callable[[Mapping[str, Any]], None],
    state: ServerState | None = None,
    mlflow_run_id: str | None = None,
    parent: RunHandle | None = None,
) -> Iterator[ExperimentHandle]:
    """An experiment in this process (`resources.client_actors: 0`) or in a server actor; closed in any case.

    A Ray that is already connected (a Tune trial, a job) is used, else one is started for the experiment. MLflow, which
    takes seconds to load and to make a store, opens while Ray starts and rounds train, or whenever its server answers.

    Args:
        setup: what `prepare` made, with settled resources.
        run_dir: the run directory; its folder is where a default MLflow store lies.
        status: told of phase and clients while a round runs.
        state: where to go on from.
        mlflow_run_id: MLflow run to reopen, where the run directory doesn't name it.
        parent: the search's MLflow run, of which this run is a trial.

    Raises:
        ConfigError: the MLflow store is no address of one, or a file that can't be used.
        ResourceError: the actors don't fit, or no Ray answers.
    """
    heed()
    config, resources = setup.config, setup.config.resources
    files = RunFiles(
        run_dir=run_dir,
        checkpoint_every=config.experiment.checkpoint_every,
        last_round=config.federation.global_rounds,
        keep_last=config.experiment.keep_last,
        keep_best=config.experiment.keep_best,
    )
    resumed = () if state is None else (_resumed(state.round_number),)
    if config.tracking.enabled:
        check_store(store_of(setup, run_dir, parent))
    tracker = _record(setup, run_dir, mlflow_run_id, parent)

    def told(news: Mapping[str, Any]) -> None:
        heed()
        status(news)

    if resources.num_actors == 0:
        tracker.start()
        device = choose_device(max(resources.server_gpus, resources.client_gpus))

        def in_process() -> ExperimentHandle:
            threads = (resources.num_cpus or available_cores()) if device.type == "cpu" else 1
            pool = InProcessPool(setup, device, threads=threads, go_on=heed)
            server = Server(setup, pool, device=device, state=state, status=told, run_dir=run_dir)
            return Experiment(server, files, tracker, resumed)

        with one_thread(), _closing(in_process, tracker) as experiment:
            yield experiment
        return
    from fedsim.cluster.handle import RemoteExperiment, demand_of
    from fedsim.cluster.resources import check_fits, start_ray, stop_ray

    if config.tracking.enabled and state is None:  # the store of a run that is resumed is there
        Thread(target=warm_up, args=(store_of(setup, run_dir, parent),), daemon=True).start()
    with own_handlers():
        started = start_ray(address=resources.address, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
    try:
        if started:
            check_fits(demand_of(setup))
        remote = partial(RemoteExperiment, setup, files, tracker, state=state, status=told, faults=resumed)
        with _closing(remote, tracker) as experiment:
            yield experiment
    finally:
        if started:
            stop_ray(started)


def _resumed(last: int) -> Fault:
    """What a resume leaves in the record: whoever ran the rounds before is gone."""
    return Fault(
        "resumed",
        f"driver (pid {os.getpid()})",
        platform.node(),
        None,
        last + 1,
        f"the run was taken up again after round {last}",
    )


@contextmanager
def _closing(make: Callable[[], ExperimentHandle], tracker: Tracker) -> Iterator[ExperimentHandle]:
    """Make and close the experiment; a run that ends too soon is marked FAILED, or KILLED when it was interrupted."""
    experiment: ExperimentHandle | None = None
    try:
        experiment = make()
        yield experiment
    except StoppedEarly:
        tracker.finish("FINISHED", {}, {"fedsim.stopped_early": "true"})
        raise
    except (KeyboardInterrupt, SystemExit):
        try:
            _stop(experiment)
        finally:
            tracker.finish("KILLED", {}, {})
        raise
    except BaseException:
        tracker.finish("FAILED", {}, {})
        raise
    finally:
        if experiment is not None:
            experiment.close()


def _stop(experiment: ExperimentHandle | None) -> None:
    """Keep the last finished round of an interrupted run."""
    try:
        if experiment is not None:
            experiment.stop()
    except FedsimError as error:
        log.warning("the last finished round has no checkpoint: %s", error)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: the order of a sum, and so its last bits, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _record(setup: Setup, run_dir: Path, mlflow_run_id: str | None, parent: RunHandle | None) -> Tracker:
    """The tracker of a run, not yet started."""
    kind: Kind = "trial" if parent else "run"
    recorded = begin_record(setup, run_dir, kind=kind, run_id=mlflow_run_id, parent=parent)
    return MlflowTracker(run_dir) if recorded else NullTracker()
