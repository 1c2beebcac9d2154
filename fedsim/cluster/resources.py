"""Starting or joining Ray, and refusing what can't fit: an actor that doesn't fit would wait for ever in silence."""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from fedsim.cluster.ray_folder import RayFolder, make_ray_folder, remove_dead_folders
from fedsim.cluster.shipping import code_for_nodes
from fedsim.config.schema import PLAIN_ACTORS, ActorKind
from fedsim.errors import ResourceError
from fedsim.machine import memory_limit, usable_memory, whole_cores

log = logging.getLogger(__name__)

NODES_SHOWN = 16
STORE_SHARE, LEAST_STORE_BYTES = 0.3, 80 * 2**20
"""Ray's own default, and somewhat more than the least it takes; by itself it looks at a container's top group only."""
MOST_ON_DISK = 10**10
"""Bytes of a store that Ray keeps in its folder where shared memory is too small for it."""
ACTOR_ENVIRONMENT = {
    # One thread an actor: parallelism comes from actors, and sums keep their order.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


Bundle = dict[str, Any]
"""CPU and GPU in numbers, and labels: what an actor takes, or what is free on a node."""


@dataclass(frozen=True)
class Demand:
    """CPUs and GPUs of one server actor and of all client actors.

    Attributes:
        kinds: the client actors by the name of their kind.
        server_cpus, server_gpus: of the server actor.
    """

    kinds: Mapping[str, ActorKind]
    server_cpus: float
    server_gpus: float

    def total(self, resource: str) -> float:
        """CPU or GPU of all actors together."""
        parts = [(1, self.server_cpus, self.server_gpus), *((k.actors, k.cpus, k.gpus) for k in self.kinds.values())]
        return sum(actors * (cpus if resource == "CPU" else gpus) for actors, cpus, gpus in parts)

    def bundles(self) -> list[Bundle]:
        """Resources of every actor, the server first; `labels` where its node must have some."""
        found: list[Bundle] = [{"CPU": self.server_cpus, "GPU": self.server_gpus}]
        for kind in self.kinds.values():
            bundle: Bundle = {"CPU": kind.cpus, "GPU": kind.gpus}
            found += [bundle | {"labels": kind.labels} if kind.labels else bundle] * kind.actors
        return found


@dataclass(frozen=True)
class Connection:
    """A Ray that this process has joined, or started.

    Attributes:
        folder: of a Ray that it has started.
    """

    folder: RayFolder | None = None


def start_ray(*, address: str | None, num_cpus: int | None, num_gpus: int | None) -> Connection | None:
    """Start a private Ray on this machine, or join a cluster when an address is given (or RAY_ADDRESS is set).

    Inside a Ray process (a Tune trial, a job) that is already connected nothing is started.

    Args:
        address: of the cluster to join; None for RAY_ADDRESS, else a private Ray.
        num_cpus: CPUs a private Ray is told of; None for those that this process may use.
        num_gpus: GPUs a private Ray is told of; None lets it look.

    Returns:
        What the caller must hand to `stop_ray`; None where Ray was connected before.

    Raises:
        ResourceError: the cluster can't be reached, or no Ray starts here.
    """
    if ray.is_initialized():
        return None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        try:
            ray.init(address=address, runtime_env=code_for_nodes(), **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ResourceError(f"no Ray cluster answers at {address!r}: {error}".splitlines()[0]) from error
        return Connection()
    remove_dead_folders()
    folder = make_ray_folder()
    try:
        ray.init(
            address="local",
            num_cpus=whole_cores() if num_cpus is None else num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=_store_bytes(),
            _temp_dir=str(folder.path),
            # Events of tasks, 100,000 of them, are for a dashboard, which isn't there: a leak of some MB otherwise.
            _system_config={"task_events_report_interval_ms": 0},
            **quiet,
        )
    except Exception as error:  # Ray raises bare ones where its processes don't come up in time
        ray.shutdown()
        raise ResourceError(
            f"Ray can't be started on this machine (logs in {folder.path}): {' '.join(str(error).split())[:200]}; try "
            "again when it is less busy, or train in this process with resources.client_actors: 0"
        ) from error
    return Connection(folder)


def stop_ray(connection: Connection) -> None:
    """Disconnect, and remove a private Ray's folder."""
    ray.shutdown()
    if connection.folder is not None:
        connection.folder.remove()


def _store_bytes() -> int | None:
    """Ray's share of memory for its object store, of what a control group allows; None where Ray sees all there is.

    Ray refuses to be told of more than /dev/shm holds, but takes up to `MOST_ON_DISK` to its folder instead.
    """
    if memory_limit() is None:
        return None
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    most = max(MOST_ON_DISK, int(0.95 * shared))
    return max(min(int(STORE_SHARE * usable_memory()), most), LEAST_STORE_BYTES)


def _check_answers(address: str) -> None:
    """Refuse a host and port where nobody listens at once; Ray itself would go on trying for minutes."""
    host, _, port = address.partition(":")
    if not port.isdigit():
        return  # "auto", ray://..., or a name that Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ResourceError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error


def check_fits(demand: Demand) -> None:
    """Refuse a demand that the nodes' free resources can't hold, naming both numbers.

    GPUs are placed one by one: an actor with a fraction of a GPU needs that fraction free on one GPU.

    Raises:
        ResourceError: it doesn't fit.
    """
    nodes = free_by_node()
    free = list(nodes.values())
    for resource, keys in (
        ("CPU", "resources.client_actors, client_cpus or server_cpus"),
        ("GPU", "resources.client_actors, client_gpus or server_gpus"),
    ):
        wanted, there = demand.total(resource), sum(node[resource] for node in free)
        if wanted > there + 1e-6:
            raise ResourceError(
                f"the actors ask for {wanted:g} {resource}s ({_sum(demand, resource)}) but Ray has {there:g} free"
                f"{f' ({described_nodes(nodes)})' if len(nodes) > 1 else ''}; "
                f"lower {keys}, or join a larger cluster with --address"
            )
    bundles = demand.bundles()
    unplaced = place(bundles, free)
    if unplaced is not None:
        raise ResourceError(
            f"no node can hold an actor of {_describe(unplaced)} beside the others: {len(bundles)} actors ask for "
            f"{', '.join(sorted({_describe(bundle) for bundle in bundles}))}; free are {described_nodes(nodes)}"
        )


def cluster_resources() -> Mapping[str, float]:
    """All CPUs and GPUs of the Ray that is connected, by name, free or not."""
    return {name: float(ray.cluster_resources().get(name, 0.0)) for name in ("CPU", "GPU")}


def free_by_node() -> dict[str, Bundle]:
    """CPUs and GPUs that are free, and labels, by the nodes' names for people."""
    available = ray._private.state.available_resources_per_node()
    return {
        f"{node['NodeManagerHostname']} {node['NodeManagerAddress']} ({node['NodeID'][:8]})": {
            "CPU": float(available.get(node["NodeID"], {}).get("CPU", 0.0)),
            "GPU": float(available.get(node["NodeID"], {}).get("GPU", 0.0)),
            "labels": node["Labels"],
        }
        for node in ray.nodes()
        if node["Alive"]
    }


def described_nodes(free: Mapping[str, Bundle] | None = None) -> str:
    """What every node has free, in one line."""
    free = free_by_node() if free is None else free
    shown = [f"{_amounts(resources)} on {name}" for name, resources in free.items()]
    more = f"; and {len(shown) - NODES_SHOWN} more nodes" if len(shown) > NODES_SHOWN else ""
    return "; ".join(shown[:NODES_SHOWN]) + more or "no nodes"


def _sum(demand: Demand, resource: str) -> str:
    parts = [f"server {demand.server_cpus if resource == 'CPU' else demand.server_gpus:g}"]
    for name, kind in demand.kinds.items():
        named = "clients" if name == PLAIN_ACTORS else name
        parts.append(f"{kind.actors} {named} x {kind.cpus if resource == 'CPU' else kind.gpus:g}")
    return " + ".join(parts)


def _describe(bundle: Bundle) -> str:
    labels = ", ".join(f"{name}={value}" for name, value in bundle.get("labels", {}).items())
    return f"{_amounts(bundle)}{labels and f' with {labels}'}"


def _amounts(bundle: Bundle) -> str:
    return f"{bundle['CPU']:g} CPU, {bundle['GPU']:g} GPU"


def precedence(cpus: float, gpus: float, labels: Mapping[str, str] | None) -> tuple[bool, float, float]:
    """Sorts actors: those that can't go everywhere come first, then large ones: later they would find no place."""
    return not labels, -gpus, -cpus


def place(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> Bundle | None:
    """First-fit placement on nodes of free resources; returns the first bundle that finds no place, or None."""
    cpus = [node["CPU"] for node in nodes]
    gpus = [[1.0] * int(node["GPU"]) + [node["GPU"] % 1] * (node["GPU"] % 1 > 0) for node in nodes]
    for bundle in sorted(bundles, key=lambda b: precedence(b["CPU"], b["GPU"], b.get("labels"))):
        for node in range(len(nodes)):
            if not bundle.get("labels", {}).items() <= nodes[node].get("labels", {}).items():
                continue
            slots = _gpu_slots(gpus[node], bundle["GPU"])
            if cpus[node] + 1e-6 >= bundle["CPU"] and slots is not None:
                cpus[node] -= bundle["CPU"]
                for slot in slots:
                    gpus[node][slot] -= min(bundle["GPU"], 1.0)
                break
        else:
            return bundle
    return None


def _gpu_slots(free: Sequence[float], wanted: float) -> list[int] | None:
    """GPUs of one node that hold `wanted` (a fraction of one, or whole ones); None when they don't."""
    each, count = (wanted, 1) if wanted <= 1 else (1.0, math.ceil(wanted))
    if wanted == 0:
        return []
    fitting = [slot for slot, share in enumerate(free) if share + 1e-6 >= each]
    return fitting[:count] if len(fitting) >= count else None
