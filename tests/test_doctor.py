"""`fedsim doctor`: each finding against an environment made for it, and the whole on a real Ray."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedsim.cli import doctor
from fedsim.cli.doctor import Finding, examine
from fedsim.machine import usable_cores


def states(findings: object) -> dict[str, str]:
    return {finding.subject: finding.state for finding in findings}


def test_versions_name_what_runs_depend_on() -> None:
    found = list(doctor.check_versions())
    assert states(found) == {"versions": "ok", "search": "ok"}
    assert all(name in found[0].text for name in ("fedsim 0.", "python 3.", "torch ", "ray ", "mlflow "))


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no-such-package"))
    found = {finding.subject: finding for finding in doctor.check_versions()}
    assert found["packages"] == Finding(
        "packages", "problem", "not installed: no-such-package", "pip install fedsim-a2v"
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity, which Linux has")
def test_cores_are_those_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() <= 1
    finally:
        os.sched_setaffinity(0, before)
    assert 0 < usable_cores() <= len(before)


def test_the_machine_has_memory_and_a_word_about_gpus() -> None:
    found = {finding.subject: finding.text for finding in doctor.check_machine()}
    assert set(found) == {"cores", "memory", "GPUs"}
    assert found["memory"].endswith("GB free")
    assert found["GPUs"]


def test_a_cache_that_can_not_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    [finding] = doctor.check_disk()
    assert str(tmp_path / "new" / "fedsim") in finding.text
    assert finding.state in ("ok", "note")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert states(doctor.check_disk()) == {"cache": "problem"}


def test_data_sets_are_found_missed_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    assert states(doctor.check_data()) == {"data": "note"}
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "nowhere"))
    assert states(doctor.check_data()) == {"data": "problem"}
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    [finding] = doctor.check_data()
    assert finding == Finding("data", "ok", f"{tmp_path}: synthetic; not there: esc10, esc50, yamnet, text_minilm")
    (tmp_path / "yamnet").mkdir()
    (tmp_path / "yamnet/yamnet.npz").write_bytes(b"")
    (tmp_path / "esc50/meta").mkdir(parents=True)
    (tmp_path / "esc50/meta/esc50.csv").write_text("filename\nx.wav\n")
    found = list(doctor.check_data())
    assert [finding.state for finding in found] == ["problem", "problem", "ok"]  # ESC-10 is taken from ESC-50's folder
    assert "esc50: " in found[1].text
    assert "synthetic, yamnet;" in found[2].text


def test_real_data_is_counted(shared_data: Path) -> None:
    [finding] = doctor.check_data()
    assert finding.state == "ok"
    assert "esc10 (400 recordings)" in finding.text


def test_checkpoints_are_looked_up_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = tmp_path / "models--openai--clip-vit-large-patch14/snapshots/abc"
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs/main").write_text("abc")
    offline = {finding.subject: finding for finding in doctor.check_checkpoints()}
    assert states(offline.values()) == {"Hugging Face": "ok", "AST": "note", "CLIP": "ok", "T5": "note"}
    assert "HF_HUB_OFFLINE is set" in offline["Hugging Face"].text
    assert "logmel" in offline["AST"].advice
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = {finding.subject: finding for finding in doctor.check_checkpoints()}
    assert online["T5"].advice == "hf download google/t5-v1_1-xxl"


def test_audio_formats_are_named() -> None:
    [finding] = doctor.check_audio()
    assert finding.text.startswith("libsndfile 1.")


def test_mlflow_is_where_a_run_would_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    [finding] = doctor.check_mlflow()
    assert finding == Finding("MLflow", "ok", f"sqlite:///{tmp_path}/runs/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert next(doctor.check_mlflow()).text == "http://localhost:5000 (MLFLOW_TRACKING_URI)"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    assert states(doctor.check_mlflow()) == {"MLflow": "problem"}


def test_an_address_where_no_cluster_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    start = time.monotonic()
    [finding] = doctor.check_ray()
    assert time.monotonic() - start < 10
    assert finding.state == "problem"
    assert finding.text.startswith("127.0.0.1:1: ")
    assert finding.advice == "set RAY_ADDRESS right, or unset it"


def test_the_exit_code_says_whether_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("a", "ok", "[1, 2] there"), Finding("b", "note", "not there", "fetch it")]
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter(findings),))
    screen = io.StringIO()
    assert examine(Console(file=screen, width=80)) == 0
    assert [line.split() for line in screen.getvalue().splitlines()] == [
        ["a", "ok", "[1,", "2]", "there"],
        ["b", "note", "not", "there", "→", "fetch", "it"],
        ["ready", "to", "run"],
    ]
    findings.append(Finding("c", "problem", "broken", "mend it"))
    assert examine(Console(file=screen, width=80)) == 1
    assert screen.getvalue().splitlines()[-1] == "1 problem"


@pytest.mark.ray
def test_ray_starts_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = ray.is_initialized()
    [finding] = doctor.check_ray()
    assert finding.state == "ok"
    assert "a private one starts and stops in" in finding.text
    assert ray.is_initialized() == before
