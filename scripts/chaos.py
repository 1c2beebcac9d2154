#!/usr/bin/env python
"""Breaks real runs and checks that they end with the digest of the calm run: the table of docs/reliability.md.

Every line is whole runs of the command line in processes of their own, with Ray, SQLite MLflow and a VAE, of which
something is killed, stopped or starved in mid-round:

    python scripts/chaos.py --times 5                     # all faults
    python scripts/chaos.py --times 1 client server       # some
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from driven_runs import SETTINGS, Run, words

HEALTH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_AUTH_MODE": "disabled",
}


def actors(kind: str, root: int) -> list[psutil.Process]:
    """Processes of the actors of a class below a process."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if any(f"ray::{kind}" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def start(folder: Path, settings: dict[str, object] | None = None) -> list[str]:
    """The words of a `fedsim run` of two client actors, with other settings on top."""
    return words(folder, SETTINGS | {"resources.num_cpus": 2, "resources.client_actors": 2} | (settings or {}))


def strike_actor(kind: str, number: int) -> Callable[[Path], tuple[Run, dict]]:
    """A signal to one of the actors of a class."""

    def strike(folder: Path) -> tuple[Run, dict]:
        run = Run(folder, start(folder, settings={"resources.block_timeout": 5}))
        run.wait_for_round(random.randint(1, 4))
        os.kill(random.choice(actors(kind, run.process.pid)).pid, number)
        return run, {}

    return strike


def strike_driver(folder: Path) -> tuple[Run, dict]:
    """The driver is killed, everything that it started goes with it, and a resume ends the run."""
    run = Run(folder, start(folder))
    run.wait_for_round(random.randint(1, 4))
    family = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    struck = time.monotonic()
    _, left = psutil.wait_procs(family, timeout=60)
    gone = time.monotonic() - struck
    if left:
        raise SystemExit(f"processes outlive their driver: {[process.name() for process in left]}")
    again = time.monotonic()
    resumed = Run(folder, ["resume", str(folder)])
    before = len(resumed.rounds())
    while len(resumed.rounds()) <= before and resumed.process.poll() is None:
        time.sleep(0.05)
    return resumed, {
        "seconds": time.monotonic() - again,
        "note": f"all {len(family)} processes gone after {gone:.1f} s",
    }


def strike_memory(folder: Path) -> tuple[Run, dict]:
    """The node runs out of memory by a balloon, whose size is what is needed until Ray kills an actor."""
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available) / memory.total + 0.08
    environment = {"RAY_memory_usage_threshold": f"{limit:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    run = Run(folder, start(folder), environment)
    run.wait_for_round(random.randint(1, 3))
    balloon, step = [], 64 * 2**20
    while "out of memory" not in run.text and len(balloon) * step < 0.3 * memory.total:
        balloon.append(bytearray(os.urandom(1024)) * (step // 1024))
        time.sleep(0.05)
    return run, {"note": f"balloon of {len(balloon) * step / 2**30:.1f} GB"}


def strike_node(folder: Path, *, joins: bool = False) -> tuple[Run, dict]:
    """Two nodes of two actors beside a head without CPUs; the raylet of one is killed."""
    os.environ.update(HEALTH)
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    nodes = [cluster.add_node(num_cpus=2, **memory) for _ in range(2)]
    try:
        settings = {"resources.client_actors": 4, "resources.num_cpus": "null", "resources.address": cluster.address}
        run = Run(folder, start(folder, settings=settings), HEALTH)
        run.wait_for_round(random.randint(1, 3))
        cluster.remove_node(random.choice(nodes), allow_graceful=False)
        if joins:
            run.wait_for_round(len(run.rounds()) + 1)
            cluster.add_node(num_cpus=2, **memory)
        run.end()
        back = len(re.findall(r"client actor \S+ is up again", run.text))
        return run, {"note": f"{back} actors started on the node that joined"} if joins else {}
    finally:
        cluster.shutdown()


FAULTS: dict[str, tuple[str, Callable[[Path], tuple[Run, dict]]]] = {
    "client": ("client actor, `kill -9`", strike_actor("ClientActor", signal.SIGKILL)),
    "hang": ("client actor, `kill -STOP`, `block_timeout: 5`", strike_actor("ClientActor", signal.SIGSTOP)),
    "memory": ("actor killed for memory", strike_memory),
    "server": ("server actor, `kill -9`", strike_actor("ServerActor", signal.SIGKILL)),
    "driver": ("driver, `kill -9`, then `fedsim resume`", strike_driver),
    "node": ("raylet of one of two nodes, `kill -9`", strike_node),
    "join": ("the same, and another node joins", lambda folder: strike_node(folder, joins=True)),
}
LATER = re.compile(r"is done by \S+, ([\d.]+) s later|up again, ([\d.]+) s after its death")


def check(run: Run, digest: str, seen: dict) -> dict:
    """What is in the run directory and in MLflow after a fault."""
    from fedsim.tracking.store import open_client

    if run.end():
        raise SystemExit(f"the run failed:\n{run.text}")
    result, history = json.loads((run.folder / "result.json").read_text()), run.rounds()
    client = open_client(result["mlflow_uri"])
    steps = [metric.step for metric in client.get_metric_history(result["mlflow_run_id"], "round")]
    later = [float(a or b) for a, b in LATER.findall(run.text)]
    return {
        "equal": result["digest"] == digest,
        "lost": sum(len(record["lost"]) for record in history),
        "once": [record["round"] for record in history] == sorted(steps) == list(range(1, 7)),
        "faults": result["faults"],
        "seconds": seen.get("seconds", max(later, default=float("nan"))),
        "note": seen.get("note", ""),
    }


def main() -> None:
    """Break runs as asked, print the table, and fail where one didn't recover."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], help="which (default: all)")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="fedsim-chaos-") as folder:
        here = {"resources.client_actors": 0, "resources.num_cpus": 1, "tracking.enabled": "false"}
        calm = Run(Path(folder) / "calm", start(Path(folder) / "calm", settings=here))
        if calm.end():
            raise SystemExit(calm.text)
        digest = json.loads((calm.folder / "result.json").read_text())["digest"]
        print("| fault | injected | recovered | seconds to recover, most | clients lost | digest equal | named as |")
        print("|---|---|---|---|---|---|---|", flush=True)
        failed = False
        for name in options.faults or FAULTS:
            title, strike = FAULTS[name]
            seen = [check(*parts) for parts in _struck(strike, Path(folder), name, options.times, digest)]
            equal, kinds = sum(s["equal"] and s["once"] for s in seen), sorted({k for s in seen for k in s["faults"]})
            notes = sorted({s["note"] for s in seen if s["note"]})[-1:]
            print(
                f"| {title} | {len(seen)} | {equal} | {max(s['seconds'] for s in seen):.1f} | "
                f"{sum(s['lost'] for s in seen)} | {sum(s['equal'] for s in seen)} of {len(seen)} | "
                f"{', '.join(kinds + notes)} |",
                flush=True,
            )
            failed |= equal < len(seen) or any(s["lost"] for s in seen)
    sys.exit(int(failed))


def _struck(strike: Callable, folder: Path, name: str, times: int, digest: str):
    for number in range(times):
        run, seen = strike(folder / f"{name}-{number}")
        yield run, digest, seen


if __name__ == "__main__":
    main()
