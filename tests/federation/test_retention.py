"""Retention: which checkpoints stay, that the newest valid one always does, and whose rows go."""

from __future__ import annotations

import json
import logging
import math

import pytest
from test_resume import NONE, state_of
from worlds import make_server, reconfigured, run, tiny_config

from fedsim.errors import CheckpointError
from fedsim.federation.checkpoint import load_checkpoint
from fedsim.federation.experiment import Experiment, RunFiles
from fedsim.federation.retention import kept_rounds, thin_out
from fedsim.tracking.null_tracker import NullTracker

TOP1 = {1: 0.2, 2: 0.9, 3: 0.5, 5: 0.9, 6: 0.1}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (None, 0, {1, 2, 3, 4, 5, 6}),
        (1, 0, {6}),
        (2, 0, {5, 6}),
        (9, 9, {1, 2, 3, 4, 5, 6}),
        (1, 1, {2, 6}),  # of equals the earliest
        (1, 2, {2, 5, 6}),
        (3, 1, {2, 4, 5, 6}),
        (1, 5, {1, 2, 3, 5, 6}),  # round 4 wasn't evaluated
    ],
)
def test_which_rounds_stay(keep_last, keep_best, kept):
    assert kept_rounds(range(1, 7), TOP1, keep_last=keep_last, keep_best=keep_best) == kept


def folders(run_dir) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def saved(setup, run_dir, rounds: int):
    server = make_server(setup, run_dir=run_dir)
    for _ in range(rounds):
        server.run_round()
        server.save(run_dir, mlflow_run_id=None)
    return server


def test_an_experiment_keeps_the_last_and_the_best(setup, tmp_path):
    setup = reconfigured(setup, "feda2v.global_model_train=false")
    files = RunFiles(tmp_path, checkpoint_every=1, last_round=4, keep_last=1, keep_best=1)
    experiment = Experiment(make_server(setup, run_dir=tmp_path), files, NullTracker())
    top1 = {}
    for number in range(1, 5):
        top1[number] = experiment.round().metrics["eval/top1"]
        best = min(top1, key=lambda n: (-top1[n], n))
        assert folders(tmp_path) == {f"round-{number}", f"round-{best}"}


def test_a_resumed_experiment_remembers_which_was_the_best(setup, tmp_path):
    setup = reconfigured(setup, "feda2v.global_model_train=false")
    files = RunFiles(tmp_path, checkpoint_every=1, last_round=4, keep_last=1, keep_best=1)
    first = Experiment(make_server(setup, run_dir=tmp_path), files, NullTracker())
    first.round(), first.round()
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in text]
    records[0]["metrics"]["eval/top1"], records[1]["metrics"]["eval/top1"] = 2.0, None
    saved(setup, tmp_path, 1)  # the checkpoint of round 1 again, whichever was deleted
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    state, _ = load_checkpoint(tmp_path, setup.config)
    assert state.round_number == 2
    again = Experiment(make_server(setup, state=state, run_dir=tmp_path), files, NullTracker())
    again.round()
    assert folders(tmp_path) == {"round-1", "round-3"}


def test_defaults_keep_five_and_the_best():
    experiment = tiny_config().experiment
    assert (experiment.keep_last, experiment.keep_best) == (5, 1)
    assert tiny_config("experiment.keep_last=null").experiment.keep_last is None


def test_nothing_is_deleted_while_the_newest_does_not_read_back(setup, tmp_path, caplog):
    saved(setup, tmp_path, 3)
    file = tmp_path / "checkpoints" / "round-3" / "adapter.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert thin_out(tmp_path, {}, newest=3, keep_last=1, keep_best=0) == []
    assert folders(tmp_path) == {"round-1", "round-2", "round-3"}
    assert "no earlier one is deleted" in caplog.text
    file.write_bytes(content)
    assert thin_out(tmp_path, {}, newest=3, keep_last=1, keep_best=0) == [1, 2]
    assert folders(tmp_path) == {"round-3"}


def test_later_ones_that_a_resume_passed_over_count_for_nothing(setup, tmp_path, caplog):
    server = saved(setup, tmp_path, 4)
    for number in (3, 4):
        (tmp_path / "checkpoints" / f"round-{number}" / "state.json").write_text("{")
    assert thin_out(tmp_path, {}, newest=2, keep_last=1, keep_best=0) == [1]
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        state, _ = load_checkpoint(tmp_path, server.config)
    assert state.round_number == 2
    assert len([record for record in caplog.records if "passed over a checkpoint" in record.getMessage()]) == 2
    assert "the newest valid checkpoint is round-2" in caplog.text


def test_leftovers_of_broken_off_writes_and_deletions_go(setup, tmp_path):
    saved(setup, tmp_path, 1)
    for name in (".round-1.partial", ".round-7.deleted"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "adapter.safetensors").write_bytes(b"half")
    assert thin_out(tmp_path, {}, newest=1, keep_last=None, keep_best=0) == []
    assert folders(tmp_path) == {"round-1"}


def test_rows_that_no_checkpoint_refers_to_go_and_all_others_stay_exact(setup, tmp_path):
    setup = reconfigured(setup, *NONE, "federation.global_rounds=12")
    sizes = {}
    for keep_last in (None, 2):
        folder = tmp_path / str(keep_last)
        folder.mkdir()
        server = make_server(setup, run_dir=folder)
        files = RunFiles(folder, checkpoint_every=1, last_round=12, keep_last=keep_last, keep_best=0)
        experiment, states = Experiment(server, files, NullTracker()), {}
        for number in range(1, 13):
            experiment.round()
            states[number] = state_of(server)
        sizes[keep_last] = (folder / "clients" / "rows.f32").stat().st_size
        for number in (12, 11):
            state, _ = load_checkpoint(folder, setup.config)
            assert state_of(make_server(setup, state=state, run_dir=folder)) == states[number]
            path = folder / "checkpoints" / f"round-{number}" / "state.json"
            path.rename(path.with_suffix(".hidden"))
    row = 4 * sum(tensor.numel() for tensor in server.state.adapter.values())
    assert sizes[2] <= 4 * (7 + 4 + 4) * row / 4  # everybody's, and the versions of the last two cohorts
    assert sizes[None] > 2 * sizes[2]
    assert math.isfinite(row)


@pytest.mark.parametrize("damage", ["a bit", "zeros"])
def test_a_changed_row_is_named_and_an_earlier_checkpoint_serves(setup, tmp_path, damage, caplog):
    setup = reconfigured(setup, *NONE)
    server = saved(setup, tmp_path, 2)
    first = state_of(run(setup, 1, run_dir=tmp_path / "other")[0])
    second = state_of(server)
    index, file = server.state.clients, tmp_path / "clients" / "rows.f32"
    row = 4 * sum(tensor.numel() for tensor in server.state.adapter.values())
    slot = int(index.slots.max())  # of round 2 alone
    content = bytearray(file.read_bytes())
    if damage == "a bit":
        content[slot * row + 5] ^= 8
    else:
        content[slot * row : slot * row + 64] = bytes(64)
    file.write_bytes(content)
    state, _ = load_checkpoint(tmp_path, setup.config)
    client = int(index.ids[index.slots == slot][0])
    assert f"{file} is damaged: the tensors of client {client} have changed" in caplog.text
    assert state.round_number == 1
    again = make_server(setup, state=state, run_dir=tmp_path)
    assert state_of(again) == first
    again.run_round()
    assert state_of(again) == second
    file.write_bytes(bytes(len(content)))
    with pytest.raises(CheckpointError, match="no valid checkpoint is left"):
        load_checkpoint(tmp_path, setup.config)
