"""A trial: an ordinary run with its own server, clients, run directory and MLflow run, one round per Tune step."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray import tune

from fedsim.config import Config
from fedsim.errors import ConfigError, FedsimError
from fedsim.federation.run_directory import create_run_directory
from fedsim.federation.run_lock import locked
from fedsim.federation.setup import Setup, prepare
from fedsim.launch.session import StoppedEarly, open_experiment
from fedsim.search.records import TrialEnd, write_end
from fedsim.search.space import parameters, shares_preparation, trial_config
from fedsim.tracking.mlflow_tracker import round_metrics
from fedsim.tracking.store import RunHandle
from fedsim.types import RoundResult

ROUND, OBJECTIVE, METRICS = "round", "objective", "metrics"
"""What a trial reports to Tune: the round, the searched metric, and all metrics by name."""


class UnknownMetric(ConfigError):
    """`search.metric` names nothing that a round reports: every trial would fail alike."""


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search share.

    Attributes:
        config: the configuration that is searched.
        setup: what the driver prepared from it.
        trials_dir: folder of the run directories.
        parent: the search's MLflow run, or None without tracking.
    """

    config: Config
    setup: Setup
    trials_dir: Path
    parent: RunHandle | None


class Trial(tune.Trainable):  # type: ignore[misc]  # ray is not followed by the type checker
    """Tune's view of a trial.

    A class and not a function: Tune stops a function by SystemExit in a thread, and ends its process without waiting
    for what the trial still has to write.
    """

    def setup(self, config: dict[str, Any], plan: TrialPlan) -> None:
        """Remember what to do; an error is told best from the first step."""
        self._rounds = run_trial(plan, config, self.trial_id)

    def step(self) -> dict[str, Any]:
        """Run up to the next round that has the metric."""
        return next(self._rounds)

    def cleanup(self) -> None:
        """End the trial; one that is in the middle of its rounds was stopped by the scheduler."""
        with suppress(StoppedEarly):
            self._rounds.close()


def run_trial(plan: TrialPlan, sample: Mapping[str, Any], trial: str) -> Generator[dict[str, Any], None, None]:
    """Run a trial, round by round; closing the iterator before the last round ends it early, with all its results.

    Args:
        plan: what all trials share.
        sample: what Optuna sampled.
        trial: id of the trial.

    Yields:
        ROUND, OBJECTIVE and METRICS of every round that has the searched metric, and "done" with the last one.

    Raises:
        FedsimError: the configuration can't be run, or the run failed; also written to trial.json.
    """
    run_dir = plan.trials_dir / trial
    try:
        config = trial_config(plan.config, parameters(plan.config.search.space, sample))
        with locked(run_dir, new=True):
            create_run_directory(run_dir, config)
            with _log_file(run_dir / "trial.log"):
                yield from _rounds(plan, config, run_dir)
    except StoppedEarly:
        write_end(run_dir, TrialEnd("stopped early"))
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, FedsimError) else f"{type(error).__name__}: {error}"
        write_end(run_dir, TrialEnd("failed", " ".join(reason.split()), isinstance(error, UnknownMetric)))
        raise


def _rounds(plan: TrialPlan, config: Config, run_dir: Path) -> Generator[dict[str, Any], None, None]:
    setup = replace(plan.setup, config=config) if shares_preparation(plan.config.search.space) else prepare(config)
    every, last, metric = config.experiment.evaluate_every, config.federation.global_rounds, plan.config.search.metric
    torch.set_num_threads(1)
    with open_experiment(setup, run_dir, status=lambda status: None, parent=plan.parent) as experiment:
        for number in range(1, last + 1):
            result = experiment.round()
            metrics = round_metrics(result)
            if metric not in metrics and (number % every == 0 or number == last):
                raise _missing(metric, result)
            if metric not in metrics or number == last:
                continue
            try:
                yield _report(metrics, metric, number)
            except GeneratorExit:
                experiment.finish("FINISHED")
                raise StoppedEarly from None
        experiment.finish("FINISHED")
    write_end(run_dir, TrialEnd("finished"))
    yield _report(metrics, metric, last) | {"done": True}


def _report(metrics: Mapping[str, float], metric: str, number: int) -> dict[str, Any]:
    return {ROUND: number, OBJECTIVE: metrics[metric], METRICS: dict(metrics)}


def _missing(metric: str, result: RoundResult) -> FedsimError:
    """Why a round with evaluation has no such metric: it isn't finite, or nothing has this name."""
    if metric in result.metrics:
        return FedsimError(
            f"{metric} is {result.metrics[metric]} in round {result.round_number}: trials can't be compared by it"
        )
    known = round_metrics(result)
    near = difflib.get_close_matches(metric, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UnknownMetric(f"search.metric: no round reports {metric!r}; {hint}known are {', '.join(sorted(known))}")


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """What fedsim says in this process goes to a file: a trial has no terminal."""
    logger = logging.getLogger("fedsim")
    handler, level = logging.FileHandler(path, delay=True), logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
