"""Seconds by phase, and the status that a progress display shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Status = Callable[[Mapping[str, Any]], None]


class RoundClock:
    """Times the phases of one round and tells `status` what goes on.

    Args:
        round_number: from 1.
        status: called with "round", "phase", and while clients train "clients_done", "clients_total" and
            "clients_per_second".
    """

    def __init__(self, round_number: int, status: Status) -> None:
        self.round_number = round_number
        self.seconds: dict[str, float] = {}
        self._status = status
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time one phase."""
        self._status({"round": self.round_number, "phase": phase})
        self._start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - self._start

    def clients(self, done: int, total: int) -> None:
        """Tell how many clients are done in the phase that runs."""
        rate = done / max(time.perf_counter() - self._start, 1e-9)
        counts = {"clients_done": done, "clients_total": total, "clients_per_second": rate}
        self._status({"round": self.round_number, "phase": "train", **counts})
