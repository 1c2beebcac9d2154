"""What clients measure and train for the generator beside their adapters: told by a broadcast, summed up by blocks.

Everything here comes back as sums: the spread within classes (`within_class`) and the changes of a network that clients
train (`client_generator`). The server uses the cohort's; what arrives is a block's, and a block may hold one client.

Legend: E = S * D numbers of an audio embedding.
"""

from __future__ import annotations

import torch

from fedsim.algorithms.client_generator import PREFIX, averaged, network_of
from fedsim.algorithms.within_class import estimate, merged, next_basis
from fedsim.config.schema import Config
from fedsim.models.generators import residual_vae, uses_covariance
from fedsim.types import AdapterState, Learnt, PooledCovariance


class ClientSums:
    """Asks clients for what the generator needs, and learns from their answers.

    Args:
        config: the run's configuration.
        size: E.
    """

    def __init__(self, config: Config, size: int) -> None:
        self._config, self._size = config, size
        settings = config.feda2v
        used, kind = settings.use_generator and settings.global_model_train, settings.generator_type
        self._trained = settings.clients_train != "none"
        self._measured = self._trained or (used and uses_covariance(kind, settings.generator_rows))
        self._rank = size if kind == "full" else settings.generator_rank

    def extra(self, known: Learnt, round_number: int) -> AdapterState:
        """What clients are told beside the adapter, by name; a network is trained from the first covariance on."""
        # Contiguous, as they come out of a message: a product's bits depend on how its factors lie in memory.
        return {name: tensor.contiguous() for name, tensor in self._extra(known, round_number).items()}

    def _extra(self, known: Learnt, round_number: int) -> AdapterState:
        if not self._measured:
            return {}
        seed = self._config.experiment.seed
        basis = next_basis(known.pooled, size=self._size, rank=self._rank, seed=seed, round_number=round_number)
        if not (self._trained and (known.pooled or known.network)):
            return {"basis": basis}
        # The scale stays that of the first networks: those of clients that were away since are in it too.
        network, deviation = known.network, known.deviation
        if deviation is None:
            assert known.pooled is not None
            network, deviation = self._first_network(known.pooled), residual_vae.deviation(known.pooled)
        return {"basis": basis, "deviation": deviation, **{PREFIX + name: tensor for name, tensor in network.items()}}

    def _first_network(self, pooled: PooledCovariance) -> AdapterState:
        settings, seed = self._config.feda2v, self._config.experiment.seed
        hidden, latent = settings.generator_hidden_dim, settings.generator_latent_dim
        return residual_vae.init(pooled, hidden_dim=hidden, latent_dim=latent, seed=seed)

    @property
    def network_size(self) -> int:
        """Numbers of a network that clients train."""
        nothing = PooledCovariance(torch.zeros(self._size, 1), torch.ones(self._size), 1.0)
        return sum(tensor.numel() for tensor in self._first_network(nothing).values())

    def learn(self, known: Learnt, sums: AdapterState, extra: AdapterState, *, memory: float) -> Learnt:
        """What is known after a round.

        Args:
            known: from earlier rounds.
            sums: the cohort's.
            extra: what its clients were told.
            memory: share of its freedom with which an earlier covariance counts on.
        """
        if "basis" not in extra or not sums:
            return known
        pooled = merged(known.pooled, estimate(sums, extra["basis"]), memory=memory)
        if "deviation" not in extra:
            return self._with_first_network(pooled) if self._trained and pooled else Learnt(pooled, known.network)
        # Where clients keep their own there are no changes to average: newcomers start where the first ones did.
        return Learnt(pooled, averaged(network_of(extra), sums), extra["deviation"])

    def _with_first_network(self, pooled: PooledCovariance) -> Learnt:
        """The first covariance, and the Gaussian of it as a network: one to draw from before any client trains it."""
        return Learnt(pooled, self._first_network(pooled), residual_vae.deviation(pooled))
