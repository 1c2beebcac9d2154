"""Where actors go: the server's own bundle, held for the whole run, and client actors packed or spread over nodes.

The server's bundle is a placement group, so what it needs stays its own while it is restarted, also when another run
of the cluster looks for a GPU. Client actors aren't in the group: a bundle on a node in quarantine would wait there,
and bundles of a node that died would all wait for room for all, while single actors start wherever there is room.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from fedsim.cluster.resources import ACTOR_ENVIRONMENT, described_nodes
from fedsim.config.schema import ActorKind
from fedsim.errors import ResourceError

log = logging.getLogger(__name__)
START_S = 60.0
"""The resources were free a moment ago: somebody else has taken them if the bundle finds no place by now."""
RESTART_S = 600.0
"""A node that died takes its time to come back."""
TELL_S = 60.0


class ServerPlace:
    """Where the server actor lives: its own bundle; the driver's node where it takes nothing; a trial's group.

    Args:
        cpus, gpus: of the server actor.
    """

    def __init__(self, *, cpus: float, gpus: float) -> None:
        self._cpus, self._gpus, self._waited = cpus, gpus, False
        self._group: PlacementGroup | None = None
        bundle = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        # Inside a placement group (a Tune trial) the group already holds what the actors need.
        self._captured = ray.util.get_current_placement_group() is not None
        if bundle and not self._captured:
            self._group = placement_group([bundle], strategy="STRICT_PACK", name="fedsim server")

    def strategy(self) -> Any:
        """Ray's scheduling strategy for the server actor, once there is room for it.

        Raises:
            ResourceError: there is none in time.
        """
        if self._captured:
            return None
        if self._group is None:
            # The run directory lies where the driver is.
            return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._wait(self._group, RESTART_S if self._waited else START_S)
        self._waited = True
        return PlacementGroupSchedulingStrategy(self._group, placement_group_capture_child_tasks=False)

    def _wait(self, group: PlacementGroup, limit: float) -> None:
        start = told = time.monotonic()
        while not group.wait(1):
            now = time.monotonic()
            lacking = f"no node has room for the server actor ({self._cpus:g} CPU, {self._gpus:g} GPU)"
            if now - start > limit:
                self.close()
                raise ResourceError(
                    f"{lacking} after {limit:g} s; free are {described_nodes()}; lower resources.server_cpus or "
                    "server_gpus, or go on when others have finished"
                )
            if now - told > TELL_S:
                told = now
                log.warning("%s: waiting; free are %s", lacking, described_nodes())

    def close(self) -> None:
        """Give the bundle back."""
        if self._group is not None and ray.is_initialized():
            remove_placement_group(self._group)
        self._group = None


def client_options(kind: ActorKind, placement: Literal["pack", "spread"]) -> dict[str, Any]:
    """Ray's options of client actors: what each takes, and where they go, unless a trial's placement group decides."""
    environment = {"env_vars": ACTOR_ENVIRONMENT}
    options: dict[str, Any] = {
        "num_cpus": kind.cpus,
        "num_gpus": kind.gpus,
        "max_restarts": 0,
        "runtime_env": environment,
    }
    if kind.labels:
        options["label_selector"] = dict(kind.labels)
    if ray.get_runtime_context().should_capture_child_tasks_in_placement_group:
        return options
    return options | {"scheduling_strategy": {"pack": "DEFAULT", "spread": "SPREAD"}[placement]}
