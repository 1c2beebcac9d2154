"""A plain PyTorch loop in one process: one module and optimiser for all clients, weights loaded and summed in place."""

from __future__ import annotations

import torch

from peers.common import Recorder, Trainer, arguments


def main() -> None:
    """Federated averaging, client after client."""
    options = arguments()
    with Recorder("plain", options, packages=()) as recorder:
        trainer = Trainer(options.work)
        parameters = list(trainer.adapter.parameters())
        average = [parameter.detach().clone() for parameter in parameters]
        total = [torch.empty_like(parameter) for parameter in average]
        for round_index in range(options.rounds):
            recorder.start_round()
            torch._foreach_zero_(total)
            rows = 0
            for client in range(options.cohort):
                with torch.no_grad():
                    torch._foreach_copy_(parameters, average)
                count = trainer.train(client, round_index=round_index)
                with torch.no_grad():
                    torch._foreach_add_(total, parameters, alpha=count)
                rows += count
            average = [tensor / rows for tensor in total]
            with torch.no_grad():
                torch._foreach_copy_(parameters, average)
            recorder.end_round(trainer.adapter)


if __name__ == "__main__":
    main()
