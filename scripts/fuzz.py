"""Fuzzes a reader: guided by coverage where atheris is installed (pip install atheris), by seeded mutations elsewhere.

    python scripts/fuzz.py config --runs 100000
    python scripts/fuzz.py audio --seed 7 --runs 5000 --plain

Every input ends in an answer or in a FedsimError of one line; anything else stops the run, with the input in a file.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

try:
    import atheris
except ImportError:
    atheris = None

# Instrumented code is slow, so only what decides is, and only where it serves.
GUIDED = atheris is not None and "--plain" not in sys.argv
with atheris.instrument_imports(include=["fedsim", "yaml"]) if GUIDED else nullcontext():
    import numpy as np
    import scipy.signal  # noqa: F401 - so that its import is nobody's hang
    import soundfile
    import torch
    from configurations import TEXTS
    from hostile import ends_well, mutated
    from safetensors.torch import save

    from fedsim.config import load_config, quickstart_path
    from fedsim.data import open_recordings, read_audio
    from fedsim.errors import CheckpointError
    from fedsim.models.guarded_files import check_seal, read_json, read_tensors, sealed

Reader = tuple[Callable[[], Any], Path, list[bytes]]
"""What reads, the file that it reads, and good contents to begin with."""


def config(folder: Path) -> Reader:
    """Configurations: YAML and JSON."""
    file = folder / "x.yaml"
    return (
        lambda: load_config(file),
        file,
        [quickstart_path().read_bytes(), *(text.encode(errors="replace")[:4000] for text in TEXTS)],
    )


def manifest(folder: Path) -> Reader:
    """Manifests: CSV."""
    file = folder / "manifest.csv"
    for name in "abcd":
        (folder / f"{name}.wav").touch()
    rows = "path,label,split,group\na.wav,x,train,1\nb.wav,y,train,2\nc.wav,x,test,3\nd.wav,y,test,4\n"
    read = lambda: open_recordings("csv", path=str(file), classes=None, clips_per_class=2, seed=0)  # noqa: E731
    return (
        read,
        file,
        [rows.encode(), rows.replace(",", ";").encode(), ("\ufeff" + rows).encode(), rows.encode("utf-16")],
    )


def checkpoint(folder: Path) -> Reader:
    """The sealed JSON and the safetensors of checkpoints and adapters."""
    file = folder / "x"

    def read() -> Any:
        try:
            if file.read_bytes()[:1] == b"{":
                document = read_json(file)
                return check_seal(document)
            return read_tensors(file)
        except (OSError, ValueError) as error:
            raise CheckpointError(" ".join(str(error).split())) from error

    tensors = {"clip.a": torch.zeros(2, 3), "clip.b": torch.ones(4, dtype=torch.int64)}
    return read, file, [save(tensors), save({}), json.dumps(sealed({"round": 1, "sha256": {"a": "0" * 64}})).encode()]


def audio(folder: Path) -> Reader:
    """Recordings."""
    file, good = folder / "x", []
    for kind in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "W64", "AU", "CAF"):
        soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, (500, 2)), 16_000, format=kind)
        good.append(file.read_bytes())
    return lambda: read_audio(file, 16_000), file, good


READERS: dict[str, Callable[[Path], Reader]] = {
    "config": config,
    "manifest": manifest,
    "checkpoint": checkpoint,
    "audio": audio,
}


def main() -> None:
    """Parse the arguments and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=0, help="stop after so long (0: after --runs)")
    parser.add_argument("--plain", action="store_true", help="seeded mutations, without coverage")
    args = parser.parse_args()
    logging.getLogger("fedsim").setLevel(logging.CRITICAL + 1)
    folder = Path(tempfile.mkdtemp(prefix="fedsim-fuzz-"))  # stays where something was found
    read, file, good = READERS[args.reader](folder)
    counts: Counter[str] = Counter()

    def attempt(content: bytes) -> None:
        file.write_bytes(content)
        try:
            how, _ = ends_well(read, seconds=60)  # instrumented code takes its time
        except BaseException:
            found = folder / "found"
            found.write_bytes(content)
            print(f"{args.reader}: {found} breaks it, after {sum(counts.values())} inputs", file=sys.stderr)
            raise
        counts[how] += 1
        if sum(counts.values()) == args.runs:
            told()

    def told() -> None:
        print(f"{args.reader}: {sum(counts.values())} inputs ended well, {dict(counts)}", flush=True)

    if not GUIDED:
        chance = random.Random(args.seed)
        end = time.monotonic() + args.seconds if args.seconds else math.inf
        while sum(counts.values()) < args.runs and time.monotonic() < end:
            content = chance.choice(good)
            for _ in range(chance.choice([1, 1, 2, 5])):
                content = mutated(content, chance)
            attempt(content)
        if sum(counts.values()) < args.runs:
            told()
        shutil.rmtree(folder)
        return
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(good):
        (corpus / str(number)).write_bytes(content)
    # One run more than counted: libFuzzer begins with an empty input.
    words = [
        f"-runs={args.runs + 1}",
        f"-seed={args.seed}",
        f"-max_total_time={args.seconds}",
        "-max_len=20000",
        "-timeout=120",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup([sys.argv[0], *words, str(corpus)], attempt)
    try:
        atheris.Fuzz()
    finally:
        told()


if __name__ == "__main__":
    main()
