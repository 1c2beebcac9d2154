"""Whole runs beside a real MLflow server that goes away: nothing is missing, nothing is there twice, no round waits.

Every check asks the server, or its database, and compares with metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import MlflowServer
from recorded import mlflow_threads, twice

sys.path.insert(0, str(Path(__file__).parents[1] / "federation"))

from worlds import SERVER_STEP, tiny_config

from fedsim.cli import session
from fedsim.config import Config, resolved_yaml
from fedsim.errors import TrackingError
from fedsim.federation.experiment import Experiment
from fedsim.federation.run_directory import read_history
from fedsim.tracking.calls import open_client
from fedsim.tracking.mlflow_tracker import WAIT_S
from fedsim.tracking.round_values import record_metrics
from fedsim.types import RoundResult

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 12


@pytest.fixture
def server(template_database: Path, tmp_path: Path) -> Iterator[MlflowServer]:
    """A server that is not yet started, with a migrated database."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "server.db").write_bytes(template_database.read_bytes())
    with MlflowServer(tmp_path / "server") as made:
        yield made


def config_for(uri: str, *more: str) -> Config:
    return tiny_config(
        *SERVER_STEP, "tracking.enabled=true", f"tracking.uri={uri}", f"federation.global_rounds={ROUNDS}",
        "experiment.checkpoint_every=1", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def calm() -> dict[str, Any]:
    """The digest, and the seconds of the run without MLflow."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        result = session.run(config_for("http://127.0.0.1:9", "tracking.enabled=false"), output=f"{folder}/run")
        return {"digest": result["digest"], "seconds": time.monotonic() - start}


class At:
    """Does something after a round, in the run's own thread, and notes how long the rounds take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **actions: Any) -> None:
        self.seconds: list[float] = []
        self._actions, self._round = actions, Experiment.round
        monkeypatch.setattr(Experiment, "round", lambda experiment: self.round(experiment))

    def round(self, experiment: Experiment) -> RoundResult:
        start = time.monotonic()
        result = self._round(experiment)
        self.seconds.append(time.monotonic() - start)
        self._actions.get(f"after_{result.round_number}", lambda: None)()
        return result


def check_everything_is_there_once(
    run_dir: Path, server: MlflowServer, calm: dict[str, Any], *, repeated: tuple[int, ...] = ()
) -> None:
    """Every value of metrics.jsonl is in the server's one run, once, and so are files, model, summary and status.

    Of rounds that a resume repeated the server keeps the times of the first go.
    """
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["digest"], result["mlflow_uri"], result["mlflow_lacks"]) == (calm["digest"], server.uri, None)
    client, run_id = open_client(server.uri), result["mlflow_run_id"]
    run = client.get_run(run_id)
    assert [found.info.run_id for found in client.search_runs([run.info.experiment_id])] == [run_id]
    wanted = {
        (name, record["round"]): value
        for record in read_history(run_dir)
        for name, value in record_metrics(record).items()
    }
    assert {number for _, number in wanted} == set(range(1, ROUNDS + 1))
    found = [
        ((name, metric.step), metric.value)
        for name in run.data.metrics
        if not name.startswith("final/")
        for metric in client.get_metric_history(run_id, name)
    ]
    assert len(found) == len(wanted)
    kept = [key for key in wanted if key[1] in repeated and (key[0].startswith("time/") or "per_second" in key[0])]
    assert dict(found) == wanted | {key: dict(found)[key] for key in kept}
    assert twice(server.database) == []
    assert run.data.metrics["final/top1"] == result["metrics"]["eval/top1"]
    assert (run.info.status, run.data.tags["digest"]) == ("FINISHED", result["digest"])
    assert run.data.params["training.learning_rate"] == "0.01"
    assert {item.path for item in client.list_artifacts(run_id)} == {"config.yaml", "metrics.jsonl", "plots"}
    assert len(client.list_artifacts(run_id, "plots")) >= 3
    [model] = client.search_logged_models([run.info.experiment_id])
    assert (str(model.status), model.source_run_id) == ("READY", run_id)
    assert "MLmodel" in {item.path for item in client.list_logged_model_artifacts(model.model_id)}
    assert len(run.outputs.model_outputs) == 1
    assert mlflow_threads() == []


def later(seconds: float, *actions: Any) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: [action() for action in actions])
    timer.start()
    return timer


@pytest.mark.parametrize("away_s", [5.0, 30.0])
@pytest.mark.parametrize("fault", ["stopped", "killed"])
def test_a_server_that_goes_away_in_mid_run_gets_everything_once(
    server: MlflowServer,
    calm: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    away_s: float,
) -> None:
    server.start()
    timers: list[threading.Timer] = []

    def leave() -> None:
        if fault == "killed":
            server.kill()
            timers.append(later(away_s, server.start))
        else:
            server.signal(signal.SIGSTOP)
            timers.append(later(away_s, lambda: server.signal(signal.SIGCONT)))

    at = At(monkeypatch, after_4=leave)
    start = time.monotonic()
    session.run(config_for(server.uri), output=tmp_path / "run")
    ended = time.monotonic() - start
    timers[0].join()
    print(f"{fault} for {away_s:g} s: {ended:.1f} s, longest round {max(at.seconds[4:]):.2f} s")
    # No round waited for the server.
    assert max(at.seconds[4:]) < 0.2 * calm["seconds"] + 2
    check_everything_is_there_once(tmp_path / "run", server, calm)


def test_a_server_that_is_away_at_the_start_gets_the_run_later(
    server: MlflowServer, calm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[threading.Timer] = []
    At(monkeypatch, after_6=lambda: timers.append(later(0, server.start)))
    session.run(config_for(server.uri), output=tmp_path / "run")
    timers[0].join()
    check_everything_is_there_once(tmp_path / "run", server, calm)


def test_a_server_that_hangs_at_the_start_makes_one_run(
    server: MlflowServer, calm: dict[str, Any], tmp_path: Path
) -> None:
    """Its one worker takes the calls, answers none, and carries them all out when it goes on."""
    server.start()
    server.signal(signal.SIGSTOP)
    timer = later(25, lambda: server.signal(signal.SIGCONT))
    session.run(config_for(server.uri), output=tmp_path / "run")
    timer.join()
    check_everything_is_there_once(tmp_path / "run", server, calm)


def test_a_server_that_stays_away_holds_the_end_up_for_a_bounded_time_and_a_sync_delivers(
    server: MlflowServer,
    calm: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    server.start()
    At(monkeypatch, after_8=server.kill)
    start = time.monotonic()
    result = session.run(config_for(server.uri), output=tmp_path / "run", console=Console(width=200))
    assert time.monotonic() - start < 3 * calm["seconds"] + WAIT_S + 30
    shown = capsys.readouterr().out.strip().splitlines()
    assert shown[-1].startswith("MLflow lacks ")
    assert f"-{ROUNDS}, 6 files, the model, its end (FINISHED); deliver it with: fedsim sync" in shown[-1]
    assert result["mlflow_lacks"] in shown[-1]
    words = [sys.executable, "-m", "fedsim", "sync", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    away = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert away.returncode == 2
    assert "still lacks" in away.stderr
    assert "Traceback" not in away.stderr + away.stdout
    server.start()
    for _ in range(2):  # the second one finds nothing to do
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "holds everything" in done.stdout
        check_everything_is_there_once(tmp_path / "run", server, calm)
    with pytest.raises(TrackingError, match="holds no notes"):
        session.sync(tmp_path)


HELD_AFTER_ROUND_8 = """
import sys, time
from fedsim.cli import session
from fedsim.config import load_config
from fedsim.federation.experiment import Experiment

step = Experiment.round

def held(experiment):
    result = step(experiment)
    if result.round_number == 8:
        time.sleep(600)
    return result

Experiment.round = held
session.run(load_config(sys.argv[1]), output=sys.argv[2])
"""


def test_a_killed_run_goes_on_in_its_mlflow_run_without_a_repeated_step(
    server: MlflowServer, calm: dict[str, Any], tmp_path: Path
) -> None:
    """It had delivered rounds beyond the checkpoint that it goes on from."""
    server.start()
    run_dir = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(resolved_yaml(config_for(server.uri, "experiment.checkpoint_every=5")))
    words = [sys.executable, "-c", HELD_AFTER_ROUND_8, str(tmp_path / "config.yaml"), str(run_dir)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
    notes = run_dir / "tracking" / "delivered.json"
    until = time.monotonic() + 240
    while not (notes.is_file() and json.loads(notes.read_text())["last_round"] == 8):
        assert driver.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < until
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    assert not (run_dir / "result.json").exists()
    before = json.loads(notes.read_text())
    result = session.resume(run_dir)
    assert result["mlflow_run_id"] == before["run_id"]
    check_everything_is_there_once(run_dir, server, calm, repeated=(6, 7, 8))


@pytest.mark.parametrize("runs", [2, 4])
def test_runs_that_write_one_sqlite_store_at_once_lose_nothing(tmp_path: Path, runs: int, store: str) -> None:
    """While a program of somebody else's locks the database for seconds, again and again."""
    import sqlite3

    drivers = []
    for number in range(runs):
        config = config_for(store, f"experiment.seed={number}", "experiment.checkpoint_every=4")
        (tmp_path / f"{number}.yaml").write_text(resolved_yaml(config))
        words = [sys.executable, "-m", "fedsim", "run", f"{tmp_path}/{number}.yaml", "--output", f"{tmp_path}/{number}"]
        log = (tmp_path / f"{number}.log").open("w")
        drivers.append(subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log))
        log.close()
    database, locked = Path(store.removeprefix("sqlite:///")), 0
    while any(driver.poll() is None for driver in drivers):
        blocker = sqlite3.connect(database, isolation_level=None, timeout=60)
        blocker.execute("begin exclusive")
        time.sleep(6 if locked < 2 else 0.5)  # longer than SQLite itself waits
        blocker.execute("rollback")
        blocker.close()
        locked += 1
        time.sleep(1)
    assert [driver.returncode for driver in drivers] == [0] * runs, (tmp_path / "0.log").read_text()
    assert locked > 2
    client = open_client(store)
    for number in range(runs):
        result = json.loads((tmp_path / str(number) / "result.json").read_text())
        assert result["mlflow_lacks"] is None
        run = client.get_run(result["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        wanted = {
            (name, r["round"]): value
            for r in read_history(tmp_path / str(number))
            for name, value in record_metrics(r).items()
        }
        found = [
            ((name, metric.step), metric.value)
            for name in run.data.metrics
            if not name.startswith("final/")
            for metric in client.get_metric_history(result["mlflow_run_id"], name)
        ]
        assert len(found) == len(wanted)
        assert dict(found) == wanted
        assert "Traceback" not in (tmp_path / f"{number}.log").read_text()
    assert len(client.search_runs([run.info.experiment_id])) == runs
    assert twice(database) == []
