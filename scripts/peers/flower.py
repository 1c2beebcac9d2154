"""Flower's simulation: `run_simulation`, one processor per ClientApp, FedAvg without evaluation, a private Ray.

A worker keeps its module and data between messages, which is more than Flower's examples do. The population is the
cohort: Flower's dispatch gets slower with every further node.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from peers.common import Recorder, Work, arguments, worker_trainer


class TimedFedAvg(FedAvg):
    """Flower's FedAvg that tells the recorder when a round starts and ends, and takes no missing client."""

    def __init__(self, recorder: Recorder, work: Work, *, cohort: int):
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=cohort, min_available_nodes=cohort)
        self._recorder, self._cohort, self._adapter = recorder, cohort, work.adapter()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As in FedAvg."""
        self._recorder.start_round()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As in FedAvg, but for the check that all clients are in."""
        replies = list(replies)
        good = sum(not reply.has_error() for reply in replies)
        if good != self._cohort:
            raise RuntimeError(f"round {server_round}: {good} of {self._cohort} clients answered")
        arrays, metrics = super().aggregate_train(server_round, replies)
        self._adapter.load_state_dict(arrays.to_torch_state_dict())
        self._recorder.end_round(self._adapter)
        return arrays, metrics


def train(message: Message, context: Context) -> Message:
    """One client's epoch, in a Ray worker of Flower's."""
    config = message.content["config"]
    trainer = worker_trainer(config["work"])
    trainer.adapter.load_state_dict(message.content["arrays"].to_torch_state_dict())
    count = trainer.train(int(context.node_config["partition-id"]), round_index=int(config["server-round"]) - 1)
    content = {
        "arrays": ArrayRecord(trainer.adapter.state_dict()),
        "metrics": MetricRecord({"num-examples": count}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def main() -> None:
    """Runs the simulation; the ServerApp works in a thread of this process."""
    options = arguments()
    client_app, server_app = ClientApp(), ServerApp()
    client_app.train()(train)
    with Recorder("flower", options, packages=("flwr", "ray")) as recorder:
        work = Work(options.work)

        @server_app.main()
        def serve(grid: Grid, context: Context) -> None:
            TimedFedAvg(recorder, work, cohort=options.cohort).start(
                grid=grid,
                initial_arrays=ArrayRecord(work.adapter().state_dict()),
                num_rounds=options.rounds,
                train_config=ConfigRecord({"work": str(work.folder)}),
            )

        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=options.cohort,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"address": "local", "num_cpus": 2},  # two actors, on any machine
            },
        )


if __name__ == "__main__":
    main()
