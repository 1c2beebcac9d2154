"""Whole runs with everything real: the command line in processes of their own, Ray, SQLite MLflow, and `kill -9`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from worlds import SERVER_STEP, tiny_config

import fedsim
from fedsim.cli import session
from fedsim.config import resolved_yaml
from fedsim.federation.run_directory import read_history
from fedsim.launch.record import git_commit
from fedsim.models.saved import digest
from fedsim.tracking.calls import open_client

ROOT = Path(__file__).resolve().parents[2]
# Rounds of about a second, so that there is a middle to be killed in.
CONFIG = (
    *SERVER_STEP,
    "federation.global_rounds=6",
    "federation.local_epochs=60",
    "experiment.checkpoint_every=1",
    "tracking.enabled=true",
)
EVERY_ROUND = {
    "server/generator_loss",
    "server/adapter_finetuning_loss",
    "round",
    "eval/top1",
    "eval/top1_averaged",
    "eval/nmse_clip",
    "train/loss",
    "time/train_s",
    "time/refine_s",
    "bytes/up",
    "bytes/down",
    "clients/lost",
    "clients/per_second",
}


def mlflow_run(result):
    """The MLflow run of a result, and its client."""
    client = open_client(result["mlflow_uri"])
    return client, client.get_run(result["mlflow_run_id"])


def check_record(result, *, rounds: int) -> None:
    """Every metric of the contract was recorded once for every round, and the run is closed."""
    client, recorded = mlflow_run(result)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["digest"] == result["digest"]
    assert recorded.data.tags["fedsim.data_fingerprint"] == result["data_fingerprint"]
    assert recorded.data.params["training.learning_rate"] == "0.01"
    for name in EVERY_ROUND:
        history = client.get_metric_history(result["mlflow_run_id"], name)
        assert sorted(metric.step for metric in history) == list(range(1, rounds + 1)), name
    assert recorded.data.metrics["eval/top1"] == result["metrics"]["eval/top1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run in this process, without Ray."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        return folder, session.run(tiny_config(*CONFIG), output=folder)
    finally:
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.mark.slow
def test_a_run_leaves_the_directory_and_the_record_that_other_programs_rely_on(uninterrupted):
    folder, result = uninterrupted
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
        "adapter",
        "plots",
        "tracking",
    }
    assert (folder.parent / "mlflow.db").is_file()
    assert json.loads((folder / "result.json").read_text()) == result
    check_record(result, rounds=6)
    tags = mlflow_run(result)[1].data.tags
    assert tags.get("mlflow.source.git.commit", "") == git_commit()
    assert tags["fedsim.used.text_clip"] == "seeded unit vectors (offline, no meaning)"
    saved = fedsim.load_adapter(folder / "adapter")
    assert digest(saved.state) == result["digest"]
    assert saved(torch.zeros(2, *saved.input_shape))["t5"].shape == (2, 4, 16)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fedsim", *words]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    hidden = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"PYTHONPATH": path}


def wait_until(condition, what: str, *, timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def is_actor(process: psutil.Process) -> bool:
    try:
        return any(f"ray::{kind}" in word for word in process.cmdline() for kind in ("ServerActor", "ClientActor"))
    except psutil.NoSuchProcess:
        return False


def has_ended(process: psutil.Process) -> bool:
    """Gone, or a zombie that nobody has buried."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
@pytest.mark.ray
def test_kill_9_and_resume_end_like_an_uninterrupted_run(uninterrupted, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(resolved_yaml(tiny_config(*CONFIG, "resources.client_actors=2", "resources.num_cpus=2")))
    run_dir = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            command("run", str(config), "--output", str(run_dir)),
            cwd=tmp_path,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(
                lambda: driver.poll() is not None or (run_dir / "checkpoints" / "round-3" / "state.json").is_file(),
                "round 3",
            )
            assert driver.poll() is None, (tmp_path / "log").read_text()
            family = psutil.Process(driver.pid).children(recursive=True)
            own = [process for process in family if is_actor(process)]
        finally:
            driver.kill()
            driver.wait()
    # The actors go with their driver, or the server would go on writing beside the resumed run.
    assert len(own) == 3
    wait_until(lambda: all(has_ended(process) for process in own), "the end of the actors", timeout_s=30)
    for process in family:
        if not has_ended(process):
            process.kill()
    assert not (run_dir / "result.json").exists()
    assert 3 <= len(read_history(run_dir)) < 6
    owners = [file for file in Path("/tmp").glob("fs-*/owner") if file.read_text().strip() == str(driver.pid)]
    assert len(owners) == 1

    resumed = subprocess.run(
        command("resume", str(run_dir)), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert not owners[0].parent.exists(), "the killed driver's Ray folder is still there"
    result = json.loads((run_dir / "result.json").read_text())
    assert result["digest"] == uninterrupted[1]["digest"]
    assert f"digest {result['digest']}" in resumed.stdout
    strip = {"clients/per_second": 0}
    assert result["metrics"] | strip == uninterrupted[1]["metrics"] | strip
    assert [record["metrics"] | strip for record in read_history(run_dir)] == [
        record["metrics"] | strip for record in read_history(uninterrupted[0])
    ]
    check_record(result, rounds=6)
