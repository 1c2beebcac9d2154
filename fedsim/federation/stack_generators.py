"""The generators of a stack's clients: trained in a round, and what local training draws synthetic rows from."""

from __future__ import annotations

import numpy as np
import torch

from fedsim.algorithms.augmentation import StackGenerator, least_values, most_rows
from fedsim.algorithms.batches import ClientRows
from fedsim.algorithms.client_generator import ClientGenerators, class_means, network_of, stack_of
from fedsim.algorithms.local_training import LocalTraining
from fedsim.config.schema import Config
from fedsim.federation.setup import Setup
from fedsim.types import AdapterState, Broadcast


def generator_training(config: Config) -> LocalTraining:
    """How clients train generators, from the configuration."""
    settings = config.feda2v
    return LocalTraining(
        optimizer="AdamW",
        learning_rate=settings.generator_learning_rate or config.training.learning_rate,
        batch_size=config.training.batch_size,
        weight_decay=1e-4,
        momentum=0.0,
        clip_norm=5.0,
        local_epochs=settings.generator_epochs or settings.global_model_train_epochs,
    )


class StackGenerators:
    """Trains the generators of stacks; holds buffers, never client state.

    Args:
        setup: what the driver prepared.
    """

    def __init__(self, setup: Setup) -> None:
        self._config, self._num_classes = setup.config, len(setup.class_names)
        self._trainer = ClientGenerators(generator_training(setup.config), min_count=setup.config.privacy.min_count)

    def costs(self, broadcast: Broadcast) -> tuple[int, int]:
        """Rows that come to a full batch of recordings, and numbers of a generator that a client holds for itself."""
        network, config = network_of(broadcast.extra), self._config
        rows = most_rows(config.training.augmentation, config.training.batch_size) if network else 0
        own = config.feda2v.clients_train == "own"
        return rows, sum(tensor.numel() for tensor in network.values()) if own else 0

    def train(
        self, data: ClientRows, broadcast: Broadcast
    ) -> tuple[AdapterState, np.ndarray | None, StackGenerator | None]:
        """Train the generators of K clients.

        Returns:
            Sums of changes (shared), flat networks, a row each (own), and what clients draw rows from, where they do:
            the network that is shared as it was broadcast, their own as it is now.
        """
        device = data.inputs.device
        network = {name: tensor.to(device) for name, tensor in network_of(broadcast.extra).items()}
        if not network:
            return {}, None, None
        embeddings = data.inputs.index_select(0, torch.from_numpy(data.rows).to(device))
        deviation = broadcast.extra["deviation"].to(device)
        sums, own = self._trainer.train(
            data,
            embeddings,
            network=network,
            deviation=deviation,
            seed=broadcast.seed,
            round_number=broadcast.round_number,
        )
        training = self._config.training
        if not (training.augmentation and self._config.federation.local_epochs):
            return sums, own, None
        means = class_means(data, embeddings, num_classes=self._num_classes)
        draws = StackGenerator(
            client=data.client,
            pairs=torch.from_numpy(means.pairs).to(device),
            mean=means.mean,
            least=least_values(means, clients=len(data), num_classes=self._num_classes),
            params={n: t.unsqueeze(0) for n, t in network.items()} if own is None else stack_of(own, network),
            deviation=deviation,
            num_classes=self._num_classes,
            seed=broadcast.seed,
            purpose="augmentation",
            round_number=broadcast.round_number,
            share=training.augmentation,
            batch_size=training.batch_size,
        )
        return sums, own, draws
