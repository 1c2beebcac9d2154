"""The thread that delivers a run's record: whenever there is news, again and again while the store is away.

A run only tells it that there is news, so that neither a slow store nor an absent one costs a round any time, and
nothing waits in memory: what is to be delivered lies in the run directory.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from threading import Event, Thread

from fedsim.tracking.calls import one_line
from fedsim.tracking.delivery import Delivery

log = logging.getLogger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 10.0
"""Seconds after the first failed attempt, doubled with every further one up to the longest."""
MOST_FACTOR = 10
"""A store that takes something now and then is waited for at the end this many times as long as one that is away."""


class Courier:
    """Delivers in a thread, from `start` to `finish`; at most once each.

    Args:
        run_dir: a run directory with notes for MLflow.
    """

    def __init__(self, run_dir: Path) -> None:
        self._delivery = Delivery(run_dir)
        self._news, self._hurry = Event(), Event()
        self._ending, self._delivered, self._stop = Event(), Event(), Event()
        self._failing = False
        # A daemon: a call that hangs must not keep the process from ending.
        self._thread = Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Begin: load MLflow and make the run."""
        self._news.set()
        self._thread.start()

    def news(self) -> None:
        """There is more to deliver; returns at once."""
        self._news.set()

    def finish(self, *, wait_s: float) -> list[str]:
        """Wait until everything is delivered, but no longer than `wait_s` in which the store takes nothing.

        Returns:
            What the store lacks, in words; empty when it holds everything.
        """
        self._ending.set()
        self._hurry.set()
        self._news.set()
        begun = since = time.monotonic()
        seen = self._delivery.progress
        try:
            while not self._delivered.wait(0.1) and self._thread.is_alive():
                now = time.monotonic()
                if self._delivery.progress != seen:
                    seen, since = self._delivery.progress, now
                if now - since > wait_s or now - begun > MOST_FACTOR * wait_s:
                    break
        finally:
            self._stop.set()
            self._hurry.set()
            self._news.set()
        if self._delivered.is_set():
            self._thread.join()
            return []
        return self._delivery.missing()

    def _work(self) -> None:
        pause = FIRST_RETRY_S
        while not self._stop.is_set():
            self._news.wait()
            self._news.clear()
            ending = self._ending.is_set()
            try:
                self._delivery.advance()
            except Exception as error:  # MLflow passes on errors of SQLAlchemy, requests and the artifact store
                self._tell(error)
                self._news.set()
                if self._ending.is_set():
                    self._stop.wait(FIRST_RETRY_S)
                else:
                    self._hurry.wait(pause)
                    pause = min(2 * pause, LONGEST_RETRY_S)
                continue
            pause = FIRST_RETRY_S
            if self._failing:
                log.info("the MLflow store %s answers again: everything so far is delivered", self._delivery.uri)
                self._failing = False
            if ending:
                self._delivered.set()
                return

    def _tell(self, error: Exception) -> None:
        """One warning for every time the store goes away."""
        log.log(
            logging.DEBUG if self._failing else logging.WARNING,
            "the MLflow store %s took nothing: %s; the run goes on, its values are in metrics.jsonl and are "
            "delivered when the store answers",
            self._delivery.uri,
            one_line(error),
        )
        self._failing = True
