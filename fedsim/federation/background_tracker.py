"""A tracker whose store is opened and written by one thread of its own, so that rounds don't wait for it."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from fedsim.errors import FedsimError
from fedsim.federation.tracker import FinalReport, Tracker
from fedsim.types import RoundResult

log = logging.getLogger(__name__)

MOST_WAITING = 100
"""Records that may wait; with more, rounds wait for the store."""
SWITCH_S = 0.0005
"""Importing MLflow is Python alone: with the usual 5 ms it would hold up every small operation of the training."""


class BackgroundTracker:
    """Hands everything on in order (a `Tracker`); what goes wrong there is raised by a later call, or by `finish`.

    Args:
        open_tracker: makes the tracker that records, at once, in the thread.
    """

    def __init__(self, open_tracker: Callable[[], Tracker]) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracker")
        self._opening = self._thread.submit(_opened, open_tracker)
        self._waiting: deque[Future[None]] = deque()

    def opened(self) -> Tracker:
        """The tracker that records; waits for it.

        Raises:
            ConfigError: the store can't be used.
        """
        return self._opening.result()

    def address(self) -> tuple[str, str] | None:
        """See `Tracker.address`; waits until all is recorded that was handed on.

        It goes into a checkpoint, and a resume after a crash doesn't record the rounds before its checkpoint again.
        """
        self._settle(most=0)
        return self.opened().address()

    def log_round(self, result: RoundResult) -> None:
        """See `Tracker.log_round`."""
        self._later(lambda: self.opened().log_round(result))

    def log_report(self, report: FinalReport) -> None:
        """See `Tracker.log_report`."""
        self._later(lambda: self.opened().log_report(report))

    def finish(self, status: str, summary: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """See `Tracker.finish`; waits until all is recorded."""
        try:
            self._later(lambda: self.opened().finish(status, summary, tags))
            self._settle(most=0)
        except FedsimError as error:
            if status == "FINISHED":
                raise
            log.warning("the run isn't recorded as %s: %s", status, error)  # the run ends with an error of its own

    def _later(self, action: Callable[[], None]) -> None:
        self._settle(most=MOST_WAITING)
        self._waiting.append(self._thread.submit(action))

    def _settle(self, *, most: int) -> None:
        """Take what is done off the queue, raising its error, and wait until `most` are left."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self._waiting.popleft().result()


def _opened(open_tracker: Callable[[], Tracker]) -> Tracker:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        return open_tracker()
    finally:
        sys.setswitchinterval(before)
