"""The folder of a private Ray: locked by who started it, and removed by the next start where that process is dead."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX, OWNER = "fs-", "owner"
GONE_OR_TAKEN = (errno.ENOENT, errno.EWOULDBLOCK, errno.EACCES)


@dataclass(frozen=True)
class RayFolder:
    """A folder and the descriptor that holds its lock, which the system frees when this process dies, however it dies.

    Attributes:
        path: the folder; short, since socket paths have a limit of 107 characters.
        lock: descriptor of the file `owner` in it; None where files can't be locked, then nobody else removes it.
    """

    path: Path
    lock: int | None

    def remove(self) -> None:
        """Delete it, after Ray has ended."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.lock is not None:
            os.close(self.lock)


def make_ray_folder() -> RayFolder:
    """A new folder of this process; Ray's own default would be shared with other users."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_parent()))
    partial = path / f".{OWNER}.partial"
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks
        os.close(descriptor)
        return RayFolder(path, None)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    # It has its name only once it is locked: nobody ever sees it free while this process lives.
    os.replace(partial, path / OWNER)
    return RayFolder(path, descriptor)


def remove_dead_folders(parent: Path | None = None) -> list[Path]:
    """Delete the folders of this user's processes that were killed; returns them.

    One without a lock file, with a lock that is held or of another user stays, and so do links.

    Args:
        parent: where to look (default: where `make_ray_folder` makes them).
    """
    removed = []
    for path in sorted((parent or _parent()).glob(f"{PREFIX}*")):
        try:
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            descriptor = os.open(path / OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _removed(path):
                removed.append(path)
        except OSError as error:
            if error.errno not in GONE_OR_TAKEN:
                log.warning("can't remove %s, which a run that was killed has left: %s", path, error.strerror or error)
        finally:
            os.close(descriptor)
    if removed:
        log.info("removed what runs that were killed have left: %s", ", ".join(map(str, removed)))
    return removed


def _removed(path: Path) -> bool:
    """Delete a folder; the file that shows whose it was goes last, so that a deletion that breaks off is repeated."""
    for entry in path.iterdir():
        if entry.name != OWNER:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                with suppress(FileNotFoundError):
                    entry.unlink()
    if [entry.name for entry in path.iterdir()] != [OWNER]:
        return False  # Ray's processes are about to end, and still write
    (path / OWNER).unlink()
    path.rmdir()
    return True


def _parent() -> Path:
    return Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
