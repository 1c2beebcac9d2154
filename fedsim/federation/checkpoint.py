"""Checkpoints: exactly the server's state, as safetensors and JSON in `checkpoints/round-N/`; never pickle.

A checkpoint is written to a temporary folder, flushed to disk and renamed, so it is there whole or not at all. Every
file's SHA-256 is in state.json, which also holds the configuration that the numbers depend on. What clients keep lies
in `clients/` beside the checkpoints (see `client_store`); a checkpoint holds the index, and its rows are never written
over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsim.config import Config, flatten
from fedsim.errors import CheckpointError
from fedsim.federation.client_store import ClientIndex, require_rows
from fedsim.types import AdapterState, ClassStats, Learnt, PooledCovariance

log = logging.getLogger(__name__)
SCHEMA = 2
CLIENTS = "clients"
GENERATORS = "client_generators"
FREE_SECTIONS = ("tracking.", "search.", "resources.", "experiment.", "data.cache_dir")
BOUND_ALL_THE_SAME = ("experiment.seed", "resources.block_size")


@dataclass(frozen=True)
class ServerState:
    """What a checkpoint holds.

    Random streams need no counters: each is a function of (seed, purpose, round, client).

    Attributes:
        round_number: the last finished round, 0 before the first.
        adapter: global trainable tensors.
        generator: the generator's own state with its optimiser; empty before its first fit.
        buffer: class statistics of earlier rounds, or None.
        clients: where the tensors that clients keep lie in the run's client store.
        learnt: what clients' sums have taught the server for its generator.
        server_optimizer: moments of the server optimiser by name; empty before its first step, or without one.
        guides: what guides clients' steps, by name (see `client_guides`).
        generators: where the networks of clients' own generators lie in their store.
    """

    round_number: int
    adapter: AdapterState
    generator: Mapping[str, Tensor] = field(default_factory=dict)
    buffer: ClassStats | None = None
    clients: ClientIndex = field(default_factory=ClientIndex)
    learnt: Learnt = field(default_factory=Learnt)
    server_optimizer: AdapterState = field(default_factory=dict)
    guides: AdapterState = field(default_factory=dict)
    generators: ClientIndex = field(default_factory=ClientIndex)


def bound_config(config: Config) -> dict[str, Any]:
    """The flattened configuration keys that the numbers of a run depend on."""
    return {
        key: value
        for key, value in flatten(config).items()
        if key in BOUND_ALL_THE_SAME or not key.startswith(FREE_SECTIONS)
    }


def save_checkpoint(
    run_dir: Path, state: ServerState, config: Config, *, mlflow_run_id: str | None, data_fingerprint: str = ""
) -> Path:
    """Write `checkpoints/round-N/` atomically; one that exists is replaced. Returns the folder.

    The rows that `state.clients` refers to must be on the disk before.
    """
    final = run_dir / "checkpoints" / f"round-{state.round_number}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, table in _tables(state).items():
        save_file({key: tensor.contiguous().cpu() for key, tensor in table.items()}, partial / f"{name}.safetensors")
    document = {
        "schema": SCHEMA,
        "round": state.round_number,
        "mlflow_run_id": mlflow_run_id,
        "config": bound_config(config),
        "data_fingerprint": data_fingerprint,
        "sha256": {file.name: _sha256(file) for file in sorted(partial.iterdir())},
    }
    (partial / "state.json").write_text(json.dumps(document, indent=2) + "\n")
    for file in partial.iterdir():
        _flush(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _flush(final.parent)
    return final


def _tables(state: ServerState) -> dict[str, dict[str, Tensor]]:
    tables = {"adapter": dict(state.adapter), "generator": dict(state.generator)}
    for name, index in ((CLIENTS, state.clients), (GENERATORS, state.generators)):
        if len(index):
            ids, slots = (torch.from_numpy(np.array(a)) for a in (index.ids, index.slots))
            tables[name] = {"ids": ids, "slots": slots}
    if state.buffer is not None:
        tables["buffer"] = {
            "client": torch.from_numpy(state.buffer.client),
            "label": torch.from_numpy(state.buffer.label),
            "count": torch.from_numpy(state.buffer.count),
            "audio_mean": state.buffer.audio_mean,
            **{f"output_mean.{head}": mean for head, mean in state.buffer.output_mean.items()},
        }
        if state.buffer.audio_var is not None:
            tables["buffer"]["audio_var"] = state.buffer.audio_var
        if state.buffer.sampled_count is not None:
            tables["buffer"]["sampled_count"] = torch.from_numpy(state.buffer.sampled_count)
        if state.buffer.seen is not None:
            tables["buffer"]["seen"] = torch.from_numpy(state.buffer.seen)
    if (pooled := state.learnt.pooled) is not None:
        freedom = torch.tensor(pooled.freedom, dtype=torch.float64)
        tables["pooled"] = {"factor": pooled.factor, "residual": pooled.residual, "freedom": freedom}
    tables["client_generator"] = dict(state.learnt.network)
    if state.learnt.deviation is not None:
        tables["client_generator"]["deviation"] = state.learnt.deviation
    tables["server_optimizer"] = dict(state.server_optimizer)
    tables["guides"] = dict(state.guides)
    tables["class_sums"] = dict(state.learnt.class_sums)
    # safetensors keeps one copy of shared memory; clones keep tables independent of that.
    return {name: {k: t.clone() for k, t in table.items()} for name, table in tables.items() if table}


def load_checkpoint(run_dir: Path, config: Config) -> tuple[ServerState, str | None]:
    """The newest checkpoint of a run and the MLflow run id it was written under.

    Raises:
        CheckpointError: there is none, a file is missing or damaged, or it belongs to another configuration.
    """
    folder = newest_checkpoint(run_dir)
    document = _read_document(folder)
    stored, wanted = document["config"], bound_config(config)
    differing = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"{folder} belongs to another configuration: {key} was {stored.get(key)!r}, now {wanted.get(key)!r}"
            + (f", and {len(differing) - 1} more: {', '.join(differing[1:4])}" if len(differing) > 1 else "")
        )
    tables = {}
    for name, expected in document["sha256"].items():
        file = folder / Path(name).name
        if not file.is_file() or _sha256(file) != expected:
            raise CheckpointError(
                f"{file} is {'damaged or truncated' if file.is_file() else 'missing'}; delete the folder "
                f"{folder.name} to go on from an earlier checkpoint, if there is one"
            )
        tables[file.stem] = _read_tensors(file)
    state = _from_tables(document["round"], tables)
    require_rows(run_dir / CLIENTS, state.clients, sum(tensor.numel() for tensor in state.adapter.values()))
    size = sum(tensor.numel() for tensor in state.learnt.network.values())
    require_rows(run_dir / CLIENTS / GENERATORS, state.generators, size)
    return state, document["mlflow_run_id"]


def kept_indices(run_dir: Path, name: str = CLIENTS) -> list[ClientIndex]:
    """What the checkpoints of a run refer to in a client store; one that can't be read is left out, and said so."""
    indices = []
    for file in sorted((run_dir / "checkpoints").glob(f"round-*/{name}.safetensors")):
        try:
            indices.append(_index_of(_read_tensors(file)))
        except (CheckpointError, KeyError) as error:
            log.warning("%s: what its clients kept won't be kept any longer (%s)", file, error)
    return indices


def _index_of(table: Mapping[str, Tensor]) -> ClientIndex:
    return ClientIndex(table["ids"].numpy(), table["slots"].numpy())


def check_data(run_dir: Path, data_fingerprint: str) -> None:
    """Refuse to go on with other recordings, embeddings or targets than the newest checkpoint was made with.

    Raises:
        CheckpointError: they differ.
    """
    folder = newest_checkpoint(run_dir)
    stored = _read_document(folder).get("data_fingerprint")
    if stored != data_fingerprint:
        raise CheckpointError(
            f"{folder} was made with other data: recordings, embeddings, partition or text targets have changed since "
            "(data fingerprint differs); restore them, or start a new run"
        )


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run directory holds any checkpoint."""
    return any((run_dir / "checkpoints").glob("round-*"))


def newest_checkpoint(run_dir: Path) -> Path:
    """The folder of the highest round.

    Raises:
        CheckpointError: there is none.
    """
    folders = [path for path in (run_dir / "checkpoints").glob("round-*") if re.fullmatch(r"round-\d+", path.name)]
    if not folders:
        raise CheckpointError(f"{run_dir} holds no checkpoint (no checkpoints/round-N); start it with `fedsim run`")
    return max(folders, key=lambda path: int(path.name.split("-")[1]))


def _read_document(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / "state.json").read_text())
        if document["schema"] != SCHEMA:
            raise CheckpointError(
                f"{folder}: checkpoint schema {document['schema']}, this fedsim reads {SCHEMA} (since 2, what clients "
                "keep lies beside the checkpoints); finish the run with the fedsim that began it, or start a new one"
            )
        for key, kind in (("round", int), ("config", dict), ("sha256", dict)):
            if not isinstance(document[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        if "adapter.safetensors" not in document["sha256"]:
            raise ValueError("it names no adapter.safetensors")
        return {"mlflow_run_id": None, **document}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/state.json is damaged or missing ({type(error).__name__}: {error})") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error})") from error
    return tensors


def _from_tables(round_number: int, tables: Mapping[str, dict[str, Tensor]]) -> ServerState:
    buffer = None
    if "buffer" in tables:
        table = tables["buffer"]
        heads = {name[len("output_mean.") :]: t for name, t in table.items() if name.startswith("output_mean.")}
        client, label, count = (table[name].numpy() for name in ("client", "label", "count"))
        sampled = table["sampled_count"].numpy() if "sampled_count" in table else None
        seen = table["seen"].numpy() if "seen" in table else None
        mean, variance = table["audio_mean"], table.get("audio_var")
        buffer = ClassStats(client, label, count, mean, variance, heads, sampled_count=sampled, seen=seen)
    clients = _index_of(tables[CLIENTS]) if CLIENTS in tables else ClientIndex()
    pooled = None
    if "pooled" in tables:
        table = tables["pooled"]
        pooled = PooledCovariance(table["factor"], table["residual"], float(table["freedom"]))
    network = dict(tables.get("client_generator", {}))
    deviation, class_sums = network.pop("deviation", None), tables.get("class_sums", {})
    learnt = Learnt(pooled, deviation=deviation, network=network, class_sums=class_sums)
    generator, moments = tables.get("generator", {}), tables.get("server_optimizer", {})
    guides = tables.get("guides", {})
    own = _index_of(tables[GENERATORS]) if GENERATORS in tables else ClientIndex()
    return ServerState(round_number, tables["adapter"], generator, buffer, clients, learnt, moments, guides, own)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(stream.read()).hexdigest()
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
