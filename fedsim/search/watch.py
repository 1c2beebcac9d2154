"""What the driver learns while Tune runs: keeps the record, search.json and the display up to date."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from fedsim.config import Config
from fedsim.search.display import SearchDisplay
from fedsim.search.records import SearchRecord, TrialEnd, TrialRecord, read_end, unended, write_search
from fedsim.search.space import parameters
from fedsim.search.trial import METRICS, ROUND

END_WAIT_S = 300.0
"""How long trials that were stopped may take to write their results after the last one ended."""


class Watch(tune.Callback, tune.Stopper):  # type: ignore[misc]  # ray is not followed by the type checker
    """Tune's callbacks.

    Args:
        config: the configuration that is searched.
        search_dir: folder of the search.
        display: shows the trials.

    Attributes:
        record: the trials so far.
        stop_reason: why the whole search was given up, or "".
    """

    def __init__(self, config: Config, search_dir: Path, display: SearchDisplay) -> None:
        search = config.search
        self.record = SearchRecord(search.metric, search.mode)
        self.stop_reason = ""
        self._search, self._search_dir, self._display = search, search_dir, display
        self._total_rounds = config.federation.global_rounds

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks for a restart, which a search doesn't offer; a display can't be saved

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether to stop one trial: the scheduler decides that."""
        return False

    def stop_all(self) -> bool:
        """Whether to give up the search."""
        return bool(self.stop_reason)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A new row."""
        self._put(self._known(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """The numbers of a round."""
        known = self._known(trial)
        self._put(replace(known, rounds=int(result[ROUND]), metrics=dict(result[METRICS])))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial ran all its rounds or was stopped."""
        known = self._known(trial)
        self._end(known, TrialEnd("finished" if known.rounds >= self._total_rounds else "stopped early"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial failed; its process said why, unless it died."""
        known = self._known(trial)
        died = TrialEnd("failed", f"its process died; Ray's words are in {trial.local_path}/error.txt")
        end = read_end(Path(known.run_dir)) or died
        if end.stop_search:
            self.stop_reason = end.reason
        self._end(known, end)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Hold Tune up after the last trial: it would end processes that still write their results after 10 s."""
        ended = [known for known in self.record.trials.values() if known.status != "running"]
        if len(ended) < (len(trials) if self.stop_reason else self._search.num_trials):
            return
        until = time.monotonic() + END_WAIT_S
        while unended(known for known in ended if known.status == "stopped early") and time.monotonic() < until:
            time.sleep(0.1)

    def settle(self) -> SearchRecord:
        """The record after Tune: as trials wrote it themselves, and "interrupted" where they couldn't."""
        for known in self.record.trials.values():
            end = read_end(Path(known.run_dir))
            if end is not None:
                self.record = self.record.put(replace(known, status=end.status, reason=end.reason))
            elif known.status in ("running", "stopped early"):
                self.record = self.record.put(replace(known, status="interrupted"))
        write_search(self._search_dir / "search.json", self.record)
        return self.record

    def _known(self, trial: Any) -> TrialRecord:
        """The trial's record so far; Tune reports a process that can't be started without a start."""
        if trial.trial_id in self.record.trials:
            return self.record.trials[trial.trial_id]
        run_dir = self._search_dir / "trials" / trial.trial_id
        sampled = parameters(self._search.space, trial.config)
        return TrialRecord(trial.trial_id, sampled, "running", 0, {}, str(run_dir))

    def _end(self, known: TrialRecord, end: TrialEnd) -> None:
        ended = replace(known, status=end.status, reason=end.reason)
        self._put(ended)
        self._display.ended(ended, self._search.metric)
        write_search(self._search_dir / "search.json", self.record)

    def _put(self, trial: TrialRecord) -> None:
        self.record = self.record.put(trial)
        self._display.show(self.record)
