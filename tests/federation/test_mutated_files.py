"""Seeded mutations of everything that a run reads back: one line or the same result, never a traceback.

Bytes are flipped, cut, inserted, repeated and blanked in every file; and documents are changed value by value and
sealed again, as somebody would who means harm: then the result may differ, but nothing else may happen.
"""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import REFUSED, changed, ends_well, mutated
from test_resume import NONE, state_of
from test_saved_generators import ONLY_GENERATORS
from worlds import OWN_GENERATORS, SERVER_STEP, make_server, reconfigured, run

from fedsim.errors import FedsimError
from fedsim.federation.checkpoint import load_checkpoint
from fedsim.federation.run_directory import append_round, read_history, read_result
from fedsim.federation.saved_generators import open_generators
from fedsim.models.encoders.files import load_arrays
from fedsim.models.guarded_files import SEAL, read_json, read_tensors, sealed
from fedsim.models.saved import load_adapter, save_adapter


def outcomes(folder: Path, read: Callable[[], Any], *, tries: int, seed: int) -> Counter[str]:
    """How reading ends with one file of a folder damaged at a time; everything is restored after each try.

    Documents, where one is sealed, are changed in every third try and sealed again.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    originals = {file: file.read_bytes() for file in files}
    whole, counts, chance = read(), Counter(), random.Random(seed)
    for number in range(tries):
        file = files[number % len(files)] if number % 3 else chance.choice(files)
        resealed = file.suffix == ".json" and SEAL.encode() in originals[file] and number % 3 == 0
        if resealed:
            document = changed(json.loads(originals[file]), chance)
            file.write_text(json.dumps(sealed(document) if isinstance(document, dict) else document))
        else:
            file.write_bytes(mutated(originals[file], chance))
        how, found = ends_well(read)
        if how == REFUSED:
            counts[REFUSED] += 1
        else:
            assert resealed or same(found, whole), f"try {number}: {file.name} reads as something else"
            counts["sealed anew and read" if resealed else "the same result"] += 1
        file.write_bytes(originals[file])
        assert {path for path in folder.rglob("*") if path.is_file()} == set(files), "reading wrote something"
    assert same(read(), whole)
    return counts


def same(found: Any, whole: Any) -> bool:
    return bool(found == whole)


def shown(what: str, counts: Counter[str]) -> None:
    print(
        f"{what}: {sum(counts.values())} mutations, 0 tracebacks; " + ", ".join(f"{v} {k}" for k, v in counts.items())
    )
    assert counts["refused in one line"] > sum(counts.values()) / 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["server step", "clients keep", "own generators"])
def test_mutations_of_checkpoints_and_of_what_clients_keep(setup, tmp_path, kind):
    overrides = {
        "server step": SERVER_STEP,
        "clients keep": NONE,
        "own generators": ("feda2v.global_model_train=false", *OWN_GENERATORS, "federation.cohort_size=4"),
    }[kind]
    setup = reconfigured(setup, *overrides)
    server, states = make_server(setup, run_dir=tmp_path), []
    for _ in range(2):
        server.run_round()
        server.save(tmp_path, mlflow_run_id="abc")
        states.append((state_of(server), "abc"))
    server.close()
    loose = Counter()

    def read() -> Any:
        state, run_id = load_checkpoint(tmp_path, setup.config)
        again = make_server(setup, state=state, run_dir=tmp_path)
        found = state_of(again), run_id
        again.close()
        if found == states[0]:  # the earlier one serves, and is what it was
            loose["from round 1"] += 1
            return states[1]
        return found

    counts = outcomes(tmp_path, read, tries=200, seed=1)
    print(f"checkpoints ({kind}): {sum(counts.values())} mutations, 0 tracebacks; {dict(counts)}, {dict(loose)}")
    assert loose["from round 1"] > 40
    shutil.rmtree(tmp_path / "checkpoints" / "round-1")
    shown(f"a single checkpoint ({kind})", outcomes(tmp_path, read, tries=100, seed=2))


@pytest.mark.slow
def test_mutations_of_a_saved_adapter(setup, tmp_path):
    server, _ = run(setup, 1)
    save_adapter(tmp_path, server.parts.adapter, server.state.adapter, info={"class_names": ["dog"], "top1": 0.5})
    (tmp_path / "README.md").unlink()  # for people alone

    def read() -> Any:
        saved = load_adapter(tmp_path)
        answers = saved(torch.ones(2, *saved.input_shape))
        info = {name: saved.info.get(name) for name in ("class_names", "top1", "digest", "format", "heads", "scale")}
        return {head: answer.numpy().tobytes() for head, answer in answers.items()}, json.dumps(info)

    shown("a saved adapter", outcomes(tmp_path, read, tries=400, seed=3))


@pytest.mark.slow
def test_mutations_of_saved_generators(setup, tmp_path):
    server, _ = run(reconfigured(setup, *ONLY_GENERATORS), 2)
    server.save_generators(tmp_path)

    def read() -> Any:
        saved = open_generators(tmp_path, key="feda2v.pretrained_generators")
        sizes = {"network": len(saved.clients), "mean": len(saved.mean_client)}
        sizes |= dict.fromkeys(("held_out", "held_out_label"), saved.num_held_out)
        rows = [saved.rows(name, 0, size).tobytes() for name, size in sizes.items()]
        arrays = [saved.clients, saved.mean_client, saved.mean_label, saved.mean_count, saved.deviation.numpy()]
        info = {name: saved.info.get(name) for name in ("class_names", "num_clients", "input_shape", "seed")}
        start = {name: tensor.numpy().tobytes() for name, tensor in saved.start.items()}
        return rows, [array.tobytes() for array in arrays], json.dumps(info), start

    shown("saved generators", outcomes(tmp_path, read, tries=300, seed=4))


def test_mutations_of_metrics_and_results_are_errors_or_records(setup, tmp_path):
    _, results = run(setup, 2)
    for result in results:
        append_round(tmp_path, result)
    (tmp_path / "result.json").write_text(json.dumps({"digest": "0" * 64, "metrics": {}}))
    originals, chance, counts = {f: f.read_bytes() for f in tmp_path.iterdir()}, random.Random(5), Counter()
    for _ in range(400):
        file = chance.choice(sorted(originals))
        file.write_bytes(mutated(originals[file], chance))
        try:
            records, result = read_history(tmp_path), read_result(tmp_path)
            assert all(isinstance(record["round"], int) and isinstance(record["metrics"], dict) for record in records)
            assert result is None or "digest" in result
            counts["read"] += 1
        except FedsimError as error:
            counts["refused in one line"] += "\n" not in str(error)
        file.write_bytes(originals[file])
    assert sum(counts.values()) == 400
    print(f"metrics.jsonl and result.json: {sum(counts.values())} mutations, 0 tracebacks; {dict(counts)}")


def safetensors(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header longer than the file": safetensors({}, length=10**6),
    "a header of 2^63 bytes": safetensors({}, length=2**63),
    "a header of 50 MB": safetensors(b" " * 50_000_000),
    "no JSON": safetensors(b"{" * 1000),
    "nested deeply": safetensors(b"[" * 1_000_000),
    "overlapping": safetensors({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)),
    "the same bytes twice": safetensors({"a": ENTRY, "b": ENTRY}, bytes(8)),
    "a hole": safetensors({"a": ENTRY, "b": ENTRY | {"data_offsets": [16, 24]}}, bytes(24)),
    "surplus bytes": safetensors({"a": ENTRY}, bytes(9)),
    "offsets past the end": safetensors({"a": ENTRY | {"data_offsets": [0, 2**60]}}, bytes(8)),
    "offsets backwards": safetensors({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)),
    "an absurd shape": safetensors({"a": ENTRY | {"shape": [2**40, 2**40]}}, bytes(8)),
    "a negative shape": safetensors({"a": ENTRY | {"shape": [-2]}}, bytes(8)),
    "another size than the shape": safetensors({"a": ENTRY | {"shape": [3]}}, bytes(8)),
    "an unknown type": safetensors({"a": ENTRY | {"dtype": "PICKLE"}}, bytes(8)),
    "a pickle": pickle.dumps({"a": 1}),
    "a torch file": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_absurd_headers_are_refused_at_once(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    began, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="it is no readable safetensors file") as caught:
        read_tensors(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150 * 1024


def test_nothing_is_read_of_what_is_no_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")  # reading would wait for ever
    (tmp_path / "zero").symlink_to("/dev/zero")  # or never end
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder", "missing"):
        for read in (read_json, read_tensors):
            with pytest.raises(FileNotFoundError):
                read(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b" " * (33 * 2**20), b"\xff\xfe", b"1" * 5000, b"[]", b"null", b'"x"', b""],
    ids=["[[[", '{"a":{"a":', "33 MB", "no text", "a number of 5000 digits", "list", "null", "text", "empty"],
)
def test_absurd_json_is_refused_at_once(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "x.json")
    assert time.monotonic() - began < 2


def test_a_file_that_was_blown_up_is_refused_without_reading_it(setup, tmp_path):
    server, _ = run(setup, 1, run_dir=tmp_path)
    server.save(tmp_path, mlflow_run_id=None)
    file = tmp_path / "checkpoints" / "round-1" / "adapter.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(2**40)  # a terabyte of nothing takes no room
    began = time.monotonic()
    with pytest.raises(FedsimError, match=r"adapter\.safetensors is damaged or truncated"):
        load_checkpoint(tmp_path, setup.config)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["../../adapter", "/etc/passwd", "evil.pkl", "adapter.pt", "a/b.safetensors", "", "..",
                                  "x.safetensors\x00.pkl", "X.safetensors"])  # fmt: skip
def test_names_that_lead_out_of_the_folder_are_refused(setup, tmp_path, name):
    server, _ = run(setup, 1, run_dir=tmp_path)
    server.save(tmp_path, mlflow_run_id=None)
    file = tmp_path / "checkpoints" / "round-1" / "state.json"
    document = json.loads(file.read_text())
    document["sha256"][name] = "0" * 64
    file.write_text(json.dumps(sealed(document)))
    with pytest.raises(FedsimError) as caught:
        load_checkpoint(tmp_path, setup.config)
    assert f"{name!r} is no file of a checkpoint, and isn't read" in str(caught.value)


class Trap:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return type(self.trace).touch, (self.trace,)


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pkl", ".pt"])
def test_arrays_of_objects_are_never_opened(tmp_path, suffix):
    trace, file = tmp_path / "executed", tmp_path / f"table{suffix}"
    objects = np.array([Trap(trace)], dtype=object)
    with file.open("wb") as stream:
        if suffix == ".npz":
            np.savez(stream, names=objects, vectors=objects)
        elif suffix == ".npy":
            np.save(stream, objects, allow_pickle=True)
        else:
            pickle.dump(Trap(trace), stream)
    with pytest.raises(FedsimError, match=r"must be a complete \.npz or \.npy file of plain arrays"):
        load_arrays(file, what="the text table")
    assert not trace.exists()
