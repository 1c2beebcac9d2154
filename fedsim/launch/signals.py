"""Ctrl-C and SIGTERM: once, a run ends cleanly; twice, at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []
"""Signals since `ended_by_signals` began."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends a run like Ctrl-C does: by an exception, so that everything is closed and marked KILLED.

    SIGINT raises KeyboardInterrupt, SIGTERM SystemExit with code 143. A second signal ends the process at once, with
    the same codes; in an interactive session it only raises again. Signals that are ignored stay so (`nohup`,
    background jobs of a shell). An exception that comes in the midst of a library may get lost there; `heed` finds
    that out.
    """
    if threading.current_thread() is not threading.main_thread():  # signals aren't ours
        yield
        return

    def stop(number: int, frame: object) -> None:
        _received.append(number)
        if len(_received) > 1 and not hasattr(sys, "ps1"):
            os.write(2, b"stopped at once\n")
            os._exit(128 + _received[0])
        raise _exception(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except BaseException as error:
        if not _received:
            raise
        if not isinstance(error, KeyboardInterrupt | SystemExit):
            log.warning("while stopping: %s", " ".join(f"{type(error).__name__}: {error}".split())[:500])
        raise _exception(_received[0]) from None  # Ray's waiting calls turn every exit code into 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def heed() -> None:
    """Raise a signal's exception again if something swallowed it; called wherever a run goes on to its next piece."""
    if _received:
        raise _exception(_received[0])


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def own_handlers() -> Iterator[None]:
    """Keep this process's handlers: a Ray that starts puts its own in place, which end it without a word to MLflow."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
