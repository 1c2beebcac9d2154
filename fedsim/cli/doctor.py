"""`fedsim doctor`: what this machine has, what a run would find, and what to do where something is missing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsim import __version__
from fedsim.config import Config
from fedsim.errors import DataError, FedsimError
from fedsim.machine import usable_cores, usable_memory

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
NEEDED = ("torch", "ray", "transformers", "mlflow")
LITTLE_MEMORY_GB, LITTLE_DISK_GB = 4.0, 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        state: "ok"; "note", which a run can do without; or "problem".
        text: what was found.
        advice: what to do, "" where there is nothing to do.
    """

    subject: str
    state: Literal["ok", "note", "problem"]
    text: str
    advice: str = ""


def examine(console: Console) -> int:
    """Look at everything and print a table.

    Returns:
        Exit code: 0, or 1 if something that every run needs is broken.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    found = [finding for check in CHECKS for finding in check()]
    for finding in found:
        words = finding.text + (f" → {finding.advice}" if finding.advice else "")
        table.add_row(finding.subject, Text(finding.state, STYLES[finding.state]), Text(words))
    console.print(table)
    broken = sum(finding.state == "problem" for finding in found)
    console.print(f"{broken} problem{'' if broken == 1 else 's'}" if broken else "ready to run", highlight=False)
    return 1 if broken else 0


def check_versions() -> Iterator[Finding]:
    """Python, fedsim, and the packages that a run needs."""
    versions, missing = [f"fedsim {__version__}", f"python {platform.python_version()}"], []
    for package in NEEDED:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    yield Finding("versions", "ok", ", ".join(versions))
    if missing:
        yield Finding("packages", "problem", f"not installed: {', '.join(missing)}", "pip install fedsim-a2v")
    try:
        yield Finding("search", "ok", f"optuna {metadata.version('optuna')}")
    except metadata.PackageNotFoundError:
        yield Finding("search", "note", "optuna isn't installed", "pip install 'fedsim-a2v[search]'")


def check_machine() -> Iterator[Finding]:
    """Cores, memory and GPUs, as this process may use them."""
    import psutil

    yield Finding("cores", "ok", f"{usable_cores():g}")
    memory = psutil.virtual_memory()
    total = usable_memory()
    free = min(memory.available, total) / 1e9
    little = free < LITTLE_MEMORY_GB
    yield Finding(
        "memory",
        "note" if little else "ok",
        f"{free:.1f} of {total / 1e9:.1f} GB free",
        "an actor takes about 0.3 GB: few of them, small models" if little else "",
    )
    import torch

    names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    gpus = ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in names)
    yield Finding("GPUs", "ok", gpus or "none: runs on the CPU")


def check_disk() -> Iterator[Finding]:
    """Folder of the embedding cache: writable, with room."""
    from fedsim.federation.setup import cache_dir

    folder = cache_dir(Config())
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free / 1e9
    except OSError as error:
        yield Finding(
            "cache", "problem", f"{folder} can't be written: {error.strerror}", "set XDG_CACHE_HOME or data.cache_dir"
        )
        return
    little = free < LITTLE_DISK_GB
    advice = "set data.cache_dir to a larger disk" if little else ""
    yield Finding("cache", "note" if little else "ok", f"{folder}, {free:.1f} GB free", advice)


def check_data() -> Iterator[Finding]:
    """Data sets and tables under $FEDSIM_DATA."""
    from fedsim.data import open_recordings
    from fedsim.models.encoders.text_table import DEFAULT_TABLE

    root = os.environ.get("FEDSIM_DATA")
    if not root:
        yield Finding("data", "note", "FEDSIM_DATA isn't set: synthetic sounds only", "set it to a folder of data sets")
        return
    if not Path(root).is_dir():
        yield Finding(
            "data", "problem", f"FEDSIM_DATA is {root}, which is no folder", "set it to a folder of data sets"
        )
        return
    there, away = ["synthetic"], []
    for name in ("esc10", "esc50"):
        try:
            recordings = open_recordings(name, path=None, classes=None, clips_per_class=2, seed=0)
            there.append(f"{name} ({len(recordings.label)} recordings)")
        except DataError as error:
            if "not found" in str(error):
                away.append(name)
            else:
                yield Finding("data", "problem", f"{name}: {error}", "mend or remove its folder")
    for name, file in (("yamnet", "yamnet/yamnet.npz"), ("text_minilm", DEFAULT_TABLE)):
        (there if (Path(root) / file).is_file() else away).append(name)
    missing = f"; not there: {', '.join(away)}" if away else ""
    yield Finding("data", "ok", f"{root}: {', '.join(there)}{missing}")


def check_checkpoints() -> Iterator[Finding]:
    """The default checkpoints in the Hugging Face cache."""
    from huggingface_hub import constants, try_to_load_from_cache

    from fedsim.models.encoders.ast import DEFAULT_CHECKPOINT

    text = Config().model.text_encoder
    offline = constants.HF_HUB_OFFLINE
    yield Finding("Hugging Face", "ok", f"{constants.HF_HOME}{', HF_HUB_OFFLINE is set' if offline else ''}")
    instead = {
        "AST": "model.audio_encoder.name logmel, yamnet or tiny_ast",
        "CLIP": "model.text_encoder.name seeded or table",
        "T5": "model.text_encoder.name seeded or table",
    }
    for what, checkpoint in (("AST", DEFAULT_CHECKPOINT), ("CLIP", text.clip), ("T5", text.t5)):
        if isinstance(try_to_load_from_cache(checkpoint, "config.json"), str):
            yield Finding(what, "ok", f"{checkpoint} is cached")
        elif offline:
            yield Finding(what, "note", f"{checkpoint} isn't cached", f"{instead[what]} need no download")
        else:
            yield Finding(what, "note", f"{checkpoint} isn't cached: fetched when used", f"hf download {checkpoint}")


def check_audio() -> Iterator[Finding]:
    """What libsndfile reads."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        yield Finding("audio", "problem", f"soundfile can't be loaded: {reason}", "reinstall soundfile")
        return
    mp3 = "MP3" in soundfile.available_formats()
    yield Finding(
        "audio",
        "ok" if mp3 else "note",
        f"libsndfile {soundfile.__libsndfile_version__}: wav, flac, ogg, mp3 {'yes' if mp3 else 'no'}",
        "" if mp3 else "libsndfile 1.1 and later reads mp3",
    )


def check_mlflow() -> Iterator[Finding]:
    """Where runs are recorded by default."""
    from fedsim.tracking.store import default_uri

    try:
        uri = default_uri(Path(Config().experiment.output_dir), None)
    except FedsimError as error:
        yield Finding("MLflow", "problem", str(error), "set MLFLOW_TRACKING_URI to one of them, or unset it")
        return
    given = " (MLFLOW_TRACKING_URI)" if os.environ.get("MLFLOW_TRACKING_URI") else ""
    yield Finding("MLflow", "ok", f"{uri}{given}")


def check_ray() -> Iterator[Finding]:
    """Ray as a run would start or join it."""
    from fedsim.cluster.resources import start_ray, stop_ray

    address = os.environ.get("RAY_ADDRESS")
    advice = "set RAY_ADDRESS right, or unset it" if address else "resources.client_actors=0 runs without Ray"
    started = time.monotonic()
    try:
        if address:
            _knock(address)
        if connection := start_ray(address=None, num_cpus=1, num_gpus=0):
            stop_ray(connection)
    except Exception as error:  # whatever Ray raises when it can't start is what is to be told
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        yield Finding("Ray", "problem", f"{address}: {reason}" if address else reason, advice)
        return
    how = f"joins and leaves {address}" if address else "a private one starts and stops"
    yield Finding("Ray", "ok", f"{how} in {time.monotonic() - started:.1f} s")


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_versions,
    check_machine,
    check_disk,
    check_data,
    check_checkpoints,
    check_audio,
    check_mlflow,
    check_ray,
)
"""In the order of the report."""
