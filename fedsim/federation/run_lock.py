"""One process per run directory: a lock that the system frees when its holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsim.errors import ConfigError
from fedsim.federation.run_directory import LOCK, require_unused

log = logging.getLogger(__name__)
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def locked(run_dir: Path, *, new: bool = False) -> Iterator[None]:
    """Hold a run directory; the file that says so goes with the context.

    A file that is left of a dead process is taken over, and that is said.

    Args:
        run_dir: the run directory.
        new: it is to be made; one that holds other files is refused before anything is written into it.

    Raises:
        ConfigError: another process holds it, or nothing can be written there.
    """
    file = run_dir / LOCK
    try:
        if new and not file.exists():
            require_unused(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(file, run_dir)
    except OSError as error:
        raise ConfigError(f"can't write the run directory {run_dir}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone, or read-only by now
            file.unlink()
        os.close(descriptor)


def _acquire(file: Path, run_dir: Path) -> int:
    """Open and lock the file, and write this process into it; returns its descriptor."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, run_dir)
            # Its last holder may have deleted it between the two calls: then the name is free for somebody else.
            if file.exists() and os.fstat(descriptor).st_ino == file.stat().st_ino:
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    if before := _holder(descriptor):
        log.warning("%s was left locked by %s, which is gone: taken over", run_dir, before)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return descriptor


def _lock(descriptor: int, run_dir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            raise ConfigError(
                f"{run_dir} is in use by {_holder(descriptor) or 'another process'}: wait until it ends, or choose "
                "another run directory"
            ) from None
        log.warning("%s can't be locked (%s): see to it that no second run writes there", run_dir, error.strerror)


def _holder(descriptor: int) -> str:
    """Who is written in a lock file; empty where nobody is."""
    try:
        written = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(written['pid'])} on {str(written['host'])[:100]}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
