"""Joins a cluster and says where actors are: `placed.py WHAT ADDRESS PLACEMENT` (see test_placement.py)."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayActorError
from worlds import SERVER_STEP, make_server, tiny_config

from fedsim.cluster.crew import Crew
from fedsim.cluster.handle import RemoteExperiment
from fedsim.cluster.pool import RayPool
from fedsim.cluster.resources import start_ray
from fedsim.config.schema import ActorKind
from fedsim.errors import ResourceError
from fedsim.federation.experiment import RunFiles
from fedsim.federation.setup import Setup, prepare
from fedsim.models.saved import digest
from fedsim.tracking.null_tracker import NullTracker


def all_up(crew: Crew) -> None:
    while crew.starting:
        ready, _ = ray.wait(list(crew.starting), num_returns=1)
        crew.started(ready[0], 1)


def clients(setup: Setup) -> dict[str, object]:
    """Two actors: their nodes, and the digest after a round."""
    pool = RayPool(setup, {"client": ActorKind(actors=2)}, max_attempts=3)
    all_up(pool.crew)
    nodes = sorted(worker.node_id for worker in pool.crew.workers)
    server = make_server(setup, pool=pool)
    server.run_round()
    server.run_round()
    pool.close()
    return {"nodes": nodes, "digest": digest(server.state.adapter)}


def kinds(setup: Setup) -> dict[str, object]:
    """Two small actors and a big one, which is killed after a round: where they were, and the digest of two."""
    pool = RayPool(setup, setup.config.resources.actor_kinds(), max_attempts=3)
    all_up(pool.crew)
    server, found = make_server(setup, pool=pool), {}
    for _ in range(2):
        result = server.run_round()
        all_up(pool.crew)
        found = {worker.name: (worker.node_id, worker.pid) for worker in pool.crew.workers}
        if result.round_number == 1:
            before = found
            os.kill(found["big-2"][1], signal.SIGKILL)
    labels = {node["NodeID"]: node["Labels"].get("size") for node in ray.nodes()}
    pool.close()
    return {
        "sizes": {name: labels[node] for name, (node, _) in found.items()},
        "replaced": found["big-2"] != before["big-2"],
        "digest": digest(server.state.adapter),
    }


def quarantine(setup: Setup) -> dict[str, object]:
    """An actor that dies each time: where, what is told, and where the next one is."""
    pool = RayPool(setup, {"client": ActorKind(actors=1)}, max_attempts=1)
    faults, nodes = [], []
    for _ in range(3):
        all_up(pool.crew)
        if not len(pool.crew):
            return {"nodes": nodes, "faults": faults}
        (worker,) = pool.crew.workers
        nodes.append(worker.node_id)
        if len(nodes) < 3:
            os.kill(worker.pid, signal.SIGKILL)
            try:
                ray.get(worker.actor.ready.remote())
            except RayActorError as error:
                faults += [fault.kind for fault in pool.crew.bury(worker, error, 1, None)]
    server = make_server(setup, pool=pool)
    server.run_round()
    server.run_round()
    pool.close()
    return {"nodes": nodes, "faults": faults, "digest": digest(server.state.adapter)}


def server(setup: Setup) -> dict[str, object]:
    """A server with a GPU of its own, killed in between: its node, what is free beside it, and a rival's refusal."""
    files = RunFiles(run_dir=Path(tempfile.mkdtemp()), checkpoint_every=1, last_round=4, keep_last=None, keep_best=None)
    made = RemoteExperiment(setup, files, NullTracker(), state=None, status=lambda _: None)
    made.round()
    before = (made._where.node_id, made._where.pid)
    try:
        RemoteExperiment(setup, files, NullTracker(), state=None, status=lambda _: None)
        refused = ""
    except ResourceError as error:
        refused = str(error)
    os.kill(made._where.pid, signal.SIGKILL)
    # The killed actor's GPU isn't free for others meanwhile.
    free, end = [], time.monotonic() + 3
    while time.monotonic() < end:
        free.append(ray.available_resources().get("GPU", 0.0))
        time.sleep(0.05)
    result = made.round()
    after = (made._where.node_id, made._where.pid)
    made.close()
    return {
        "before": before,
        "after": after,
        "free": max(free),
        "refused": refused,
        "faults": [f.kind for f in result.faults],
    }


def moved(setup: Setup) -> dict[str, object]:
    """A server whose node dies: the nodes of both, and the digest of the whole run."""
    run_dir = Path(tempfile.mkdtemp())
    files = RunFiles(run_dir=run_dir, checkpoint_every=1, last_round=4, keep_last=None, keep_best=None)
    made = RemoteExperiment(setup, files, NullTracker(), state=None, status=lambda _: None)
    made.round()
    before = made._where.node_id
    psutil.Process(made._where.pid).parent().kill()  # the raylet
    faults = [fault.kind for _ in range(3) for fault in made.round().faults]
    result = made.finish("FINISHED")
    made.close()
    return {"before": before, "after": made._where.node_id, "faults": faults, "digest": result["digest"]}


if __name__ == "__main__":
    what, address, placement = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    more = {
        "clients": [],
        "quarantine": [],
        "kinds": ["resources.more_actors.big={actors: 1, cpus: 3, labels: {size: big}}"],
    }
    more = more.get(what, ["resources.server_gpus=1"])
    config = tiny_config(*SERVER_STEP, f"resources.placement={placement}", "resources.client_actors=2", *more)
    start_ray(address=address, num_cpus=None, num_gpus=None)
    found = {"clients": clients, "kinds": kinds, "quarantine": quarantine, "server": server, "moved": moved}[what](
        prepare(config)
    )
    print(json.dumps(found))
