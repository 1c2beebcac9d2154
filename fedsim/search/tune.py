"""A search from configuration to best.yaml: Tune runs trials of `search.space`, one MLflow run nested per trial."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from fedsim.cluster.resources import Demand, check_fits, start_ray, stop_ray
from fedsim.config import Config, resolved_yaml
from fedsim.errors import ConfigError, FedsimError
from fedsim.federation.run_directory import write_text
from fedsim.federation.setup import Setup
from fedsim.federation.setup import prepare as prepare_quietly
from fedsim.launch.auto import settle
from fedsim.launch.signals import ended_by_signals, heed
from fedsim.search.display import SearchDisplay
from fedsim.search.parent import ParentRun
from fedsim.search.records import SearchRecord, TrialRecord, write_search
from fedsim.search.space import check_search, distributions
from fedsim.search.trial import OBJECTIVE, ROUND, Trial, TrialPlan
from fedsim.search.watch import Watch

log = logging.getLogger(__name__)

# Read by Tune on the driver, and handed on to trials.
TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer one prints a banner even when told to be silent
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the configuration mean the folder where the search was started
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl and MLflow hold the numbers
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search at once, and is told from a finished one
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_search(
    config: Config,
    *,
    output: Path | None = None,
    console: Console,
    prepare: Callable[[Config], Setup] = prepare_quietly,
) -> dict[str, Any]:
    """Search hyper-parameters.

    Args:
        config: an experiment with a section `search`.
        output: folder of the search, new or empty; None for a new one in `experiment.output_dir`.
        console: where trials are shown.
        prepare: makes recordings, embeddings and targets, once for all trials whose searched keys don't change them.

    Returns:
        The contents of search.json; the folder's files are described in `fedsim.search.records`.

    Raises:
        ConfigError: the space or a value of it is wrong, the metric doesn't exist, or Optuna isn't installed.
        ResourceError: one trial doesn't fit what Ray has.
        FedsimError: no trial came to an end; the message says why.
    """
    check_search(config)
    distributions(config.search.space)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{config.experiment.name}-search-{stamp}"
    search_dir = (output or Path(config.experiment.output_dir) / name).absolute()
    _create_search_directory(search_dir, config)
    with ParentRun() as run, _ray(config), ended_by_signals():
        if config.resources.client_actors != "auto":
            _check_fits(config)  # before anything takes long
        setup = settle(prepare(config), concurrent=min(config.search.max_concurrent, config.search.num_trials))
        if setup.config != config:
            config = setup.config
            write_text(search_dir / "config.yaml", resolved_yaml(config))
            _check_fits(config)
        heed()
        plan = TrialPlan(config, setup, search_dir / "trials", None)
        run.start(plan.setup, search_dir)
        record = _fit(replace(plan, parent=run.handle), search_dir, console)
        run.conclude(record)
        best = _best(record)
    write_text(search_dir / "best.yaml", (Path(best.run_dir) / "config.yaml").read_text())
    _tell(record, best, search_dir, console)
    if run.handle:
        console.print(f"look:    mlflow ui --backend-store-uri {run.handle.uri}", highlight=False)
    return write_search(search_dir / "search.json", record)


def _create_search_directory(search_dir: Path, config: Config) -> None:
    """A new folder with the searched configuration."""
    try:
        if search_dir.exists() and (not search_dir.is_dir() or any(search_dir.iterdir())):
            raise ConfigError(f"{search_dir} already exists and isn't empty: choose another --output")
        (search_dir / "trials").mkdir(parents=True, exist_ok=True)
        write_text(search_dir / "config.yaml", resolved_yaml(config))
    except OSError as error:
        raise ConfigError(f"can't write the search folder {search_dir}: {error.strerror or error}") from error


@contextmanager
def _ray(config: Config) -> Iterator[None]:
    """Ray for all trials: the one that is connected, a cluster, or a private one."""
    resources = config.resources
    started = start_ray(address=resources.address, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
    try:
        yield
    finally:
        if started:
            stop_ray(started)


def trial_demand(config: Config) -> Demand:
    """What one trial asks of Ray; without client actors its own process does the work of all."""
    resources = config.resources
    alone = resources.num_actors == 0
    return Demand(
        resources.actor_kinds(),
        server_cpus=max(resources.server_cpus, resources.client_cpus) if alone else resources.server_cpus,
        server_gpus=max(resources.server_gpus, resources.client_gpus) if alone else resources.server_gpus,
    )


def trial_bundles(config: Config) -> list[dict[str, float]]:
    """The placement group of one trial: the trial itself, server, clients; bundles that hold nothing are left out.

    The trial's process only passes numbers on, so it takes nothing, unless it works alone or nobody takes anything.
    """
    bundles = [bundle for bundle in trial_demand(config).bundles() if any(bundle.values())]
    if config.resources.num_actors == 0 or not bundles:
        return bundles or [{"CPU": 0.001}]
    return [{}, *bundles]


def _check_fits(config: Config) -> None:
    """Refuse a trial that doesn't fit, and say when fewer than `search.max_concurrent` do at a time.

    Raises:
        ResourceError: one trial doesn't fit.
    """
    demand = trial_demand(config)
    check_fits(demand)
    free, wanted = ray.available_resources(), min(config.search.max_concurrent, config.search.num_trials)
    for resource in ("CPU", "GPU"):
        each = demand.total(resource)
        places = int(free.get(resource, 0.0) / each + 1e-6) if each else wanted
        if places < wanted:
            log.warning(
                "search.max_concurrent is %d, but %d at a time fit: a trial takes %g %ss, Ray has %g free",
                wanted, places, each, resource, free.get(resource, 0.0),
            )  # fmt: skip


def _fit(plan: TrialPlan, search_dir: Path, console: Console) -> SearchRecord:
    """Run all trials.

    Raises:
        ConfigError: the metric doesn't exist.
    """
    num_trials, rounds = plan.config.search.num_trials, plan.config.federation.global_rounds
    with SearchDisplay(num_trials, total_rounds=rounds, console=console) as display, _quiet_tune():
        watch = Watch(plan.config, search_dir, display)
        try:
            _make_tuner(plan, search_dir, watch).fit()
        finally:
            record = watch.settle()
    if watch.stop_reason:
        raise ConfigError(watch.stop_reason)
    return record


def _make_tuner(plan: TrialPlan, search_dir: Path, watch: Watch) -> Any:
    """Tune, with Optuna seeded by the experiment, ASHA by rounds, and a placement group per trial."""
    config, search = plan.config, plan.config.search
    rounds = config.federation.global_rounds
    goal = {"metric": OBJECTIVE, "mode": search.mode}
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(Trial, plan=plan), tune.PlacementGroupFactory(trial_bundles(config))),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(distributions(search.space), seed=config.experiment.seed, **goal),
            scheduler=ASHAScheduler(
                time_attr=ROUND,
                max_t=rounds,
                grace_period=min(search.grace_period, rounds),
                reduction_factor=search.reduction_factor,
                **goal,
            ),
            num_samples=search.num_trials,
            max_concurrent_trials=search.max_concurrent,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(search_dir),
            verbose=0,
            callbacks=[watch],
            stop=watch,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune's and Optuna's own words left out: the display says what happens, search.json and trial.log say why."""
    import optuna

    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    optuna_level = optuna.logging.get_verbosity()
    added = {name: value for name, value in TUNE_SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        optuna.logging.set_verbosity(optuna_level)
        for name in added:
            os.environ.pop(name, None)


def _best(record: SearchRecord) -> TrialRecord:
    """The best trial.

    Raises:
        FedsimError: there is none.
    """
    best = record.best()
    if best is None:
        reasons = "; ".join(dict.fromkeys(trial.reason for trial in record.failed())) or "none came to an end"
        raise FedsimError(f"all {len(record.trials)} trials of the search failed: {reasons}")
    return best


def _tell(record: SearchRecord, best: TrialRecord, search_dir: Path, console: Console) -> None:
    """The last lines of a search: failed trials by reason, the best one, where to look."""
    reasons: dict[str, list[str]] = {}
    for trial in record.failed():
        reasons.setdefault(trial.reason, []).append(trial.trial)
    for reason, trials in reasons.items():
        log.warning("%d of %d trials failed (%s): %s", len(trials), len(record.trials), ", ".join(trials), reason)
    folder = os.path.relpath(search_dir) if Path.cwd() in search_dir.parents else str(search_dir)
    complete = [trial.trial for trial in record.trials.values() if trial.status in ("finished", "stopped early")]
    names = "*" if not reasons else complete[0] if len(complete) == 1 else "{" + ",".join(complete) + "}"
    lines = (
        f"best of {len(record.trials)} trials: {best.trial}, {record.metric} {best.metrics[record.metric]:.4g} "
        f"after {best.rounds} rounds",
        *(f"  --set {name}={value}" for name, value in best.parameters.items()),
        f"again:   fedsim run {folder}/best.yaml",
        f"compare: fedsim compare {folder}/trials/{names}",
        f"results: {folder}/search.json",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
