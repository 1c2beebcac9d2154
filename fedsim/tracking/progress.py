"""What `fedsim run` shows while it works: a live display on a terminal, one plain line per round elsewhere."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn

from fedsim.types import RoundResult


class ProgressDisplay:
    """Live display of rounds, phase, clients per second, accuracy before and after refinement, and time left.

    A context manager. Without a terminal, or with `NO_COLOR` or `CI` in the environment, nothing moves: every round
    is one plain line. Log records printed to the terminal appear above the live part while it is open.

    Args:
        total_rounds: rounds of the whole run.
        console: where to write (default: standard error, so that standard output stays free for results).
    """

    def __init__(self, total_rounds: int, console: Console | None = None) -> None:
        self.total_rounds = total_rounds
        self.console = console or Console(stderr=True)
        plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self.live = not (plain or os.environ.get("NO_COLOR") or os.environ.get("CI"))
        self._progress = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            refresh_per_second=5,
            transient=True,
            disable=not self.live,
        )
        self._rounds = self._progress.add_task("rounds", total=total_rounds, count="", detail="")
        self._clients = self._progress.add_task("starting", total=None, visible=False, count="", detail="")
        self._handlers: tuple[list[logging.Handler], list[logging.Handler]] = ([], [])
        self._started = time.monotonic()
        self._finished = 0

    def __enter__(self) -> ProgressDisplay:
        self._started = time.monotonic()
        if self.live:
            self._redirect_logging()
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._progress.stop()
            self._restore_logging()

    def update(self, status: Mapping[str, Any]) -> None:
        """Show where the current round is.

        Args:
            status: `round`, `phase`, `clients_done`, `clients_total`, `clients_per_second`; any of them may be missing
                or None.
        """
        done, total, rate = (status.get(name) for name in ("clients_done", "clients_total", "clients_per_second"))
        if status.get("round"):
            self._show_rounds(status["round"] - 1)
        self._progress.update(
            self._clients,
            description=str(status.get("phase") or "waiting").ljust(8),
            completed=done or 0,
            total=total or 1,
            visible=True,
            count=f"{done or 0}/{total} clients" if total else "",
            detail=f"{rate:.3g} clients/s" if rate and math.isfinite(rate) else "",
        )

    def round_done(self, result: RoundResult) -> None:
        """Print the line of a finished round and move the live part on."""
        self._finished += 1
        left_s = (time.monotonic() - self._started) / self._finished * max(self.total_rounds - result.round_number, 0)
        detail = [part for part in (_accuracy(result), f"left {_clock(left_s)}") if part]
        self._show_rounds(result.round_number)
        self._progress.update(self._rounds, detail="  ".join(detail))
        self.console.print(
            round_line(result, total_rounds=self.total_rounds, left_s=left_s),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def _show_rounds(self, done: int) -> None:
        self._progress.update(self._rounds, completed=done, count=f"{done}/{self.total_rounds}")

    def _redirect_logging(self) -> None:
        """Handlers that write to the terminal would tear the live part; one of rich's takes their place."""
        root = logging.getLogger()
        removed: list[logging.Handler] = [
            handler
            for handler in root.handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.stdout)
        ]
        for handler in removed:
            root.removeHandler(handler)
        if not removed:
            return  # prints, and Python's handler of last resort, already go above the live part
        added = RichHandler(console=self.console, show_path=False, markup=False)
        added.setLevel(min(handler.level for handler in removed))
        root.addHandler(added)
        self._handlers = (removed, [added])

    def _restore_logging(self) -> None:
        removed, added = self._handlers
        for handler in added:
            logging.getLogger().removeHandler(handler)
        for handler in removed:
            logging.getLogger().addHandler(handler)
        self._handlers = ([], [])


def round_line(result: RoundResult, *, total_rounds: int, left_s: float) -> str:
    """One round in one line, e.g. `round 3/10  train 1.2 s  loss 0.53  top-1 61.0 % -> 74.0 % (refined) ...`.

    Parts whose number is missing or not finite (accuracy in a round without evaluation) are left out.
    """
    parts = [f"round {result.round_number}/{total_rounds}"]
    train_s, loss = result.seconds.get("train"), result.metrics.get("train/loss")
    if train_s is not None:
        parts.append(f"train {train_s:.1f} s")
    if loss is not None and math.isfinite(loss):
        parts.append(f"loss {loss:.3g}")
    if accuracy := _accuracy(result):
        parts.append(accuracy)
    rate = result.metrics.get("clients/per_second")
    if rate is None and train_s:
        rate = (result.cohort_size - len(result.lost)) / train_s
    if rate is not None and math.isfinite(rate):
        parts.append(f"clients/s {rate:.3g}")
    if result.lost:
        parts.append(f"lost {len(result.lost)}")
    return "  ".join([*parts, f"left {_clock(left_s)}"])


def _accuracy(result: RoundResult) -> str:
    after, before = (result.metrics.get(name, math.nan) for name in ("eval/top1", "eval/top1_averaged"))
    if not math.isfinite(after):
        return ""
    if not math.isfinite(before) or "server/refinement_kept" not in result.metrics:
        return f"top-1 {100 * after:.1f} %"
    return f"top-1 {100 * before:.1f} % -> {100 * after:.1f} % (refined)"


def _clock(seconds: float) -> str:
    """0:12, 3:05 or 1:02:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
