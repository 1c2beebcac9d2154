"""`oracle`, an upper bound for studies: the clients' training recordings themselves, as a generator is fitted on them.

No federation may do this; a simulation can, and shows how much a perfect generator would bring.
"""

from __future__ import annotations

import numpy as np

from fedsim.algorithms.client_model import embed
from fedsim.federation.parts import Parts, rows_of
from fedsim.federation.setup import Setup
from fedsim.types import AdapterState, ClassStats

CLIENTS_AT_ONCE = 65_536


def held_rows(setup: Setup) -> np.ndarray:
    """Rows of the store that some client holds, ascending."""
    clients = np.arange(setup.partition.num_clients)
    parts = np.split(clients, range(CLIENTS_AT_ONCE, len(clients), CLIENTS_AT_ONCE))
    return np.unique(np.concatenate([np.unique(setup.partition.rows_of(part)[0]) for part in parts]))


def recordings_as_statistics(setup: Setup, parts: Parts, state: AdapterState) -> ClassStats:
    """Every recording that a client holds as a class mean of one: [n, S, D] under the encoder of `state`."""
    rows = held_rows(setup)
    embeddings = embed(parts.model, state, *rows_of(parts, rows))
    labels, ones = setup.labels[rows], np.ones(len(rows), dtype=np.int64)
    return ClassStats(np.zeros(len(rows), dtype=np.int64), labels, ones, embeddings, None, {})
