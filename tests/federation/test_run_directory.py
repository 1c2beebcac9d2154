"""The run directory: never written over, and readable after a crash in the middle of a line."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from worlds import tiny_config

from fedsim.config import load_config
from fedsim.errors import CheckpointError, ConfigError
from fedsim.federation.run_directory import (
    append_round,
    create_run_directory,
    discard_unused,
    fault_record,
    keep_rounds,
    last_recorded,
    read_history,
    repeated_faults,
    write_text,
)
from fedsim.types import Fault, LostClient, RoundResult


def result(number: int, **metrics: float) -> RoundResult:
    lost = (LostClient(3, "its actor died"),)
    return RoundResult(number, 5, lost, {"eval/top1": 0.5} | metrics, {"train": 0.25}, 1000, 20)


def test_a_new_directory_holds_the_resolved_configuration(tmp_path):
    create_run_directory(tmp_path / "a" / "run", tiny_config())
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["config.yaml"]
    assert load_config(tmp_path / "a" / "run" / "config.yaml") == tiny_config()


def test_an_empty_directory_may_be_used(tmp_path):
    create_run_directory(tmp_path, tiny_config())
    assert (tmp_path / "config.yaml").is_file()


def test_a_directory_with_files_is_never_written_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError) as caught:
        create_run_directory(tmp_path, tiny_config())
    assert str(caught.value) == (
        f"{tmp_path} already exists and isn't empty: nothing is written over; go on with `fedsim resume {tmp_path}` "
        "or choose another --output"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    create_run_directory(tmp_path / "run", tiny_config())
    with pytest.raises(ConfigError, match="nothing is written over"):
        create_run_directory(tmp_path / "run", tiny_config())


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    # A file in place of a folder: true for every user, also for root.
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="already exists and isn't empty"):
        create_run_directory(file, tiny_config())
    with pytest.raises(ConfigError) as caught:
        create_run_directory(file / "run", tiny_config())
    assert str(caught.value) == f"can't write the run directory {file / 'run'}: Not a directory"


def test_rounds_are_lines_of_json(tmp_path):
    append_round(tmp_path, result(1, bad=float("nan"), worse=float("inf")))
    append_round(tmp_path, result(2))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert abs(first.pop("time") - time.time()) < 60
    assert first == {
        "round": 1,
        "metrics": {"eval/top1": 0.5, "bad": None, "worse": None},
        "seconds": {"train": 0.25},
        "lost": [{"client": 3, "reason": "its actor died"}],
        "faults": [],
        "cohort_size": 5,
        "bytes_up": 1000,
        "bytes_down": 20,
    }
    assert [record["round"] for record in read_history(tmp_path)] == [1, 2]
    assert [record["round"] for record in read_history(tmp_path, up_to=1)] == [1]


def test_a_half_written_last_line_is_left_out(tmp_path):
    for number in (1, 2, 3):
        append_round(tmp_path, result(number))
    file = tmp_path / "metrics.jsonl"
    for cut in (1, 10, 50):
        file.write_text(file.read_text()[:-cut])
        assert [record["round"] for record in read_history(tmp_path)] == [1, 2, 3][: 3 if cut == 1 else 2]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    append_round(tmp_path, result(1))
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-20] + "\n")
    append_round(tmp_path, result(2))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1: not the object of a round"):
        read_history(tmp_path)


def test_a_resume_drops_the_rounds_it_repeats(tmp_path):
    for number in (1, 2, 3):
        append_round(tmp_path, result(number))
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"round": 4, "metr')
    keep_rounds(tmp_path, up_to=2)
    append_round(tmp_path, result(3))
    assert [record["round"] for record in read_history(tmp_path)] == [1, 2, 3]
    assert file.read_text().endswith("\n")


def with_faults(number: int, *faults: Fault) -> RoundResult:
    return replace(result(number), faults=faults)


def fault(number: int, kind: str = "killed") -> Fault:
    return Fault(kind, "client-0 (pid 7)", "10.0.0.1", 2 if kind == "killed" else None, number, "it died")


@pytest.mark.parametrize("up_to", [0, 1])
def test_faults_of_repeated_rounds_wait_until_they_are_recorded_again(tmp_path, up_to):
    kept = [fault(1)][: 1 - up_to]
    append_round(tmp_path, with_faults(1, fault(1)))
    append_round(tmp_path, with_faults(2, fault(2), fault(2, "hung")))
    append_round(tmp_path, with_faults(3))
    for _ in range(2):  # a resume that is killed before its first round is over, and another
        keep_rounds(tmp_path, up_to=up_to)
        assert repeated_faults(tmp_path) == [*kept, fault(2), fault(2, "hung")]
    for number in range(up_to + 1, 3):
        due = [f for f in repeated_faults(tmp_path) if f.round_number == number]
        append_round(tmp_path, with_faults(number, *due), later=[f for f in repeated_faults(tmp_path) if f not in due])
    assert repeated_faults(tmp_path) == []
    told = [record for line in read_history(tmp_path) for record in line["faults"]]
    assert told == [fault_record(f) for f in (fault(1), fault(2), fault(2, "hung"))]
    assert all(record["round"] == line["round"] for line in read_history(tmp_path) for record in line["faults"])
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_a_half_written_first_line_is_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "metr')
    assert last_recorded(tmp_path) == 0
    append_round(tmp_path, result(1))
    append_round(tmp_path, result(2))
    assert [record["round"] for record in read_history(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "more", [{"faults": None}, {"faults": [5]}, {"faults": [{}]}, {"lost": 3}, {"seconds": {"train": "x"}}]
)
def test_a_round_of_wrong_types_is_one_line(tmp_path, more):
    first = {"round": 1, "metrics": {}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(first | more) + "\n" + json.dumps(first) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1: not the object of a round"):
        read_history(tmp_path)


def test_faults_are_told_once_whenever_a_resume_is_killed(tmp_path):
    append_round(tmp_path, with_faults(1))
    append_round(tmp_path, with_faults(2, fault(2)))
    before = (tmp_path / "metrics.jsonl").read_text()
    keep_rounds(tmp_path, up_to=1)
    noted = (tmp_path / "faults.json").read_text()
    (tmp_path / "metrics.jsonl").write_text(before)  # killed between the note and the cut
    keep_rounds(tmp_path, up_to=1)
    assert repeated_faults(tmp_path) == [fault(2)]
    append_round(tmp_path, with_faults(2, *repeated_faults(tmp_path)))
    (tmp_path / "faults.json").write_text(noted)  # killed between the round and the note's end
    keep_rounds(tmp_path, up_to=2)
    assert repeated_faults(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', '[{"kind": "killed"}]', "[" * 100_000])
def test_a_damaged_note_of_faults_is_one_line(tmp_path, text):
    (tmp_path / "faults.json").write_text(text)
    with pytest.raises(CheckpointError, match="delete"):
        repeated_faults(tmp_path)


def test_no_history_is_an_empty_one(tmp_path):
    assert read_history(tmp_path) == []


def test_files_are_replaced_whole(tmp_path):
    write_text(tmp_path / "x", "one")
    write_text(tmp_path / "x", "two")
    assert (tmp_path / "x").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_only_a_run_that_left_nothing_to_go_on_from_is_discarded(tmp_path):
    for left, discarded in (((), True), (("clients",), True), (("checkpoints",), False), (("clients", "notes"), False)):
        run_dir = tmp_path / "-".join(("run", *left))
        create_run_directory(run_dir, tiny_config())
        for name in left:
            (run_dir / name).mkdir()
            (run_dir / name / "file").touch()
        discard_unused(run_dir)
        assert run_dir.exists() != discarded
