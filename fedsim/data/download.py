"""Fetching ESC-50, for users with a network who ask for it (`data.download: true`)."""

from __future__ import annotations

import logging
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from fedsim.data.esc import is_esc_folder
from fedsim.errors import DataError

log = logging.getLogger(__name__)
ESC50_URL = "https://github.com/karolpiczak/ESC-50/archive/refs/heads/master.zip"
WANTED = re.compile(r"[^/]+/(?P<place>meta/esc50\.csv|LICENSE|audio/[\w.-]+\.wav)")
CHUNK_BYTES = 1 << 20


def fetch_esc50(cache_dir: Path, *, url: str = ESC50_URL, progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder of ESC-50 in the cache; downloaded (about 600 MB) unless it is there. ESC-10 is part of it.

    Args:
        cache_dir: folder of the cache.
        url: of the zip archive.
        progress: called with bytes done and bytes in all.

    Raises:
        DataError: no network, a broken archive, or a cache that can't be written.
    """
    folder = cache_dir / "datasets" / "ESC-50"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not is_esc_folder(folder):
                log.info("fetching ESC-50 from %s (licence CC BY-NC 3.0: not for commercial use)", url)
                _fetch(url, folder, progress)
    except (urllib.error.URLError, zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"ESC-50 can't be fetched from {url} ({error}); fetch it by other means and set data.path to its folder"
        ) from error
    return folder


def _fetch(url: str, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Download to a partial file, unpack what is wanted to a partial folder, and rename it."""
    archive, partial = folder.with_suffix(".zip.partial"), folder.with_suffix(".partial")
    with urllib.request.urlopen(url, timeout=30) as answer, archive.open("wb") as out:
        total, done = int(answer.headers.get("Content-Length") or 0), 0
        while chunk := answer.read(CHUNK_BYTES):
            out.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, max(total, done))
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(archive) as bundle:
        # Only names of the known shape are unpacked, so an archive can't write elsewhere.
        for member in bundle.infolist():
            if found := WANTED.fullmatch(member.filename):
                place = partial / found["place"]
                place.parent.mkdir(parents=True, exist_ok=True)
                with bundle.open(member) as source, place.open("wb") as out:
                    shutil.copyfileobj(source, out)
    if not is_esc_folder(partial):
        raise DataError(f"the archive at {url} holds no meta/esc50.csv and audio/: it is not ESC-50")
    os.replace(partial, folder)
    archive.unlink()
