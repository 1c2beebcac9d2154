"""The record, its files and what is shown, without Ray; a namespace stands for Tune's trial."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from fedsim.config import Config
from fedsim.search.display import SearchDisplay
from fedsim.search.records import SearchRecord, TrialEnd, TrialRecord, write_end
from fedsim.search.trial import METRICS, ROUND
from fedsim.search.tune import trial_bundles
from fedsim.search.watch import Watch

Make = Callable[..., Config]


def record_of(trial: str, status: str, value: float | None, rounds: int = 3) -> TrialRecord:
    metrics = {} if value is None else {"m": value}
    return TrialRecord(trial, {"training.learning_rate": 0.1}, status, rounds, metrics, f"/x/{trial}")  # type: ignore[arg-type]


def test_the_best_is_the_best_that_ran_all_rounds() -> None:
    record = SearchRecord("m", "max")
    for trial in (
        record_of("a", "finished", 0.4),
        record_of("b", "finished", 0.6),
        record_of("c", "stopped early", 0.9, rounds=1),
        record_of("d", "failed", None),
    ):
        record = record.put(trial)
    assert record.best() == record.trials["b"]
    assert SearchRecord("m", "min", record.trials).best() == record.trials["a"]
    assert [trial.trial for trial in record.failed()] == ["d"]
    assert SearchRecord("m", "max", {"c": record.trials["c"]}).best() == record.trials["c"]
    assert SearchRecord("m", "max", {"d": record.trials["d"]}).best() is None


def test_the_watch_keeps_the_record_and_gives_up_on_what_fails_all_trials(make_config: Make, tmp_path: Path) -> None:
    config = make_config(space={"feda2v.generator_type": {"choices": ["replay", "vae"]}}, metric="m", num_trials=4)
    screen = io.StringIO()
    console = Console(file=screen, width=300)
    (tmp_path / "trials").mkdir()
    with SearchDisplay(4, total_rounds=3, console=console) as display:
        watch = Watch(config, tmp_path, display)
        for number, name in enumerate(("good", "poor", "bad", "dead")):
            trial = SimpleNamespace(trial_id=name, config={"feda2v.generator_type": number % 2}, local_path=tmp_path)
            watch.on_trial_start(0, [], trial)
            if name in ("good", "poor"):
                watch.on_trial_result(0, [], trial, {ROUND: 3 if name == "good" else 1, METRICS: {"m": 0.25}})
                watch.on_trial_complete(0, [], trial)
                write_end(tmp_path / "trials" / name, TrialEnd("finished" if name == "good" else "stopped early"))
                continue
            assert not watch.stop_all()
            if name == "bad":
                write_end(tmp_path / "trials/bad", TrialEnd("failed", "no such thing"))
            watch.on_trial_error(0, [], trial)
        watch.on_step_end(0, [])  # returns at once: every end is written
        assert not watch.stop_all()
        write_end(tmp_path / "trials/fatal", TrialEnd("failed", "no metric", stop_search=True))
        watch.on_trial_error(
            0, [], SimpleNamespace(trial_id="fatal", config={"feda2v.generator_type": 0}, local_path=tmp_path)
        )
    assert watch.stop_all()
    assert watch.stop_reason == "no metric"
    assert screen.getvalue().splitlines()[:4] == [
        "trial 1/4  good  finished after 3 rounds  m 0.25  feda2v.generator_type replay",
        "trial 2/4  poor  stopped early after 1 round  m 0.25  feda2v.generator_type vae",
        "trial 3/4  bad  failed after 0 rounds  feda2v.generator_type replay  no such thing",
        f"trial 4/4  dead  failed after 0 rounds  feda2v.generator_type vae  its process died; Ray's words are in "
        f"{tmp_path}/error.txt",
    ]
    written = json.loads((tmp_path / "search.json").read_text())
    assert [trial["status"] for trial in written["trials"]] == [
        "finished",
        "stopped early",
        "failed",
        "failed",
        "failed",
    ]
    assert written["best"]["trial"] == "good"


def test_trials_without_an_end_were_interrupted(make_config: Make, tmp_path: Path) -> None:
    config = make_config(space={"training.learning_rate": {"choices": [0.1, 0.2]}})
    watch = Watch(config, tmp_path, SearchDisplay(1, total_rounds=3, console=Console(quiet=True)))
    watch.on_trial_start(0, [], SimpleNamespace(trial_id="a", config={"training.learning_rate": 0}))
    assert [trial.status for trial in watch.settle().trials.values()] == ["interrupted"]


def test_a_terminal_shows_a_live_table(make_config: Make, tmp_path: Path, monkeypatch) -> None:
    for name in ("NO_COLOR", "CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with SearchDisplay(4, total_rounds=3, console=console) as display:
        assert display.live
        display.show(SearchRecord("eval/top1", "max").put(record_of("abcd1234", "running", None, rounds=2)))
    for part in ("abcd1234", "training.learning_rate 0.1", "2/3", "eval/top1", "running"):
        assert part in screen.getvalue()


def test_a_placement_group_holds_server_and_clients(make_config: Make) -> None:
    space = {"training.learning_rate": {"choices": [0.1, 0.2]}}

    def bundles(**resources: float) -> list[dict[str, float]]:
        overrides = [f"resources.{name}={value}" for name, value in resources.items()]
        return trial_bundles(make_config(*overrides, space=space))

    client = {"CPU": 1.0, "GPU": 0.25}
    assert bundles(client_actors=2, server_gpus=1, client_gpus=0.25) == [{}, {"CPU": 0.0, "GPU": 1.0}, client, client]
    assert bundles(client_actors=2) == [{}, {"CPU": 1.0, "GPU": 0.0}, {"CPU": 1.0, "GPU": 0.0}]
    assert bundles(client_actors=0, client_gpus=0.5) == [{"CPU": 1.0, "GPU": 0.5}]
    assert bundles(client_actors=1, client_cpus=0) == [{"CPU": 0.001}]
