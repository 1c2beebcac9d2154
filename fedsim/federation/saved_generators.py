"""Clients' generators in a run directory, `generators/`: one safetensors table for all clients, and JSON; never pickle.

    generators.safetensors   start [P] and deviation [E]; network [n, P] of client [n] (own generators; a client without
                             a row has the start's); mean [M, E] of classes with mean_label and mean_count [M] at
                             mean_client [M]; held_out [N, S, D] with held_out_label [N]
    generators.json          format, kind, round, seed, class names, sizes, encoder, clients; SHA-256 of the table

Class means are a client's own data: who has the file has them. Of classes with fewer than `privacy.min_count`
recordings none is written. Held-out embeddings belong to no client.

Legend: n clients with a network of their own, P its numbers, M (client, class) pairs, N held-out recordings, E = S * D.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsim.config.schema import Config
from fedsim.errors import ConfigError, ModelError
from fedsim.models.encoders.files import sha256_of_file
from fedsim.models.guarded_files import check_header, check_seal, read_json, sealed
from fedsim.types import AdapterState, unflatten_state

FOLDER, TABLE, DOCUMENT = "generators", "generators.safetensors", "generators.json"
FORMAT = 1
KIND = "residual_vae"
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}

Column = tuple[str, tuple[int, ...], Iterable[np.ndarray]]
"""Type (a key of `_TYPES`), shape, and the values in pieces along the first axis."""


@dataclass(frozen=True)
class SavedGenerators:
    """An opened folder; networks, means and held-out rows are read when they are asked for.

    Attributes:
        folder: it.
        info: the contents of generators.json.
        start: the network of a client without one of its own.
        deviation: scale of the residuals [E].
        clients: clients with a network of their own [n], ascending.
        mean_client, mean_label, mean_count: what the rows of means are of [M], by client and class.
    """

    folder: Path
    info: Mapping[str, Any]
    start: AdapterState
    deviation: Tensor
    clients: np.ndarray
    mean_client: np.ndarray
    mean_label: np.ndarray
    mean_count: np.ndarray

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` of a table: "network", "mean", "held_out" or "held_out_label"."""
        with safe_open(self.folder / TABLE, framework="numpy") as file:
            rows: np.ndarray = file.get_slice(name)[first:last]
        return rows

    @property
    def num_held_out(self) -> int:
        """N."""
        return int(self.info["held_out"])


def write_generators(folder: Path, *, info: Mapping[str, Any], columns: Mapping[str, Column]) -> None:
    """Write a folder atomically; one that exists is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_table(partial / TABLE, columns)
    document = {"format": FORMAT, "kind": KIND, **info, "sha256": sha256_of_file(partial / TABLE)}
    (partial / DOCUMENT).write_text(json.dumps(sealed(document), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _write_table(path: Path, columns: Mapping[str, Column]) -> None:
    """A safetensors file, written piece by piece: its clients needn't fit into memory together."""
    header, end = {}, 0
    for name, (kind, shape, _) in columns.items():
        size = int(np.prod(shape)) * _TYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for kind, _, pieces in columns.values():
            for piece in pieces:
                file.write(np.ascontiguousarray(piece, dtype=_TYPES[kind]).data)
        file.flush()
        os.fsync(file.fileno())


def open_generators(run_dir: str | Path, *, key: str) -> SavedGenerators:
    """Open what a run has saved; `key` names the configuration key in messages.

    Raises:
        ConfigError: the run has saved none.
        ModelError: the files are damaged, or of another format or kind.
    """
    folder = Path(run_dir).expanduser().absolute() / FOLDER
    if not (folder / DOCUMENT).is_file():
        raise ConfigError(
            f"{key} is {str(run_dir)!r}, which holds no {FOLDER}/{DOCUMENT}; name the directory of a run that finished "
            "with feda2v.save_generators: true"
        )
    try:
        info = read_json(folder / DOCUMENT)
        if (info["format"], info["kind"]) != (FORMAT, KIND):
            found = f"{info['kind']} in format {info['format']}"
            raise ModelError(f"{folder} holds {found}, this fedsim reads {KIND} in format {FORMAT}; run it again")
        check_seal(info)
        check_header(folder / TABLE)
        if info["sha256"] != sha256_of_file(folder / TABLE):
            raise ModelError(f"{folder / TABLE} doesn't match the digest in {DOCUMENT}: the file is damaged")
        names = ("start", "deviation", "client", "mean_client", "mean_label", "mean_count")
        with safe_open(folder / TABLE, framework="numpy") as file:
            start, deviation, *numbers = (file.get_tensor(name) for name in names)
            rows = [file.get_slice(name).get_shape()[0] for name in ("network", "mean", "held_out", "held_out_label")]
        if rows != [len(numbers[0]), len(numbers[1]), info["held_out"], info["held_out"]]:
            raise ValueError("its columns have other lengths than it says")
        like = {name: torch.empty(shape) for name, shape in info["network"].items()}
        network = {name: tensor.clone() for name, tensor in unflatten_state(torch.from_numpy(start), like).items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        kind = type(error).__name__
        raise ModelError(f"{folder} is no readable folder of generators ({kind}: {error})") from error
    return SavedGenerators(folder, info, network, torch.from_numpy(deviation), *numbers)


def check_embeddings(saved: SavedGenerators, config: Config, *, key: str) -> None:
    """Refuse generators of other embeddings than the configuration's.

    Raises:
        ConfigError: naming what differs.
    """
    encoder = config.model.audio_encoder
    _require(saved, key, "model.audio_encoder.name", saved.info["audio_encoder"], encoder.name)
    shape = [encoder.segments, encoder.dim]
    _require(saved, key, "model.audio_encoder.segments, dim", saved.info["input_shape"], shape)


def open_pretrained(config: Config, *, class_names: tuple[str, ...], num_clients: int) -> SavedGenerators | None:
    """The generators that clients start from (`feda2v.pretrained_generators`), or None.

    Raises:
        ConfigError: there are none, or they are of other embeddings, classes, clients or sizes.
        ModelError: the files are damaged.
    """
    settings, key = config.feda2v, "feda2v.pretrained_generators"
    if settings.pretrained_generators is None:
        return None
    saved = open_generators(settings.pretrained_generators, key=key)
    check_embeddings(saved, config, key=key)
    _require(saved, key, "classes", saved.info["class_names"], list(class_names))
    _require(saved, key, "clients", saved.info["num_clients"], num_clients)
    _require(saved, key, "nodes", saved.info["client_names"], list(config.nodes))
    _require(saved, key, "feda2v.generator_hidden_dim", saved.info["hidden_dim"], settings.generator_hidden_dim)
    _require(saved, key, "feda2v.generator_latent_dim", saved.info["latent_dim"], settings.generator_latent_dim)
    if saved.info["clients"] == "own" and settings.clients_train == "shared":
        raise ConfigError(
            f"{key}: {saved.folder} holds a network for each client, but clients share one here; set "
            "feda2v.client_generator to own"
        )
    return saved


def _require(saved: SavedGenerators, key: str, what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ConfigError(
            f"{key}: {saved.folder} was made with other {what}: {found} there, {wanted} here; they must agree"
        )
