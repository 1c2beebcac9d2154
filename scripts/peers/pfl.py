"""pfl-research: SimulatedBackend with FederatedAveraging, in one process, or in several under torchrun (gloo)."""

from __future__ import annotations

import os

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from peers.common import Adapter, Recorder, Work, arguments


class RoundClock(TrainingProcessCallback):
    """Tells the recorder when rounds start and end; counts them."""

    def __init__(self, recorder: Recorder | None, adapter: Adapter):
        self._recorder, self._adapter = recorder, adapter
        self.round_index = 0

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Before the first round."""
        self._start()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """After each round."""
        if self._recorder is not None:
            self._recorder.end_round(self._adapter)
        self.round_index += 1
        self._start()
        return False, Metrics()

    def _start(self) -> None:
        if self._recorder is not None:
            self._recorder.start_round()


def simulate(work: Work, *, cohort: int, rounds: int, recorder: Recorder | None) -> None:
    """Federated averaging over the first `cohort` clients, all of them in every round."""
    adapter = work.adapter()
    adapter.metrics = lambda *batch, **options: {}  # pfl wants to evaluate once in round 1; there is nothing to do
    clock = RoundClock(recorder, adapter)
    model = PyTorchModel(
        model=adapter,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(adapter.parameters(), lr=1.0),
    )
    training_data = FederatedDataset(
        lambda client: Dataset(work.client(client, round_index=clock.round_index), user_id=str(client)),
        get_user_sampler("minimize_reuse", list(range(cohort))),  # each client once per pass over all
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=rounds, train_cohort_size=cohort, val_cohort_size=0
        ),
        SimulatedBackend(training_data=training_data, val_data=training_data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.settings["learning_rate"], local_batch_size=work.batch_size
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
    )


def main() -> None:
    """One process, or one rank of several; the first rank keeps the record and watches torchrun's whole tree."""
    options = arguments()
    work = Work(options.work)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.cohort % processes:
        raise SystemExit(f"--cohort {options.cohort} does not divide into {processes} processes: pfl would train some")
    if int(os.environ.get("RANK", "0")) != 0:
        simulate(work, cohort=options.cohort, rounds=options.rounds, recorder=None)
        return
    name = "pfl" if processes == 1 else f"pfl-{processes}"
    pid = None if processes == 1 else os.getppid()
    with Recorder(name, options, packages=("pfl",), pid=pid) as recorder:
        simulate(work, cohort=options.cohort, rounds=options.rounds, recorder=recorder)


if __name__ == "__main__":
    main()
