"""What clients keep between rounds, tensors and generators of their own: sent with blocks, taken back, committed.

Either lies in a client store in the run directory: `clients/` (adapters where the aggregator keeps clients apart, else
control variates) and `clients/client_generators/` (`feda2v.client_generator: own`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedsim.algorithms.client_generator import network_of
from fedsim.errors import ConfigError
from fedsim.federation.checkpoint import CLIENTS, GENERATORS, ServerState, kept_indices
from fedsim.federation.client_store import ClientStore
from fedsim.federation.gathering import OwnBlocks
from fedsim.federation.saved_generators import open_pretrained
from fedsim.federation.setup import Setup
from fedsim.types import Block, BlockUpdate, Broadcast, Learnt, flatten_state

log = logging.getLogger(__name__)

AT_ONCE = 1024
"""Clients whose networks are read together."""


class KeptByClients:
    """The stores of a run, as far as there are any.

    Args:
        folder: the run directory.
        state: where the rows of the last finished round lie.
        own, network: numbers of a client's own tensors and of its generator; 0: it keeps none.
        variates: its own tensors are control variates, which begin at zero.

    Raises:
        CheckpointError: rows of `state` are missing.
    """

    def __init__(self, folder: Path, state: ServerState, *, own: int, network: int, variates: bool) -> None:
        self._folder, self._variates = folder, variates
        self.own: ClientStore | None = None
        self.generators: ClientStore | None = None
        if own:
            self.own = ClientStore(folder / CLIENTS, own, index=state.clients, kept=kept_indices(folder))
        if network:
            kept, place = kept_indices(folder, GENERATORS), folder / CLIENTS / GENERATORS
            self.generators = ClientStore(place, network, index=state.generators, kept=kept)

    def pretrained(self, state: ServerState, setup: Setup) -> ServerState:
        """A new run's state with the generators that its clients start from, where they have any.

        Raises:
            ConfigError: they don't fit (see `open_pretrained`).
        """
        saved = open_pretrained(setup.config, class_names=setup.class_names, num_clients=setup.partition.num_clients)
        if saved is None:
            return state
        if (made := saved.info["audio_encoder_used"]) != (used := setup.used["audio_encoder"]):
            raise ConfigError(
                f"feda2v.pretrained_generators: {saved.folder} was made with {made}, here the audio encoder is {used}"
            )
        if self.generators is not None and saved.info["partition"] != setup.partition.fingerprint:
            log.warning("%s: clients had other recordings when these generators were trained", saved.folder)
        if self.generators is not None:
            for first in range(0, len(saved.clients), AT_ONCE):
                some = saved.clients[first : first + AT_ONCE]
                self.generators.put(some, saved.rows("network", first, first + len(some)))
        return self.commit(replace(state, learnt=Learnt(network=saved.start, deviation=saved.deviation)))

    @property
    def _stores(self) -> list[ClientStore]:
        return [store for store in (self.own, self.generators) if store is not None]

    def blocks(self, blocks: Sequence[Block], broadcast: Broadcast) -> Sequence[Block]:
        """Blocks as they are sent: with what their clients keep; newcomers get what is broadcast."""
        for store in self._stores:
            store.discard()  # what a round that failed has left
        if self.own is not None:
            first = flatten_state(broadcast.adapter).numpy()
            blocks = OwnBlocks(blocks, self.own, np.zeros_like(first) if self._variates else first)
        if self.generators is not None and (network := network_of(broadcast.extra)):
            blocks = OwnBlocks(blocks, self.generators, flatten_state(network).numpy(), field="generators")
        return blocks

    def add(self, update: BlockUpdate) -> None:
        """Take a block's variates and generators; they count from the next commit on. Lost clients keep theirs."""
        if self.own is not None and update.kept is not None:
            self.own.put(update.metrics.client, update.kept)
        if self.generators is not None and update.generators is not None:
            self.generators.put(update.metrics.client, update.generators)

    def commit(self, state: ServerState) -> ServerState:
        """The state of a finished round with where its rows lie."""
        if self.own is not None:
            state = replace(state, clients=self.own.commit())
        if self.generators is not None:
            state = replace(state, generators=self.generators.commit())
        return state

    def flush(self, run_dir: Path) -> None:
        """Return when everything is on the disk.

        Raises:
            ValueError: the rows lie in another run directory.
        """
        if self._stores and run_dir != self._folder:
            raise ValueError(f"clients keep their tensors in {self._folder}, a checkpoint in {run_dir} lacks them")
        for store in self._stores:
            store.flush()

    def pin(self, state: ServerState) -> None:
        """Keep the rows of a state for good: a checkpoint refers to them."""
        if self.own is not None:
            self.own.pin(state.clients)
        if self.generators is not None:
            self.generators.pin(state.generators)

    def release(self) -> None:
        """Let go of rows that neither a checkpoint nor the last finished round refers to."""
        for store, name in ((self.own, CLIENTS), (self.generators, GENERATORS)):
            if store is not None:
                store.keep_only(kept_indices(self._folder, name))

    def close(self) -> None:
        """Close the files; they open again on use."""
        for store in self._stores:
            store.close()
