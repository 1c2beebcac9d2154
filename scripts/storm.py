#!/usr/bin/env python
"""One run through a storm of faults, drawn by seed, that must end with the digest of the calm run.

Two Ray nodes of two client actors beside a head, VAE and refinement on. Client actors are killed, stopped for good and
stopped for a moment; the server actor, raylets and the driver are killed; the driver is asked to end. A raylet that
was killed is replaced by another, a driver that is gone by `fedsim resume`:

    python scripts/storm.py --faults 25 --seed 0
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
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from broken_runs import (
    HEALTH,
    MEMORY,
    actors,
    calm_digest,
    recoveries,
    start,
    steps_in_mlflow,
    two_nodes,
)  # fmt: skip
from driven_runs import Run

PAUSE_S = 2.0
SHARES = {"client": 8, "hang": 3, "pause": 3, "server": 3, "node": 3, "driver": 3, "terminate": 2}
"""How often each fault comes in 25."""
NAMED = {
    "client": ("killed", "node lost", "unreachable"),
    "hang": ("hung",),
    "server": ("server killed", "server node lost", "server unreachable"),
    "node": ("node lost", "unreachable", "server node lost"),
    "driver": ("resumed",),
    "terminate": ("resumed",),
}
"""Under which of the kinds in `result.json` a fault may be found."""


class Storm:
    """A run and what it runs on.

    Args:
        folder: the run directory.
        cluster, nodes: Ray's, of which `nodes` are killed and replaced.
        settings: of the run.
    """

    def __init__(self, folder: Path, cluster: Any, nodes: list[Any], settings: dict[str, object]) -> None:
        self.folder, self._cluster, self._nodes = folder, cluster, nodes
        self.run = Run(folder, start(folder, settings=settings), HEALTH)
        self.earlier: list[str] = []
        self.exit_codes: Counter[int] = Counter()
        self.faults: dict[str, Callable[[], None]] = {
            "client": lambda: self._signal("ClientActor", signal.SIGKILL),
            "hang": lambda: self._signal("ClientActor", signal.SIGSTOP),
            "pause": self._pause,
            "server": lambda: self._signal("ServerActor", signal.SIGKILL),
            "node": self._replace_node,
            "driver": lambda: self._end_driver(signal.SIGKILL),
            "terminate": lambda: self._end_driver(signal.SIGTERM),
        }

    def _signal(self, kind: str, number: int) -> psutil.Process:
        """To one of the actors of a class, which may have to be waited for: a fault may just have ended it."""
        end = time.monotonic() + 120.0
        while not (found := actors(kind, os.getpid())) and time.monotonic() < end:
            time.sleep(0.1)
        chosen = random.choice(sorted(found, key=lambda process: process.pid))
        chosen.send_signal(number)
        return chosen

    def _pause(self) -> None:
        chosen = self._signal("ClientActor", signal.SIGSTOP)
        time.sleep(PAUSE_S)
        with suppress(psutil.Error):
            chosen.send_signal(signal.SIGCONT)

    def _replace_node(self) -> None:
        self._cluster.remove_node(self._nodes.pop(random.randrange(len(self._nodes))), allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=2, **MEMORY))

    def _end_driver(self, number: int) -> None:
        self.run.process.send_signal(number)
        self.exit_codes[self.run.end()] += 1
        self.earlier.append(self.run.text)
        self.run = Run(self.folder, ["resume", str(self.folder)], HEALTH)

    @property
    def text(self) -> str:
        """What all drivers have printed."""
        return "\n".join([*self.earlier, self.run.text])


def schedule(count: int, seed: int) -> list[str]:
    """Kinds of faults, in their shares, in an order by seed."""
    kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
    drawn = [kind for _ in range(0, count, len(kinds)) for kind in random.Random(seed).sample(kinds, len(kinds))]
    return drawn[:count]


def main() -> None:
    """Run it, print what was done and what was named, and fail where the digest differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    kinds = schedule(options.faults, options.seed)
    rounds = {"federation.global_rounds": options.faults + 3, "resources.block_timeout": 8}
    with tempfile.TemporaryDirectory(prefix="fedsim-storm-") as place:
        folder = Path(place) / "storm"
        digest = calm_digest(Path(place) / "calm", rounds)
        with two_nodes() as (cluster, nodes, settings):
            storm, began = Storm(folder, cluster, nodes, settings | rounds), time.monotonic()
            for kind in kinds:
                before = len(storm.run.rounds())
                storm.run.wait_for_round(before + 1)
                storm.faults[kind]()
                print(f"{time.monotonic() - began:6.1f} s, after round {len(storm.run.rounds())}: {kind}", flush=True)
            if storm.run.end():
                raise SystemExit(f"the run failed:\n{storm.text}")
            taken = time.monotonic() - began
        result, history = json.loads((folder / "result.json").read_text()), storm.run.rounds()
        numbers = [record["round"] for record in history]
        once = numbers == steps_in_mlflow(result) == list(range(1, options.faults + 4))
        named = Counter(result["faults"])
        lost = sum(len(record["lost"]) for record in history)
        print(f"{len(kinds)} faults in {taken:.0f} s: {dict(Counter(kinds))}; exit codes {dict(storm.exit_codes)}")
        print(f"named in result.json: {dict(named)}; clients lost: {lost}")
        print(f"seconds to recover, most: {max(recoveries(storm.text), default=float('nan')):.1f}")
        print(f"every round once, in metrics.jsonl and in MLflow: {once}")
        print(f"digest equal to the calm run's: {result['digest'] == digest}")
        unnamed = [kind for kind in set(kinds) & set(NAMED) if not any(named[name] for name in NAMED[kind])]
        if unnamed:
            print(f"nowhere named: {unnamed}")
    sys.exit(int(result["digest"] != digest or not once or lost > 0 or bool(unnamed)))


if __name__ == "__main__":
    main()
