"""The MLflow run of a run, a search or a trial: its name, parameters and tags."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Literal

from fedsim import __version__
from fedsim.config import Config, flatten
from fedsim.federation.setup import Setup
from fedsim.tracking.ledger import RunDescription, begin
from fedsim.tracking.store import RunHandle, default_uri

Kind = Literal["run", "search", "trial"]


def store_of(setup: Setup, run_dir: Path, parent: RunHandle | None = None) -> str:
    """The tracking store of a run: its search's, else that of the configuration; a default one lies beside it."""
    return parent.uri if parent else default_uri(run_dir.parent, setup.config.tracking.uri)


def begin_record(
    setup: Setup, run_dir: Path, *, kind: Kind, run_id: str | None = None, parent: RunHandle | None = None
) -> bool:
    """Note how the MLflow run that belongs to a directory is made, or goes on; the store isn't asked.

    Args:
        setup: what is run.
        run_dir: directory of the run, search or trial; a default store lies in its folder.
        kind: what the run is, for its tag `fedsim.kind`.
        run_id: run to reopen, where the directory doesn't name it.
        parent: run to nest under, in whose store the new one is made.

    Returns:
        False with `tracking.enabled: false`.

    Raises:
        TrackingError: the directory can't be written, or what it holds is damaged.
    """
    config = setup.config
    if not config.tracking.enabled:
        return False
    tags = {
        "fedsim.version": __version__,
        "fedsim.kind": kind,
        "fedsim.run_dir": str(run_dir),
        "fedsim.data_fingerprint": setup.data_fingerprint,
        "mlflow.note.content": config.experiment.description,
        "mlflow.source.git.commit": git_commit(),
        **{f"fedsim.used.{part}": what for part, what in setup.used.items()},
    }
    wanted = RunDescription(
        uri=store_of(setup, run_dir, parent),
        experiment=config.tracking.experiment or config.experiment.name,
        run_name={"run": "", "search": "search-", "trial": f"{run_dir.name}-"}[kind] + _name(config),
        params={key: str(value) for key, value in flatten(config).items()},
        tags={key: value for key, value in tags.items() if value},
        parent_run_id=parent.run_id if parent else None,
    )
    begin(run_dir, wanted, run_id=run_id)
    return True


def _name(config: Config) -> str:
    """What a row of MLflow's table is about: algorithm, data, clients, seed."""
    feda2v = config.feda2v
    algorithm = feda2v.generator_type if feda2v.use_generator else feda2v.adapter_aggregation_mode
    return f"{algorithm}-{config.data.name}-{config.federation.num_clients}c-s{config.experiment.seed}"


def git_commit() -> str:
    """Commit of the checkout in the current folder, "" outside of one."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
