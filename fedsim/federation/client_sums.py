"""What clients measure and train for the generator beside their adapters: told by a broadcast, summed up by blocks.

Everything here comes back as sums over the cohort, never per client: the spread within classes (`within_class`) and the
changes of a network that clients train (`client_generator`).

Legend: E = S * D numbers of an audio embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.algorithms.client_generator import PREFIX, averaged
from fedsim.algorithms.within_class import estimate, merged, next_basis
from fedsim.config.schema import Config
from fedsim.models.generators import residual_vae, trained_by_clients, uses_covariance
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
        self._trained = used and trained_by_clients(kind)
        self._measured = used and uses_covariance(kind, settings.generator_rows)
        self._rank = size if kind == "full" else settings.generator_rank

    def start(self) -> Learnt:
        """What is known before round 1."""
        if not self._trained:
            return Learnt()
        settings = self._config.feda2v
        return Learnt(
            network=residual_vae.init(
                size=self._size,
                hidden_dim=settings.generator_hidden_dim,
                latent_dim=settings.generator_latent_dim,
                seed=self._config.experiment.seed,
            )
        )

    def extra(self, known: Learnt, round_number: int) -> AdapterState:
        """What clients are told beside the adapter, by name; a network is trained once its scale is known."""
        if not self._measured:
            return {}
        seed = self._config.experiment.seed
        basis = next_basis(known.pooled, size=self._size, rank=self._rank, seed=seed, round_number=round_number)
        if not (self._trained and known.pooled):
            return {"basis": basis}
        network = {PREFIX + name: tensor for name, tensor in known.network.items()}
        return {"basis": basis, "deviation": deviation(known.pooled), **network}

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
            return Learnt(pooled, known.network)
        return Learnt(pooled, averaged(known.network, sums), extra["deviation"])


def deviation(pooled: PooledCovariance) -> Tensor:
    """Standard deviation within classes of every coordinate [E], floored so that constant ones stay finite."""
    found = pooled.variance.sqrt()
    return found.clamp(min=float(found.mean()) * 0.01 + torch.finfo(torch.float32).tiny)
