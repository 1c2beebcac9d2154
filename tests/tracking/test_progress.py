from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from fedsim.tracking.progress import ProgressDisplay, round_line
from fedsim.types import RoundResult

MakeResult = Callable[..., RoundResult]
STATUS = {"round": 3, "phase": "train", "clients_done": 40, "clients_total": 100, "clients_per_second": 120.4}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "CI", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def terminal() -> Console:
    return Console(file=StringIO(), force_terminal=True, width=110)


def text_of(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def test_the_line_of_a_round(make_result: MakeResult) -> None:
    result = make_result(
        3, **{"eval/top1": 0.74, "eval/top1_averaged": 0.61, "server/refinement_kept": 1.0, "clients/per_second": 120.0}
    )
    assert round_line(result, total_rounds=10, left_s=12.2) == (
        "round 3/10  train 2.0 s  loss 0.333  top-1 61.0 % -> 74.0 % (refined)  clients/s 120  lost 2  left 0:12"
    )


def test_what_is_missing_is_left_out() -> None:
    result = RoundResult(2, 8, (), {"train/loss": float("nan"), "eval/top1": float("nan")}, {"train": 4.0}, 0, 0)
    assert round_line(result, total_rounds=3, left_s=3725) == "round 2/3  train 4.0 s  clients/s 2  left 1:02:05"
    only_top1 = RoundResult(1, 8, (), {"eval/top1": 0.5}, {}, 0, 0)
    assert round_line(only_top1, total_rounds=1, left_s=0) == "round 1/1  top-1 50.0 %  left 0:00"


def test_without_a_terminal_there_is_one_line_per_round(make_result: MakeResult) -> None:
    console = Console(file=StringIO(), width=40)
    handlers = list(logging.getLogger().handlers)
    with ProgressDisplay(2, console) as display:
        assert logging.getLogger().handlers == handlers
        display.update(STATUS)
        display.round_done(make_result(1))
        display.update({})
        display.round_done(make_result(2))
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["round 1/2", "round 2/2"]
    assert "\x1b" not in console.file.getvalue()
    assert lines[1].endswith("left 0:00")


@pytest.mark.parametrize("name", ["NO_COLOR", "CI"])
def test_nothing_moves_with_no_color_or_ci(name: str, monkeypatch: pytest.MonkeyPatch, make_result: MakeResult) -> None:
    monkeypatch.setenv(name, "1")
    console = terminal()
    with ProgressDisplay(5, console) as display:
        display.update(STATUS)
        display.round_done(make_result(1))
    assert text_of(console).count("\n") == 1
    assert "\x1b[2K" not in console.file.getvalue()


def test_the_live_display_shows_round_phase_speed_accuracy_and_time(make_result: MakeResult) -> None:
    console = terminal()
    with ProgressDisplay(10, console) as display:
        display.round_done(
            make_result(2, **{"eval/top1": 0.74, "eval/top1_averaged": 0.61, "server/refinement_kept": 1.0})
        )
        display.update(STATUS)
        display._progress.refresh()
        shown = text_of(console)
        display.update({"round": 3, "phase": "evaluate", "clients_done": None})
        display._progress.refresh()
    assert "round 2/10" in shown
    assert re.search(r"rounds .* 2/10 .*top-1 61\.0 % -> 74\.0 % \(refined\)  left 0:0\d", shown)
    assert re.search(r"train .* 40/100 clients 120 clients/s", shown)
    assert re.search(r"evaluate [━ ]+\n", text_of(console)[len(shown) :].replace("\r", "\n"))
    assert "0/" not in text_of(console)[len(shown) :].rpartition("evaluate")[2]
    assert not display._progress.live.is_started


def test_log_records_and_prints_go_above_the_live_part(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal()
    root, log = logging.getLogger(), logging.getLogger("fedsim.test_progress")
    to_terminal = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(root, "handlers", [to_terminal])
    with ProgressDisplay(10, console):
        assert to_terminal not in root.handlers
        log.warning("client 7 was [lost]")
        print("printed by a library")
    assert root.handlers == [to_terminal]
    assert "WARNING  client 7 was [lost]" in text_of(console)
    assert "printed by a library" in text_of(console)


def test_an_error_inside_still_restores_the_terminal() -> None:
    console, handlers = terminal(), list(logging.getLogger().handlers)
    with pytest.raises(KeyboardInterrupt), ProgressDisplay(10, console) as display:
        raise KeyboardInterrupt
    assert not display._progress.live.is_started
    assert logging.getLogger().handlers == handlers
