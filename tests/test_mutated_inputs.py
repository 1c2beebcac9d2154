"""Seeded mutations of what a user hands in: recordings, manifests, tables, stores, run directories by the commands.

Checkpoints, saved adapters and saved generators by themselves are in federation/test_mutated_files.py.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hostile import REFUSED, SECONDS, bounded, changed, contents, ends_well, mutated, told
from test_configurations import TINY

from fedsim.cli import main
from fedsim.config import config_from_mapping
from fedsim.data import open_recordings, read_audio
from fedsim.data.store import open_store
from fedsim.federation.setup import prepare
from fedsim.models.encoders.precomputed import load_precomputed
from fedsim.models.encoders.text import make_text_targets
from fedsim.models.guarded_files import SEAL, sealed


def tries(sample: int, all_of_them: int) -> pytest.MarkDecorator:
    """A sample in every run of the tests, and all mutations where slow tests are run."""
    return pytest.mark.parametrize("tries", [sample, pytest.param(all_of_them, marks=pytest.mark.slow)])


COMMON = {"label", "split", "fold", "client", "group", "path"}


pytestmark = pytest.mark.usefixtures("quiet")


def command(*words: str, seconds: float = SECONDS) -> str:
    """How a command of the command line ends: REFUSED with exit code 2 and one line of error, or done."""
    errors, argv = io.StringIO(), sys.argv
    sys.argv = ["fedsim", *words]
    try:
        with bounded(seconds), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    else:
        code = 0
    finally:
        sys.argv = argv
    lines = errors.getvalue().splitlines()
    assert code in {0, 2}, (words, code, lines)
    assert code == 0 or (len(lines) == 1 and lines[0].startswith("error: ")), (words, lines)
    return REFUSED if code else "done"


# Recordings


def recording(folder: Path, suffix: str, **kwargs: Any) -> bytes:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 2)).astype(np.float32)
    soundfile.write(folder / f"x.{suffix}", noise, 16_000, **kwargs)
    return (folder / f"x.{suffix}").read_bytes()


def bad_field(content: bytes, chance: random.Random) -> bytes:
    """A number of the header replaced by an absurd one."""
    at, width = chance.randrange(0, min(96, len(content) - 8)), chance.choice(["<H", "<I", ">I", "<Q"])
    value = chance.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 48_000, 2**63]) % 2 ** (
        8 * struct.calcsize(width)
    )
    return content[:at] + struct.pack(width, value) + content[at + struct.calcsize(width) :]


@tries(60, 1600)
def test_mutated_recordings(tmp_path, tries):
    kinds = [
        ("wav", {}),
        ("wav", {"subtype": "FLOAT"}),
        ("flac", {}),
        ("ogg", {}),
        ("mp3", {}),
        ("aiff", {}),
        ("w64", {}),
    ]
    originals = [(suffix, recording(tmp_path, suffix, **kwargs)) for suffix, kwargs in kinds]
    chance, counts = random.Random(1), Counter()
    for number in range(tries):
        suffix, content = originals[number % len(originals)]
        damaged = bad_field(content, chance) if chance.random() < 0.5 else mutated(content, chance)
        (tmp_path / f"x.{suffix}").write_bytes(damaged)
        how, answer = ends_well(lambda file=tmp_path / f"x.{suffix}": read_audio(file, 16_000), megabytes=600)
        if how != REFUSED:
            assert answer.dtype == np.float32
            assert np.isfinite(answer).all()
            assert np.abs(answer).max() <= 1
        counts[how] += 1
    told("mutated recordings", counts)
    assert counts[REFUSED] > tries / 5


# Manifests

ROWS = [
    {
        "path": f"{n}.wav",
        "label": "ab"[n % 2],
        "split": "test" if n < 2 else "train",
        "fold": str(n % 5),
        "client": "xy"[n % 2],
        "group": str(n),
    }
    for n in range(10)
]
CELLS = [
    "",
    " ",
    '"',
    '"a',
    "a\nb",
    "a\r",
    "\x00",
    "../0.wav",
    "/etc/passwd",
    "/dev/zero",
    ".",
    "..",
    "pipe",
    "loop",
    "zero",
    "nan",
    "-1",
    "1.5",
    "9" * 30,
    "٣",
    "é",
    "e\u0301",
    "A",
    "a ",
    "\ufeffa",
    "\u202e",
    "\ud800",
    "x" * 10**6,
    ",",
    ";",
    "0.wav",
]


def bad_manifest(chance: random.Random) -> bytes:
    """A table in which columns, rows, cells, line ends or the encoding are other than they should be."""
    rows = [dict(row) for row in ROWS[: chance.choice([0, 1, 2, 10, 10, 10, 10])]]
    columns = list(ROWS[0])
    for _ in range(chance.randrange(3)):
        kind = chance.randrange(5)
        if kind == 0:
            columns.remove(chance.choice(columns))
        elif kind == 1:
            columns.append(chance.choice([*columns, "", "x", "Path", "label "]))
        elif kind == 2 and rows:
            rows.append(chance.choice(rows))
        elif rows:
            chance.choice(rows)[chance.choice(sorted(COMMON))] = chance.choice(CELLS)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=chance.choice(["\n", "\r\n", "\r"]), delimiter=chance.choice(",,,,,;\t"))
    writer.writerow(columns)
    writer.writerows([[row.get(name, "") for name in columns] for row in rows])
    encoding = chance.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-7"])
    content = text.getvalue().encode(
        encoding, "surrogatepass" if "utf-" in encoding and "7" not in encoding else "replace"
    )
    return mutated(content, chance) if chance.random() < 0.3 else content


@pytest.fixture
def sounds(tmp_path):
    """A folder with the recordings of `ROWS`, and with what is no file: a pipe, a link to itself, one to a device."""
    for row in ROWS:
        soundfile.write(tmp_path / row["path"], np.random.default_rng(int(row["group"])).normal(0, 0.1, 4000), 16_000)
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    return tmp_path


@tries(60, 900)
def test_mutated_manifests(sounds, tries):
    chance, counts, manifest = random.Random(2), Counter(), sounds / "manifest.csv"
    overrides = [f"data={{name: csv, path: '{manifest}'}}", f"data.cache_dir={sounds / 'cache'}"]
    config = config_from_mapping(TINY, overrides)
    for number in range(tries):
        manifest.write_bytes(bad_manifest(chance))
        opened, found = ends_well(
            lambda: open_recordings("csv", path=str(manifest), classes=None, clips_per_class=2, seed=0)
        )
        if opened != REFUSED:
            assert len(found) >= 2
            assert len(set(found.class_names)) == len(found.class_names) >= 2
            if number % 5 == 0:  # on to the end: split, dealt, decoded, embedded
                opened = f"{ends_well(lambda: prepare(config))[0]} by prepare"
        counts[opened] += 1
    told("mutated manifests", counts)
    assert counts[REFUSED] > tries / 5


@pytest.mark.parametrize("name", ["pipe", "zero", "loop", "..", "missing", "0.wav"])
@pytest.mark.parametrize(
    "key",
    [
        "data={{name: csv, path: '{}'}}",
        "model.audio_encoder={{name: precomputed, path: '{}'}}",
        "model.audio_encoder={{name: yamnet, path: '{}'}}",
        "model.text_encoder={{name: table, path: '{}'}}",
        "data={{name: esc50, path: '{}'}}",
        "data.generators='{}'",
        "data.cache_dir='{}/x'",
    ],
)
def test_what_is_no_file_is_never_read(sounds, key, name):
    before = contents(sounds)
    config = config_from_mapping(TINY, [f"data.cache_dir={sounds / 'cache'}", key.format(sounds / name)])
    if (key, name) == ("data.cache_dir='{}/x'", "..") or ("cache_dir" in key and name == "missing"):
        return  # such a folder is made
    assert ends_well(lambda: prepare(config))[0] == REFUSED
    for words in (
        ["run", "--output", str(sounds / "out"), str(sounds / name)],
        ["config", str(sounds / name)],
        ["resume", str(sounds / name)],
        ["compare", str(sounds / name)],
        ["sync", str(sounds / name)],
    ):
        assert command(*words) == REFUSED
    assert contents(sounds) == before


# Tables and ready-made embeddings


@tries(60, 500)
def test_mutated_arrays(tmp_path, tries):
    rng, table, ready, plain = np.random.default_rng(0), tmp_path / "t.npz", tmp_path / "e.npz", tmp_path / "e.npy"
    embeddings = rng.normal(size=(6, 3, 8)).astype(np.float32)
    np.savez(table, names=np.array(["dog", "rain"]), vectors=np.eye(2, 8, dtype=np.float32))
    np.savez_compressed(ready, embeddings=embeddings, mask=np.ones((6, 3), dtype=bool))
    np.save(plain, embeddings)
    readers: dict[Path, Callable[[], Any]] = {
        table: lambda: make_text_targets(
            "table",
            class_names=["dog", "rain"],
            heads={"clip": (8,)},
            path=str(table),
            clip="",
            t5="",
            revision=None,
            template="{}",
        ),
        ready: lambda: load_precomputed(ready, num_rows=6, segments=2, dim=4),
        plain: lambda: load_precomputed(plain, num_rows=6, segments=2, dim=4),
    }
    originals, chance, counts = {file: file.read_bytes() for file in readers}, random.Random(3), Counter()
    for number in range(tries):
        file = list(readers)[number % 3]
        content = originals[file]
        file.write_bytes(bad_field(content, chance) if chance.random() < 0.3 else mutated(content, chance))
        counts[ends_well(readers[file])[0]] += 1
        file.write_bytes(content)
    told("mutated arrays", counts)
    assert counts[REFUSED] > tries / 5


@tries(4, 80)
def test_mutated_stores(tmp_path, tries):
    config = config_from_mapping(TINY, [f"data.cache_dir={tmp_path / 'cache'}"])
    setup = prepare(config)
    whole, rows = setup.data_fingerprint, np.array(open_store(setup.store_path).rows)
    shutil.copytree(tmp_path / "cache", tmp_path / "kept")
    chance, counts = random.Random(4), Counter()
    for _ in range(tries):
        files = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
        file = chance.choice([file for file in files if file.stat().st_size])
        file.write_bytes(mutated(file.read_bytes(), chance))
        how, answer = ends_well(lambda: prepare(config))
        if how != REFUSED:
            assert answer.data_fingerprint == whole
            assert np.array_equal(open_store(answer.store_path).rows, rows), file
        counts[how] += 1
        shutil.rmtree(tmp_path / "cache")
        shutil.copytree(tmp_path / "kept", tmp_path / "cache")
    told("mutated stores", counts)


# A run directory, through the commands


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two rounds with saved generators, and a configuration that starts from it."""
    folder = tmp_path_factory.mktemp("finished")
    own = {"feda2v": TINY["feda2v"] | {"client_generator": "own", "save_generators": True, "generator_rank": 2}}
    document = (
        TINY
        | own
        | {
            "federation": TINY["federation"] | {"global_rounds": 2},
            "data": TINY["data"] | {"cache_dir": str(folder / "cache")},
        }
    )
    (folder / "first.json").write_text(json.dumps(document))
    reuse = TINY | {"data": {"generators": str(folder / "run"), "cache_dir": str(folder / "cache")}}
    (folder / "second.json").write_text(json.dumps(reuse))
    assert command("run", str(folder / "first.json"), "--output", str(folder / "run"), seconds=120) == "done"
    shutil.copytree(folder / "run", folder / "kept")
    return folder


@tries(8, 250)
def test_mutated_run_directories(finished, tries):
    run, output = finished / "run", finished / "out"
    ways = [
        ["resume", str(run)],
        ["compare", str(run)],
        ["config", str(run / "config.yaml")],
        ["sync", str(run)],
        ["run", str(finished / "second.json"), "--output", str(output)],
    ]
    chance, counts = random.Random(5), Counter()
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    for number in range(tries):
        file = chance.choice(files)
        if number % 3 == 0:
            for late in ("result.json", "metrics.jsonl") if number % 2 else ("result.json",):
                (run / late).unlink(missing_ok=True)  # as if it had stopped before
        if file.exists():
            content = file.read_bytes()
            if file.suffix == ".json" and number % 4 == 0:
                document = changed(json.loads(content), chance)
                file.write_text(
                    json.dumps(sealed(document) if isinstance(document, dict) and SEAL in document else document)
                )
            else:
                file.write_bytes(mutated(content, chance))
        words = ways[number % len(ways)]
        before = contents(run)
        how = command(*words, seconds=60)
        counts[f"{words[0]}: {how}"] += 1
        if how == REFUSED:
            assert contents(run) == before, (words, file)
            assert not output.exists()
        for folder in (run, output):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished / "kept", run)
    told("files of run directories mutated, then a command", counts)
    assert sum(value for name, value in counts.items() if REFUSED in name) > tries / 10
