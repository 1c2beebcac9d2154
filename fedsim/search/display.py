"""What `fedsim search` shows: a live table of trials on a terminal, one plain line per ended trial elsewhere."""

from __future__ import annotations

import os
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedsim.search.records import SearchRecord, TrialRecord
from fedsim.search.space import shown

MAX_ROWS = 20


class SearchDisplay:
    """Shows a search; a context manager. With `NO_COLOR` or `CI` in the environment nothing moves.

    Args:
        num_trials: trials of the whole search.
        total_rounds: rounds of a trial that isn't stopped.
        console: where to write.
    """

    def __init__(self, num_trials: int, *, total_rounds: int, console: Console) -> None:
        self._num_trials, self._total_rounds, self._console = num_trials, total_rounds, console
        plain = not console.is_terminal or console.is_dumb_terminal
        self.live = not (plain or os.environ.get("NO_COLOR") or os.environ.get("CI"))
        self._live = Live(console=console, refresh_per_second=2, transient=True, auto_refresh=False)
        self._ended = 0

    def __enter__(self) -> SearchDisplay:
        if self.live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._live.stop()

    def show(self, record: SearchRecord) -> None:
        """Draw the table anew."""
        if self.live:
            self._live.update(trial_table(record, total_rounds=self._total_rounds), refresh=True)

    def ended(self, trial: TrialRecord, metric: str) -> None:
        """Print the line of a trial that ended (on a terminal above the table)."""
        self._ended += 1
        line = f"trial {self._ended}/{self._num_trials}  {trial_line(trial, metric)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def trial_line(trial: TrialRecord, metric: str) -> str:
    """One trial in one line: id, state, rounds, metric, parameters, reason."""
    parts = [trial.trial, f"{trial.status} after {trial.rounds} round{'' if trial.rounds == 1 else 's'}"]
    if metric in trial.metrics:
        parts.append(f"{metric} {trial.metrics[metric]:.4g}")
    parts.append(shown(trial.parameters))
    if trial.reason:
        parts.append(trial.reason)
    return "  ".join(parts)


def trial_table(record: SearchRecord, *, total_rounds: int) -> Table:
    """The newest trials; the best so far is bold."""
    table = Table(*("trial", "parameters", "rounds", record.metric, "state"), title="search", title_justify="left")
    best = record.best()
    trials = list(record.trials.values())
    for trial in trials[-MAX_ROWS:]:
        value = trial.metrics.get(record.metric)
        table.add_row(
            trial.trial,
            shown(trial.parameters),
            f"{trial.rounds}/{total_rounds}",
            "" if value is None else f"{value:.4g}",
            trial.status,
            style="bold" if best is not None and trial.trial == best.trial else None,
        )
    if len(trials) > MAX_ROWS:
        table.caption = f"and {len(trials) - MAX_ROWS} earlier"
    return table
