"""Checkpoints: exactly the server's state, as safetensors and JSON in `checkpoints/round-N/`; never pickle.

A checkpoint is written to a temporary folder, flushed to disk and renamed, so it is there whole or not at all. Every
file's SHA-256 is in state.json, which also holds the configuration that the numbers depend on. What clients keep lies
in `clients/` beside the checkpoints (see `client_store`); a checkpoint holds the index, and its rows are never written
over.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedsim.config import Config, flatten
from fedsim.errors import CheckpointError
from fedsim.federation.checkpoint_files import (
    CHECKPOINTS,
    SCHEMA,
    STATE,
    ForeignCheckpointError,
    check_files,
    checkpoints_of,
    flush,
    newest_checkpoint,
    read_document,
    read_table,
    sha256_of,
)
from fedsim.federation.client_store import ClientIndex, check_rows
from fedsim.models.guarded_files import sealed
from fedsim.types import AdapterState, ClassStats, Learnt, PooledCovariance

log = logging.getLogger(__name__)
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
    final = run_dir / CHECKPOINTS / f"round-{state.round_number}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, table in _tables(state).items():
            save_file(
                {key: tensor.contiguous().cpu() for key, tensor in table.items()}, partial / f"{name}.safetensors"
            )
        files = sorted(partial.iterdir())
        document = {
            "schema": SCHEMA,
            "round": state.round_number,
            "mlflow_run_id": mlflow_run_id,
            "config": bound_config(config),
            "data_fingerprint": data_fingerprint,
            "sha256": {file.name: sha256_of(file) for file in files},
            "bytes": {file.name: file.stat().st_size for file in files},
        }
        (partial / STATE).write_text(json.dumps(sealed(document), indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        flush(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    return final


def _tables(state: ServerState) -> dict[str, dict[str, Tensor]]:
    tables = {"adapter": dict(state.adapter), "generator": dict(state.generator)}
    for name, index in ((CLIENTS, state.clients), (GENERATORS, state.generators)):
        if len(index):
            tables[name] = {
                column: torch.from_numpy(np.array(getattr(index, column))) for column in ("ids", "slots", "crc")
            }
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
    """The newest valid checkpoint of a run and the MLflow run id it was written under; what is passed over is said.

    Raises:
        ForeignCheckpointError: the newest one that can be read belongs to another configuration or another fedsim.
        CheckpointError: there is none, or none is valid.
    """
    newest_checkpoint(run_dir)
    refusals: list[str] = []
    for folder in checkpoints_of(run_dir):
        try:
            document = read_document(folder)
            _check_config(folder, document["config"], bound_config(config))
            state = _read_state(run_dir, folder, document)
        except ForeignCheckpointError:
            raise
        except CheckpointError as error:
            refusals.append(str(error))
            continue
        for refusal in refusals:
            log.warning("passed over a checkpoint: %s", refusal)
        if refusals:
            log.warning("the newest valid checkpoint is %s", folder.name)
        return state, document["mlflow_run_id"]
    others = [folder.name for folder in checkpoints_of(run_dir)[1:]]
    also = f" {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} can't be read either;" if others else ""
    raise CheckpointError(f"{refusals[0]};{also} no valid checkpoint is left: restore one, or start a new run")


def _check_config(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    if differing:
        key = differing[0]
        raise ForeignCheckpointError(
            f"{folder} belongs to another configuration: {key} was {stored.get(key)!r}, now {wanted.get(key)!r}"
            + (f", and {len(differing) - 1} more: {', '.join(differing[1:4])}" if len(differing) > 1 else "")
        )


def _read_state(run_dir: Path, folder: Path, document: Mapping[str, Any]) -> ServerState:
    """What a checkpoint holds, with the rows that it refers to there."""
    tables = {file.stem: read_table(file) for file in check_files(folder, document)}
    try:
        state = _from_tables(document["round"], tables)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} is damaged: its tables don't fit ({type(error).__name__}: {reason})"
        ) from error
    size = sum(tensor.numel() for tensor in state.adapter.values())
    check_rows(run_dir / CLIENTS, state.clients, size)
    size = sum(tensor.numel() for tensor in state.learnt.network.values())
    check_rows(run_dir / CLIENTS / GENERATORS, state.generators, size)
    return state


def kept_indices(run_dir: Path, name: str = CLIENTS) -> list[ClientIndex]:
    """What the checkpoints of a run refer to in a client store; one that can't be read is left out, and said so."""
    indices = []
    for folder in reversed(checkpoints_of(run_dir)):
        file = folder / f"{name}.safetensors"
        try:
            if file.exists():
                check_files(folder, read_document(folder), only=file.name)
                indices.append(_index_of(read_table(file)))
        except (CheckpointError, KeyError) as error:
            log.warning("%s: what its clients kept won't be kept any longer (%s)", file, error)
    return indices


def _index_of(table: Mapping[str, Tensor]) -> ClientIndex:
    """An index.

    Raises:
        KeyError: it lacks a column.
        CheckpointError: its columns are those of no index.
    """
    columns = [table["ids"].numpy(), table["slots"].numpy()]
    columns += [table["crc"].numpy()] if "crc" in table else []
    return ClientIndex(*columns).checked()


def check_data(run_dir: Path, data_fingerprint: str, *, round_number: int) -> None:
    """Refuse to go on with other recordings, embeddings or targets than a round's checkpoint was made with.

    Raises:
        CheckpointError: they differ.
    """
    folder = run_dir / CHECKPOINTS / f"round-{round_number}"
    stored = read_document(folder).get("data_fingerprint")
    if stored != data_fingerprint:
        raise CheckpointError(
            f"{folder} was made with other data: recordings, embeddings, partition or text targets have changed since "
            "(data fingerprint differs); restore them, or start a new run"
        )


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
