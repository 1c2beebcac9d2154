"""What a run writes into `generators/` at its end: clients' networks, their class means, and held-out embeddings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from fedsim.algorithms.batches import ClientRows
from fedsim.algorithms.client_generator import class_means
from fedsim.federation.checkpoint import ServerState
from fedsim.federation.client_store import ClientStore
from fedsim.federation.parts import Parts, rows_of
from fedsim.federation.saved_generators import FOLDER, write_generators
from fedsim.federation.setup import Setup
from fedsim.types import flatten_state

log = logging.getLogger(__name__)
AT_ONCE = 1024
"""Clients whose networks or recordings are in memory together."""


def save_generators(
    run_dir: Path,
    setup: Setup,
    parts: Parts,
    state: ServerState,
    store: ClientStore | None,
    held_out: tuple[Tensor, Tensor],
) -> None:
    """Write `generators/`.

    Args:
        run_dir: the run directory.
        setup: what the driver prepared.
        parts: what computes.
        state: the server's.
        store: networks of clients that keep their own: class means are theirs. None: all clients share one.
        held_out: embeddings [N, S, D] and labels [N].
    """
    config, learnt = setup.config, state.learnt
    untrained = store is not None and not len(state.generators)
    if untrained or not learnt.network or learnt.deviation is None:
        log.warning("feda2v.save_generators: there is nothing to save, no client has trained a generator")
        return
    deviation = learnt.deviation.cpu().numpy()
    start, everyone = flatten_state(learnt.network).numpy(), np.arange(setup.partition.num_clients)
    own, clients = (state.generators.ids, state.generators.ids) if store is not None else (everyone[:0], everyone)
    parts_of = [clients[first : first + AT_ONCE] for first in range(0, len(clients), AT_ONCE)]
    owner, label, count = _pairs(setup, parts_of)
    rows, labels = (tensor.cpu().numpy() for tensor in held_out)
    networks = (store.rows(some, start) for some in parts_of) if store else iter(())
    write_generators(
        run_dir / FOLDER,
        info={
            "clients": config.feda2v.clients_train,
            "round": state.round_number,
            "seed": config.experiment.seed,
            "class_names": list(setup.class_names),
            "num_clients": setup.partition.num_clients,
            "client_names": list(config.nodes),
            "audio_encoder": config.model.audio_encoder.name,
            "audio_encoder_used": setup.used["audio_encoder"],
            "data": setup.used["data"],
            "partition": setup.partition.fingerprint,
            "input_shape": list(parts.adapter.input_shape),
            "hidden_dim": config.feda2v.generator_hidden_dim,
            "latent_dim": config.feda2v.generator_latent_dim,
            "min_count": config.privacy.min_count,
            "held_out": len(rows),
            "network": {name: list(tensor.shape) for name, tensor in learnt.network.items()},
        },
        columns={
            "client": ("I64", own.shape, [own]),
            "mean_client": ("I64", owner.shape, [owner]),
            "mean_label": ("I64", label.shape, [label]),
            "mean_count": ("I64", count.shape, [count]),
            "held_out_label": ("I64", labels.shape, [labels]),
            "start": ("F32", start.shape, [start]),
            "deviation": ("F32", deviation.shape, [deviation]),
            "held_out": ("F32", rows.shape, [rows]),
            "network": ("F32", (len(own), len(start)), networks),
            "mean": ("F32", (len(owner), len(deviation)), _means(setup, parts, parts_of)),
        },
    )
    log.info("generators of %d clients, with %d class means: %s", len(clients), len(owner), run_dir / FOLDER)


def _pairs(setup: Setup, parts_of: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Client, class and recordings of every pair with enough of them [M], by client and class."""
    found = []
    for some in parts_of:
        counts = setup.partition.class_counts_of(some, setup.labels, len(setup.class_names))
        place, label = np.nonzero(counts >= setup.config.privacy.min_count)
        found.append(np.stack([some[place], label, counts[place, label]]).astype(np.int64))
    owner, label, count = np.concatenate(found, axis=1) if found else np.zeros((3, 0), dtype=np.int64)
    return owner, label, count


def _means(setup: Setup, parts: Parts, parts_of: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Means of the same pairs, a part of the clients at a time."""
    for some in parts_of:
        rows, counts = setup.partition.rows_of(some)
        inputs, lengths = rows_of(parts, rows)
        labels = lengths.new_tensor(setup.labels[rows])
        data = ClientRows(some, counts, np.arange(len(rows)), inputs, lengths, labels)
        means = class_means(data, inputs, num_classes=len(setup.class_names))
        yield means.mean.cpu().numpy()[means.counts >= setup.config.privacy.min_count]
