"""Where runs are recorded: the MLflow store's address, its experiment, and the run itself.

One process opens or reopens the run (`create_run`) and hands the plain `RunHandle` to the process that logs. Only
`MlflowClient` is used, never MLflow's fluent functions: those keep an active run and a tracking address per process
and per thread, which are lost on the way into an actor.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError
from fedsim.tracking.calls import one_line, open_client, patience

log = logging.getLogger(__name__)

PARAMS_PER_BATCH = 100
METRICS_PER_BATCH = 1000
KEY_LENGTH = 250
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
SQLITE_MAGIC = b"SQLite format 3\0"


@dataclass(frozen=True)
class RunHandle:
    """The address of one MLflow run: plain strings, so that it can travel into an actor.

    Attributes:
        uri: the tracking store.
        experiment_id: id of the experiment there.
        run_id: id of the run.
    """

    uri: str
    experiment_id: str
    run_id: str


def default_uri(output_dir: Path, uri: str | None) -> str:
    """The tracking store to use: `uri`, else $MLFLOW_TRACKING_URI, else SQLite `mlflow.db` in `output_dir`.

    A relative SQLite path is made absolute, because the process that logs has a working directory of its own.

    Raises:
        ConfigError: the store is a folder of files, or SQLite in memory.
    """
    chosen, source = uri, "tracking.uri"
    if not chosen:
        chosen, source = os.environ.get("MLFLOW_TRACKING_URI"), "MLFLOW_TRACKING_URI"
    if not chosen:
        return _sqlite_uri(Path(output_dir) / "mlflow.db")
    if chosen.startswith("sqlite:"):
        path, mark, options = chosen.removeprefix("sqlite:").removeprefix("///").partition("?")
        if path in ("", "//", ":memory:"):
            raise ConfigError(
                f"{source} {chosen!r} is a SQLite store in memory, which ends with the process; "
                "use sqlite:///PATH/mlflow.db"
            )
        if Path(path).is_dir():
            raise ConfigError(f"{source} {chosen!r} is a folder; name a database file, e.g. sqlite:///PATH/mlflow.db")
        return _sqlite_uri(Path(path)) + mark + options
    if chosen.startswith("file:") or not (re.match(r"[A-Za-z][\w+.-]+://", chosen) or chosen.startswith("databricks")):
        raise ConfigError(
            f"{source} {chosen!r} is a folder of files, which MLflow no longer supports as a store; "
            "use sqlite:///PATH/mlflow.db or http://HOST:PORT"
        )
    return chosen


def check_store(uri: str) -> None:
    """What can be told of a store without MLflow, which takes seconds to load.

    Raises:
        ConfigError: a SQLite file that can't be written or is none. A server may answer later.
    """
    path = _sqlite_path(uri)
    try:
        if path is not None:
            _check_file(path)
    except (OSError, ValueError) as error:
        raise _unusable(uri, error) from error


def _check_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} can't be written")
        return
    with path.open("rb+") as stream:
        start = stream.read(len(SQLITE_MAGIC))
    if start and start != SQLITE_MAGIC:
        raise ValueError(f"{path} is no SQLite database")


def warm_up(uri: str) -> None:
    """Load MLflow and bring the store up to date, which takes seconds; what is wrong `create_run` will say."""
    with suppress(Exception), _first_opening(uri), patience():
        open_client(uri)


def create_run(
    uri: str,
    *,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    parent_run_id: str | None = None,
    run_id: str | None = None,
    token_tag: str | None = None,
) -> RunHandle:
    """Open a run, creating store and experiment where they are missing, or reopen `run_id` for a resume.

    Two processes may do so at once on one SQLite file. A resumed run is RUNNING again; parameters that it already has
    are kept, because MLflow's parameters can't change, and a difference is a warning.

    Args:
        uri: the tracking store, see `default_uri`.
        experiment: name of the MLflow experiment.
        run_name: name of the run, shown in MLflow's table.
        params: flat configuration; a value over 6000 characters is cut, with a warning.
        tags: tags of the run; a value over 8000 characters is cut, with a warning.
        parent_run_id: run to nest under (the search a trial belongs to).
        run_id: run to reopen.
        token_tag: name of a tag that no other run has with this value: a run that has it is reopened.

    Raises:
        ConfigError: the store can't be opened, or has no such run.
    """
    tags = dict(tags) | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})
    try:
        with _first_opening(uri), patience():
            client = open_client(uri)
            if run_id is None:
                experiment_id = _experiment_id(client, uri, experiment)
                run_id = _found(client, experiment_id, token_tag, tags)
            known: Mapping[str, str] = {}
            if run_id is None:
                token = {token_tag: tags[token_tag]} if token_tag else {}
                run_id = str(client.create_run(experiment_id, run_name=run_name, tags=token).info.run_id)
            else:
                run = client.get_run(run_id)
                client.update_run(run_id, status="RUNNING")
                experiment_id, known = run.info.experiment_id, run.data.params
            _log_params(client, run_id, params, known)
            _log_tags(client, run_id, tags)
    except ConfigError:
        raise
    except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' errors here
        raise _unusable(uri, error) from error
    return RunHandle(uri, experiment_id, run_id)


def _unusable(uri: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"the MLflow store {uri} can't be used: {one_line(error)}; check tracking.uri and that its server runs, "
        "or set tracking.enabled=false (metrics.jsonl is written either way)"
    )


def clean_key(name: str) -> str:
    """A name that MLflow takes as a metric or parameter: other characters become `_`, at most 250 of them."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:KEY_LENGTH]


def clean_tags(tags: Mapping[str, str]) -> list[Any]:
    """MLflow's tag records; values over 8000 characters are cut, with a warning."""
    from mlflow.entities import RunTag

    return [RunTag(clean_key(key), _cut(f"tag {key}", str(value), TAG_LENGTH)) for key, value in tags.items()]


def _sqlite_uri(path: Path) -> str:
    return f"sqlite:///{path.expanduser().absolute()}"


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _first_opening(uri: str) -> Any:
    """A lock beside a SQLite file, because two first migrations or two new experiments at once disturb each other."""
    path = _sqlite_path(uri)
    if path is None:
        return nullcontext()
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock", timeout=180)


def _experiment_id(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = _sqlite_path(uri)
        # Without a location MLflow would put artifacts under the working directory of whoever came first.
        location = None if database is None else (database.parent / "mlartifacts").absolute().as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another process was faster, on a server
            if found is None:
                raise error
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"MLflow experiment {name!r} is in the store's trash; set another tracking.experiment, or restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    return str(found.experiment_id)


def _found(client: Any, experiment_id: str, token_tag: str | None, tags: Mapping[str, str]) -> str | None:
    """The run with this tag, which an earlier call made whose answer got lost."""
    if token_tag is None:
        return None
    runs = client.search_runs([experiment_id], f"tags.`{token_tag}` = '{tags[token_tag]}'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _log_params(client: Any, run_id: str, params: Mapping[str, Any], known: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    new, changed = [], []
    for key, value in params.items():
        name, text = clean_key(key), _cut(f"parameter {key}", str(value), PARAM_LENGTH)
        if name not in known:
            new.append(Param(name, text))
        elif known[name] != text:
            changed.append(name)
    for start in range(0, len(new), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + PARAMS_PER_BATCH])
    if changed:
        log.warning("MLflow run %s keeps its first values of %s (parameters can't change)", run_id, ", ".join(changed))


def _log_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    records = clean_tags(tags)
    for start in range(0, len(records), PARAMS_PER_BATCH):
        client.log_batch(run_id, tags=records[start : start + PARAMS_PER_BATCH])


def _cut(what: str, text: str, length: int) -> str:
    if len(text) <= length:
        return text
    log.warning("%s has %d characters; MLflow gets the first %d", what, len(text), length)
    return text[: length - 3] + "..."
