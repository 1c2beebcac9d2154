from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.errors import ConfigError
from fedsim.tracking.calls import CALL_SETTINGS, open_client, patience
from fedsim.tracking.store import check_store, create_run, default_uri


def test_an_explicit_store_beats_the_environment_which_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(tmp_path, None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert default_uri(tmp_path, None) == "http://host:5000"
    assert default_uri(tmp_path, "databricks") == "databricks"
    assert default_uri(tmp_path, "postgresql://user@host/db") == "postgresql://user@host/db"


def test_relative_sqlite_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(Path("runs"), None) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert default_uri(Path("runs"), "sqlite:///a/b.db?timeout=9") == f"sqlite:///{tmp_path}/a/b.db?timeout=9"
    assert default_uri(Path("runs"), "sqlite:////a/b.db") == "sqlite:////a/b.db"


@pytest.mark.parametrize("uri", ["file:./mlruns", "file:///tmp/mlruns", "./mlruns", "/data/mlruns", "mlruns"])
def test_a_folder_of_files_is_refused_in_one_line(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri .* no longer supports .*sqlite:///") as caught:
        default_uri(tmp_path, uri)
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_a_store_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI .* in memory"):
        default_uri(tmp_path, None)


def test_a_new_run_has_its_params_tags_parent_and_artifact_place(store: str, tmp_path: Path) -> None:
    parent = create_run(store, experiment="e", run_name="sweep", params={}, tags={})
    params = {f"key.{number}": number for number in range(250)} | {"training.optimizer": "AdamW", "none": None}
    handle = create_run(
        store, experiment="e", run_name="trial", params=params, tags={"fedsim.kind": "trial"},
        parent_run_id=parent.run_id,
    )  # fmt: skip
    run = open_client(store).get_run(handle.run_id)
    assert run.data.params == {key: str(value) for key, value in params.items()}
    assert run.data.tags["fedsim.kind"] == "trial"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert (run.info.run_name, run.info.status) == ("trial", "RUNNING")
    assert handle.experiment_id == parent.experiment_id == run.info.experiment_id
    assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    assert list(Path.cwd().iterdir()) == []


def test_long_values_are_cut_with_a_warning_and_odd_names_cleaned(store: str, caplog: pytest.LogCaptureFixture) -> None:
    handle = create_run(
        store, experiment="e", run_name="r", params={"long": "x" * 7000, "a=b": 1}, tags={"note": "y" * 9000}
    )
    data = open_client(store).get_run(handle.run_id).data
    assert len(data.params["long"]) == 6000
    assert data.params["a_b"] == "1"
    assert len(data.tags["note"]) == 8000
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [
        "parameter long has 7000 characters; MLflow gets the first 6000",
        "tag note has 9000 characters; MLflow gets the first 8000",
    ]


def test_a_resumed_run_is_running_again_and_keeps_its_params(store: str, caplog: pytest.LogCaptureFixture) -> None:
    first = create_run(store, experiment="e", run_name="r", params={"rounds": 5, "lr": 0.1}, tags={})
    open_client(store).set_terminated(first.run_id, "FAILED")
    again = create_run(
        store, experiment="e", run_name="r", params={"rounds": 9, "lr": 0.1, "new": 1}, tags={"resumed": "yes"},
        run_id=first.run_id,
    )  # fmt: skip
    run = open_client(store).get_run(first.run_id)
    assert again == first
    assert run.info.status == "RUNNING"
    assert run.data.params == {"rounds": "5", "lr": "0.1", "new": "1"}
    assert run.data.tags["resumed"] == "yes"
    assert "keeps its first values of rounds (parameters can't change)" in caplog.text


def test_an_unknown_run_and_a_trashed_experiment_are_one_line_errors(store: str) -> None:
    with pytest.raises(ConfigError, match=r"0123abcd.*tracking\.enabled=false") as caught:
        create_run(store, experiment="e", run_name="r", params={}, tags={}, run_id="0123abcd")
    assert "\n" not in str(caught.value)
    handle = create_run(store, experiment="e", run_name="r", params={}, tags={})
    open_client(store).delete_experiment(handle.experiment_id)
    with pytest.raises(ConfigError, match=f"'e' is in the store's trash.*--experiment-id {handle.experiment_id}"):
        create_run(store, experiment="e", run_name="r", params={}, tags={})


def test_an_absent_server_is_an_error_of_one_line() -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9 can't be used") as caught:
        create_run("http://127.0.0.1:9", experiment="e", run_name="r", params={}, tags={})
    assert "\n" not in str(caught.value)


def test_http_limits_hold_only_for_our_calls_and_never_beat_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CALL_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with patience():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == CALL_SETTINGS["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_what_is_wrong_with_a_store_is_told_without_mlflow(tmp_path: Path, store: str) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no database, but text of some length")
    for uri in (f"sqlite:///{text}", f"sqlite:///{text}/mlflow.db"):
        with pytest.raises(
            ConfigError, match=r"the MLflow store .* can't be used: .*tracking\.enabled=false"
        ) as caught:
            check_store(uri)
        assert "\n" not in str(caught.value)
    fine = tmp_path / "new" / "mlflow.db"
    check_store(f"sqlite:///{fine}")
    assert not fine.exists()
    for uri in (store, "postgresql://user@host/db", "http://127.0.0.1:9"):  # a server may answer later
        check_store(uri)


@pytest.mark.slow
def test_two_processes_create_one_store_at_once(tmp_path: Path) -> None:
    """Neither the first migration nor the experiment may be made twice."""
    code = (
        "import sys; from fedsim.tracking import create_run; "
        "print(create_run(sys.argv[1], experiment='same', run_name='r', params={'a': 1}, tags={}).experiment_id)"
    )
    uri = default_uri(tmp_path / "new", f"sqlite:///{tmp_path}/new/mlflow.db")
    root = Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, uri], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    experiments = {out.strip() for out, _ in answers}
    assert len(experiments) == 1
    assert [err for _, err in answers] == ["", ""]
    assert len(open_client(uri).search_runs(sorted(experiments))) == 2
