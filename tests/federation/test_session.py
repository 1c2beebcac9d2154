"""Whole runs through the public functions, in this process: what they leave, how they end, how they go on."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from worlds import SERVER_STEP, digest_after, make_server, slow_but, tiny_config

from fedsim.cli import session
from fedsim.errors import CheckpointError, ConfigError, DataError
from fedsim.federation.experiment import Experiment, RunFiles, run_rounds
from fedsim.federation.run_directory import fault_record, keep_rounds, read_history
from fedsim.models.guarded_files import sealed
from fedsim.models.saved import digest, load_adapter
from fedsim.tracking.null_tracker import NullTracker
from fedsim.types import Fault

CONFIG = (*SERVER_STEP, "experiment.checkpoint_every=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its directory, its result, and what it printed."""
    folder, shown = tmp_path_factory.mktemp("runs") / "run", StringIO()
    result = session.run(tiny_config(*CONFIG), output=folder, console=Console(file=shown, width=200))
    return folder, result, shown.getvalue()


def test_a_run_directory_holds_what_other_programs_rely_on(finished):
    folder, result, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "result.json", "checkpoints", "adapter", "plots"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"round-2", "round-4"}
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["rounds"] == 4
    assert len(result["digest"]) == 64
    assert result["mlflow_run_id"] is None
    assert {"python", "torch", "numpy", "ray"} <= result["versions"].keys()
    assert result["used"]["text_clip"] == "seeded unit vectors (offline, no meaning)"
    history = read_history(folder)
    assert [record["round"] for record in history] == [1, 2, 3, 4]
    for record in history:
        assert {"round", "metrics", "seconds", "lost"} <= record.keys()
    assert result["metrics"] == history[-1]["metrics"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin") or "partial" in path.name]


def test_a_run_can_do_without_pictures(finished, tmp_path):
    result = session.run(tiny_config(*CONFIG, "tracking.plots=false"), output=tmp_path / "run")
    assert not (tmp_path / "run" / "plots").exists()
    assert result["digest"] == finished[1]["digest"]


def test_the_digest_is_that_of_the_server_and_of_the_saved_adapter(finished, setup):
    folder, result, _ = finished
    assert result["digest"] == digest_after(setup)
    saved = load_adapter(folder / "adapter")
    assert digest(saved.state) == result["digest"] == saved.info["digest"]
    assert saved.heads == {"clip": (16,), "t5": (4, 16)}
    assert saved.info["class_names"] == ["dog", "rain", "sneezing", "chainsaw"]
    assert saved.info["top1"] == result["metrics"]["eval/top1"]


def test_the_saved_adapter_scores_what_the_run_says(finished, setup):
    folder, result, _ = finished
    saved, server = load_adapter(folder / "adapter"), make_server(setup)
    rows = torch.from_numpy(np.array(server.parts.store.rows[setup.test_rows]))
    labels = torch.from_numpy(setup.labels[setup.test_rows])
    cosine = server.parts.objective.cosines("clip", saved(rows)["clip"].unsqueeze(0))[0]
    assert float((cosine.argmax(1) == labels).double().mean()) == result["metrics"]["eval/top1"]


def test_the_end_of_a_run_says_where_to_look(finished):
    folder, result, shown = finished
    assert f"digest {result['digest']}" in shown
    assert str(folder) in shown
    assert f"{result['metrics']['eval/top1']:.1%} after refinement" in shown


def interrupted(finished, tmp_path, *, after: int):
    """A copy of the run as a kill after some round would have left it: no result, no adapter, half a line."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    for name in ("adapter", "plots"):
        shutil.rmtree(folder / name)
    (folder / "result.json").unlink()
    if after < 4:
        shutil.rmtree(folder / "checkpoints" / "round-4")
    keep_rounds(folder, up_to=after)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 4, "metr')
    return folder


@pytest.mark.parametrize("after", slow_but([3], [2, 3, 4]))
def test_a_resumed_run_ends_like_an_uninterrupted_one(finished, tmp_path, after):
    folder = interrupted(finished, tmp_path, after=after)
    result = session.resume(folder)
    assert result["digest"] == finished[1]["digest"]
    strip = {"clients/per_second": 0}
    assert result["metrics"] | strip == finished[1]["metrics"] | strip
    whole, again = read_history(finished[0]), read_history(folder)
    assert [r["metrics"] | strip for r in again] == [r["metrics"] | strip for r in whole]
    assert (folder / "adapter" / "adapter.safetensors").is_file()


def test_resuming_a_finished_run_changes_nothing(finished, caplog):
    folder, result, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with caplog.at_level(logging.INFO, logger="fedsim"):
        assert session.resume(folder) == result
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "is finished: 4 rounds" in caplog.text


def test_resuming_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a run directory: it has no config\.yaml"):
        session.resume(tmp_path)


def test_resuming_before_the_first_checkpoint_starts_again(finished, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished[0] / "config.yaml", folder)
    fault = {"kind": "killed", "actor": "client-0", "node": "", "block": 1, "round": 1, "reason": "it died"}
    (folder / "metrics.jsonl").write_text(json.dumps({"round": 1, "metrics": {}, "faults": [fault]}) + "\n")
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        result = session.resume(folder)
    assert result["digest"] == finished[1]["digest"]
    # What broke in the rounds that were repeated isn't forgotten.
    assert result["faults"] == {"killed": 1}
    assert [record["faults"] for record in read_history(folder)] == [[fault], [], [], []]
    assert "holds no checkpoint: the run starts again at round 1" in caplog.text


def test_resuming_with_other_data_is_refused(finished, tmp_path):
    folder = interrupted(finished, tmp_path, after=2)
    state = next((folder / "checkpoints").glob("round-2")) / "state.json"
    state.write_text(json.dumps(sealed(json.loads(state.read_text()) | {"data_fingerprint": "0" * 64})))
    with pytest.raises(CheckpointError, match="made with other data"):
        session.resume(folder)


def test_a_resume_that_only_has_to_finish_evaluates_for_the_plots(finished, tmp_path):
    folder = interrupted(finished, tmp_path, after=4)
    (folder / "result.json").unlink(missing_ok=True)
    assert session.resume(folder)["metrics"] == finished[1]["metrics"]
    assert (folder / "plots" / "confusion_matrix.png").read_bytes() == (
        finished[0] / "plots" / "confusion_matrix.png"
    ).read_bytes()


def test_resuming_with_an_edited_configuration_is_refused_naming_the_key(finished, tmp_path):
    folder = interrupted(finished, tmp_path, after=2)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02", 1))
    with pytest.raises(CheckpointError, match=r"training\.learning_rate was 0\.01, now 0\.02"):
        session.resume(folder)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_is_never_written_over(finished):
    with pytest.raises(ConfigError, match="nothing is written over"):
        session.run(tiny_config(*CONFIG), output=finished[0])


def test_a_run_that_can_not_start_leaves_no_directory(tmp_path):
    with pytest.raises(DataError, match="no statistics from clients"):
        session.run(tiny_config(*CONFIG, "privacy.min_count=1000"), output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


class Witness:
    """A tracker that looks at the run directory at every round, and dies where it is told to."""

    def __init__(self, run_dir, *, dies_in: int) -> None:
        self.run_dir, self.dies_in, self.seen = run_dir, dies_in, []

    def address(self) -> None:
        pass

    def log_round(self, result) -> None:
        checkpoints = sorted(path.name for path in self.run_dir.glob("checkpoints/round-*"))
        self.seen.append(([record["round"] for record in read_history(self.run_dir)], checkpoints))
        if result.round_number == self.dies_in:
            raise KeyboardInterrupt

    def log_report(self, report) -> None:
        pass

    def finish(self, status, summary, tags) -> None:
        pass


def test_numbers_are_written_before_the_checkpoint_that_makes_them_final(setup, tmp_path):
    # Else a kill between the two would lose the round's numbers: a resume begins after the checkpoint.
    files = RunFiles(tmp_path, checkpoint_every=1, last_round=4)
    witness = Witness(tmp_path, dies_in=3)
    experiment = Experiment(make_server(setup), files, witness)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(experiment, range(1, 5), lambda result: None)
    assert witness.seen == [
        ([1], []),
        ([1, 2], ["round-1"]),
        ([1, 2, 3], ["round-1", "round-2"]),
    ]


def test_what_broke_is_recorded_once_though_the_server_died_after_it_wrote_it(setup, tmp_path):
    files, fault = (
        RunFiles(tmp_path, checkpoint_every=9, last_round=4),
        Fault("resumed", "driver", "here", None, 1, "x"),
    )
    Experiment(make_server(setup), files, NullTracker(), [fault]).round()  # and dies before its driver knows
    again = Experiment(make_server(setup), replace(files, recorded=1), NullTracker(), [fault])
    again.round(), again.round()
    assert [record["faults"] for record in read_history(tmp_path)] == [[fault_record(fault)], []]


def test_checkpoints_are_written_when_due_and_after_the_last_round(setup, tmp_path):
    for every, wanted in ((1, {1, 2, 3, 4}), (3, {3, 4}), (9, {4})):
        folder = tmp_path / str(every)
        folder.mkdir()
        files = RunFiles(folder, checkpoint_every=every, last_round=4)
        experiment = Experiment(make_server(setup), files, NullTracker())
        assert [experiment.round().round_number for _ in range(4)] == [1, 2, 3, 4]
        assert {int(path.name[6:]) for path in (folder / "checkpoints").iterdir()} == wanted
