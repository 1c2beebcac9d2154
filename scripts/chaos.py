#!/usr/bin/env python
"""Breaks real runs and checks that they end with the digest of the calm run: the table of docs/reliability.md.

Every line is whole runs of the command line in processes of their own, with Ray, SQLite MLflow and a VAE, of which
something is killed, stopped, starved or cut off in mid-round:

    python scripts/chaos.py --times 5                     # all faults
    python scripts/chaos.py --times 1 client server       # some

`hosts`, `away`, `link`, `link_noticed` and `host` need root: they run on two hosts in network namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
from broken_runs import HEALTH, MEMORY, actors, calm_digest, joining, recoveries, start, steps_in_mlflow, two_nodes
from driven_runs import Run
from two_hosts import TwoHosts, can_make_hosts, two_hosts

CUT_S = 20.0
LONGER = {"federation.global_rounds": 30}
"""Actors on a node that joins need seconds to be up."""


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
    # Ray's agents look for their parent once a minute.
    family = [process for process in family if "Agent" not in process.name()]
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
    limit = (memory.total - memory.available) / memory.total + 0.12
    environment = {"RAY_memory_usage_threshold": f"{limit:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    run = Run(folder, start(folder), environment)
    run.wait_for_round(random.randint(1, 3))
    balloon, step = [], 64 * 2**20
    while "out of memory" not in run.text and len(balloon) * step < 0.3 * memory.total:
        balloon.append(bytearray(os.urandom(1024)) * (step // 1024))
        time.sleep(0.05)
    return run, {"note": f"balloon of {len(balloon) * step / 2**30:.1f} GB"}


def strike_node(folder: Path) -> tuple[Run, dict]:
    """The raylet of one of two nodes is killed."""
    with two_nodes() as (cluster, nodes, settings):
        run = Run(folder, start(folder, settings=settings), HEALTH)
        run.wait_for_round(random.randint(1, 3))
        cluster.remove_node(random.choice(nodes), allow_graceful=False)
        run.end()
        return run, {}


def strike_both_nodes(folder: Path) -> tuple[Run, dict]:
    """One of two nodes is killed, a third joins, and when actors are up there the other one is killed too."""
    with two_nodes() as (cluster, nodes, settings):
        run = Run(folder, start(folder, settings=settings | LONGER), HEALTH)
        random.shuffle(nodes)
        run.wait_for_round(random.randint(1, 3))
        cluster.remove_node(nodes[0], allow_graceful=False)
        run.wait_for_round(len(run.rounds()) + 1)
        joined = cluster.add_node(num_cpus=2, **MEMORY)
        raylet = joined.all_processes["raylet"][0].process.pid
        while len(actors("ClientActor", raylet)) < 2:
            if run.process.poll() is not None:
                raise SystemExit(f"the run ended before its actors were back:\n{run.text}")
            time.sleep(0.05)
        cluster.remove_node(nodes[1], allow_graceful=False)
        moved = len(run.rounds())
        run.end()
        return run, {"settings": LONGER, "note": f"{len(run.rounds()) - moved} rounds on the node that joined alone"}


def strike_speed(folder: Path) -> tuple[Run, dict]:
    """Client actors of one of two nodes get a tenth of the time for the rest of the run."""
    with two_nodes() as (_, nodes, settings):
        run = Run(folder, start(folder, settings=settings), HEALTH)
        run.wait_for_round(1)
        slow = actors("ClientActor", nodes[0].all_processes["raylet"][0].process.pid)
        while run.process.poll() is None:
            for number, seconds in ((signal.SIGSTOP, 0.45), (signal.SIGCONT, 0.05)):
                for process in slow:
                    with suppress(psutil.Error):
                        process.send_signal(number)
                time.sleep(seconds)
        run.end()
        return run, {"note": f"{len(slow)} of 4 actors slowed down"}


@contextmanager
def run_on_two_hosts(
    folder: Path, environment: dict[str, str] | None = None, *, driver: int = 0
) -> Iterator[tuple[TwoHosts, Run]]:
    """A run with two client actors on each of two hosts; Ray's head is on the first one, the driver on `driver`."""
    with two_hosts(environment) as hosts:
        environment = {"RAY_AUTH_MODE": "disabled"} | (environment or {})
        settings = joining(hosts.address)
        yield hosts, Run(folder, start(folder, settings=settings), environment, before=hosts.on(driver))


def strike_nothing(folder: Path, *, driver: int = 0) -> tuple[Run, dict]:
    """A run across two hosts."""
    with run_on_two_hosts(folder, driver=driver) as (_, run):
        run.end()
        return run, {}


def strike_link(folder: Path, *, environment: dict[str, str] | None = None) -> tuple[Run, dict]:
    """The cable between two hosts is cut and mended again."""
    with run_on_two_hosts(folder, environment) as (hosts, run):
        run.wait_for_round(random.randint(1, 3))
        done, hosts_cut = len(run.rounds()), time.monotonic()
        hosts.cut()
        time.sleep(CUT_S)
        meanwhile = len(run.rounds()) - done
        hosts.mend()
        mended, done = time.monotonic(), len(run.rounds())
        while len(run.rounds()) <= done and run.process.poll() is None:
            time.sleep(0.05)
        after = time.monotonic() - mended
        run.end()
        seen = {"note": f"{meanwhile} rounds while cut off for {mended - hosts_cut:.0f} s"}
        return run, seen if environment else seen | {"seconds": after}


def strike_host(folder: Path) -> tuple[Run, dict]:
    """The second of two hosts fails in round 3 with everything on it."""
    with run_on_two_hosts(folder, HEALTH) as (hosts, run):
        run.wait_for_round(2)
        gone = hosts.kill(1)
        run.end()
        return run, {"note": f"{gone} processes gone"}


FAULTS: dict[str, tuple[str, Callable[[Path], tuple[Run, dict]]]] = {
    "client": ("client actor, `kill -9`", strike_actor("ClientActor", signal.SIGKILL)),
    "hang": ("client actor, `kill -STOP`, `block_timeout: 5`", strike_actor("ClientActor", signal.SIGSTOP)),
    "memory": ("actor killed for memory", strike_memory),
    "server": ("server actor, `kill -9`", strike_actor("ServerActor", signal.SIGKILL)),
    "driver": ("driver, `kill -9`, then `fedsim resume`", strike_driver),
    "node": ("raylet of one of two nodes, `kill -9`", strike_node),
    "join": ("the same, a third node joins, then the second one is killed too", strike_both_nodes),
    "slow": ("client actors of one of two nodes get a tenth of the time", strike_speed),
    "hosts": ("none, on two hosts", strike_nothing),
    "away": ("none, on two hosts, the driver on the one without Ray's head", partial(strike_nothing, driver=1)),
    "link": ("link between two hosts cut for 20 s", strike_link),
    "link_noticed": ("the same, and Ray takes the host for dead", partial(strike_link, environment=HEALTH)),
    "host": ("second of two hosts, all processes and the link, in round 3", strike_host),
}
NEED_ROOT = ("hosts", "away", "link", "link_noticed", "host")


def check(run: Run, digest: str, seen: dict) -> dict:
    """What is in the run directory and in MLflow after a fault."""
    if run.end():
        raise SystemExit(f"the run failed:\n{run.text}")
    result, history = json.loads((run.folder / "result.json").read_text()), run.rounds()
    more, rounds = seen.get("settings"), list(range(1, result["rounds"] + 1))
    return {
        "equal": result["digest"] == (calm_digest(run.folder.with_suffix(".calm"), more) if more else digest),
        "lost": sum(len(record["lost"]) for record in history),
        "once": [record["round"] for record in history] == steps_in_mlflow(result) == rounds,
        "faults": result["faults"],
        "seconds": seen.get("seconds", max(recoveries(run.text), default=float("nan"))),
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
    chosen = options.faults or [name for name in FAULTS if can_make_hosts() or name not in NEED_ROOT]
    if len(chosen) < len(options.faults or FAULTS):
        print(f"left out, they need root: {', '.join(NEED_ROOT)}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="fedsim-chaos-") as folder:
        digest = calm_digest(Path(folder) / "calm")
        print("| fault | injected | recovered | seconds to recover, most | clients lost | digest equal | named as |")
        print("|---|---|---|---|---|---|---|", flush=True)
        failed = False
        for name in chosen:
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
