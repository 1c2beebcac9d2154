"""What a first attempt with Ray looks like: one actor for each client, one call per client and round, average here."""

from __future__ import annotations

import numpy as np
import ray
import torch

from peers.common import Recorder, Trainer, Work, arguments


@ray.remote
class Client:
    """A client that lives in a process of its own."""

    def __init__(self, folder: str, client: int):
        self._trainer = Trainer(folder)
        self._client = client

    def train(self, weights: dict[str, np.ndarray], round_index: int) -> tuple[dict[str, np.ndarray], int]:
        """One epoch from `weights`; returns the new ones and the number of rows."""
        # Ray's arrays are read-only views of shared memory, so they are copied; load_state_dict copies in place.
        self._trainer.adapter.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        count = self._trainer.train(self._client, round_index=round_index)
        return {name: tensor.numpy() for name, tensor in self._trainer.adapter.state_dict().items()}, count


def main() -> None:
    """Federated averaging over one actor per client."""
    options = arguments()
    with Recorder("naive-ray", options, packages=("ray",)) as recorder:
        ray.init(address="local", include_dashboard=False, configure_logging=False)
        adapter = Work(options.work).adapter()
        clients = [Client.remote(str(options.work), client) for client in range(options.cohort)]
        for round_index in range(options.rounds):
            recorder.start_round()
            weights = ray.put({name: tensor.numpy() for name, tensor in adapter.state_dict().items()})
            updates = ray.get([client.train.remote(weights, round_index) for client in clients])
            rows = sum(count for _, count in updates)
            average = {name: sum(update[name] * (count / rows) for update, count in updates) for name in updates[0][0]}
            adapter.load_state_dict({name: torch.from_numpy(array) for name, array in average.items()})
            recorder.end_round(adapter)
        ray.shutdown()


if __name__ == "__main__":
    main()
