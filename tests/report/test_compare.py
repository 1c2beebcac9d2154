from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from fedsim.errors import CheckpointError, DataError
from fedsim.report.compare import compare_runs, render, to_rows, write_csv


def write_run(path: Path, *, learning_rate: float = 0.1, top1: float | None = 0.5, extra: str | None = None) -> Path:
    path.mkdir(parents=True)
    config = {"experiment": {"seed": 1}, "training": {"learning_rate": learning_rate}, "nodes": {}}
    if extra:
        config["of_an_older_version"] = {extra: True}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {"eval/top1": top1} | ({"eval/nmse_clip": 0.25} if extra else {})
    result = {"metrics": metrics, "rounds": 2, "digest": "d" * 64, "versions": {"torch": "2"}, "mlflow_run_id": "m1"}
    (path / "result.json").write_text(json.dumps(result))
    lines = [{"round": number, "metrics": {}, "seconds": {"train": 1.5, "refine": 0.5}} for number in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def text_of(paths: list[Path]) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(render(compare_runs(paths)))
    return console.file.getvalue()


def test_metrics_and_differing_keys_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=0.2, top1=0.75, extra="old_key")]
    comparison = compare_runs(runs)
    assert comparison.metrics == ("eval/nmse_clip", "eval/top1")
    assert comparison.differing == ("of_an_older_version.old_key", "training.learning_rate")
    a, b = comparison.runs
    assert (a.name, a.rounds, a.seconds, a.mlflow_run_id) == ("a", 2, 4.0, "m1")
    assert b.metrics == {"eval/top1": 0.75, "eval/nmse_clip": 0.25}


def test_the_tables_hold_every_number(tmp_path: Path) -> None:
    text = text_of(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=0.2, top1=None, extra="old_key")]
    )
    rows = {cells[0]: cells[1:] for line in text.splitlines() if (cells := [c.strip() for c in line.split("│")[1:-1]])}
    assert rows["eval/top1"] == ["0.5", "-"]
    assert rows["eval/nmse_clip"] == ["-", "0.25"]
    assert rows["rounds"] == ["2", "2"]
    assert rows["digest"] == ["d" * 12, "d" * 12]
    assert rows["training.learning_rate"] == ["0.1", "0.2"]
    assert rows["of_an_older_version.old_key"] == ["-", "true"]
    assert "experiment.seed" not in rows


def test_equal_configurations_need_no_second_table(tmp_path: Path) -> None:
    assert len(render(compare_runs([write_run(tmp_path / "a")])).renderables) == 1


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")]
    assert [run.name for run in compare_runs(runs).runs] == [str(path) for path in runs]


def test_rows_go_to_csv(tmp_path: Path) -> None:
    comparison = compare_runs([write_run(tmp_path / "a", extra="old"), write_run(tmp_path / "b", learning_rate=0.2)])
    write_csv(comparison, tmp_path / "out" / "t.csv")
    with (tmp_path / "out" / "t.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [(row["run"], row["eval/nmse_clip"], row["config.training.learning_rate"]) for row in read] == [
        ("a", "0.25", "0.1"),
        ("b", "", "0.2"),
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["t.csv"]
    assert json.loads(json.dumps(to_rows(comparison)))[0]["config.of_an_older_version.old"] is True
    with pytest.raises(DataError, match=r"can't write .*--csv"):
        write_csv(comparison, tmp_path / "a" / "config.yaml" / "t.csv")


def test_a_run_without_metrics_jsonl_is_still_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").unlink()
    assert compare_runs([run]).runs[0].seconds is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("result.json", None, r"result\.json is missing.*fedsim resume"),
        ("config.yaml", None, r"config\.yaml is missing"),
        ("result.json", "{", r"result\.json is damaged"),
        ("result.json", "[]", "expected a mapping, got list"),
        ("result.json", '{"metrics": {}}', "no 'rounds'"),
        ("result.json", '{"metrics": {"a": "b"}, "rounds": 1, "digest": ""}', "could not convert"),
        ("config.yaml", "a: [", r"config\.yaml is damaged"),
        ("metrics.jsonl", "{}\n{", r"metrics\.jsonl is damaged"),
        ("result.json", b"\xff\xfe", r"result\.json is damaged"),
    ],
)
def test_a_missing_or_damaged_file_is_one_line(
    tmp_path: Path, name: str, content: str | bytes | None, says: str
) -> None:
    run = write_run(tmp_path / "a")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=says) as caught:
        compare_runs([run])
    assert "\n" not in str(caught.value)


def test_no_run_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        compare_runs([])
    with pytest.raises(CheckpointError, match="is not a folder"):
        compare_runs([tmp_path / "nowhere"])
