"""The Ray actor that runs the server."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
import torch

from fedsim.cluster.pool import RayPool
from fedsim.cluster.shipping import check_server_sees, with_store_here
from fedsim.federation.checkpoint import ServerState
from fedsim.federation.experiment import Experiment, RunFiles
from fedsim.federation.parts import choose_device
from fedsim.federation.server import Server
from fedsim.federation.setup import Setup
from fedsim.federation.tracker import Tracker
from fedsim.types import Fault, RoundResult


class ServerActor:
    """Runs the experiment in an actor of its own; the driver sees numbers only.

    Needs `max_concurrency=2`, so that `poll` answers while a round runs.
    """

    def __init__(
        self,
        setup: Setup,
        files: RunFiles,
        tracker: Tracker,
        state: ServerState | None,
        gpus: float,
        log_level: int,
        faults: Sequence[Fault] = (),
    ) -> None:
        self._status: Mapping[str, Any] = {}
        self._records: deque[tuple[str, int, str]] = deque()
        self._capture_logs(log_level)
        self._make = partial(self._experiment_of, setup, files, tracker, state, gpus, faults)

    def _experiment_of(
        self,
        setup: Setup,
        files: RunFiles,
        tracker: Tracker,
        state: ServerState | None,
        gpus: float,
        faults: Sequence[Fault],
    ) -> Experiment:
        check_server_sees(setup, files.run_dir)
        resources, setup = setup.config.resources, with_store_here(setup) or setup
        pool = RayPool(setup, resources.actor_kinds(), max_attempts=resources.max_attempts)
        device = choose_device(gpus)
        server = Server(setup, pool, device=device, state=state, status=self._set_status, run_dir=files.run_dir)
        tracker.start()
        return Experiment(server, files, tracker, faults)

    def _set_status(self, status: Mapping[str, Any]) -> None:
        self._status = dict(status)

    def _capture_logs(self, level: int) -> None:
        """Keep log records for the driver, which prints them; Ray would add a prefix and reorder them."""
        records = self._records

        class Keep(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                records.append((record.name, record.levelno, record.getMessage()))

        logger = logging.getLogger("fedsim")
        logger.setLevel(level)
        logger.addHandler(Keep())
        logger.propagate = False

    def ready(self) -> tuple[str, str, int]:
        """Build the experiment; not in the constructor, whose errors Ray turns into a death without a cause.

        Returns:
            Where it lives: node id, address, process id.
        """
        torch.set_num_threads(1)
        self._experiment = self._make()
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid()

    def poll(self) -> tuple[Mapping[str, Any], list[tuple[str, int, str]]]:
        """The status and the log records (name, level, text) since the last call."""
        records = [self._records.popleft() for _ in range(len(self._records))]
        return self._status, records

    def round(self) -> RoundResult:
        """Run the next round."""
        return self._experiment.round()

    def finish(self, status: str) -> dict[str, Any]:
        """Write the results."""
        return self._experiment.finish(status)

    def stop(self) -> None:
        """Write a checkpoint of the last finished round, while the next one is under way."""
        self._experiment.stop()

    def close(self) -> None:
        """End the client actors."""
        self._experiment.close()
