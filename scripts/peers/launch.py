"""Starts peers and fedsim on one work folder, each in a process of its own, and compares the weights they reach.

Standard library and NumPy only. A peer's virtual environment is made on first use; pip brings the PyTorch build that it
is pointed to (PIP_INDEX_URL, PIP_FIND_LINKS): a CPU build saves gigabytes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCRIPTS = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """Where a peer's script and packages are, and how it is started."""

    module: str
    packages: tuple[str, ...] = ()
    processes: int = 1
    max_cohort: int | None = None


PEERS = {
    "flower": Peer("flower", ("flwr[simulation]==1.41.0",)),
    "pfl": Peer("pfl", ("pfl==0.6.0",)),
    "pfl-2": Peer("pfl", ("pfl==0.6.0",), processes=2),
    "plain": Peer("plain"),
    "naive-ray": Peer("naive_ray", ("ray==2.60.0",), max_cohort=32),  # a process of 300 MB for each client
}
CLIENT_ACTORS = {"fedsim": 0, "fedsim-2": 2}
RUN_FEDSIM = """
import json, sys, bench_work
work, cohort, rounds, client_actors, out = sys.argv[1:]
result = bench_work.run_fedsim(work, cohort=int(cohort), rounds=int(rounds), client_actors=int(client_actors))
open(out, "w").write(json.dumps(result))
"""


@dataclass
class Bench:
    """One work folder and what has been run on it."""

    folder: Path
    work: str
    rounds: int
    envs: Path
    timeout_s: float
    references: dict[int, Path] = field(default_factory=dict)  # weights of the plain loop, by cohort

    def run(self, system: str, *, cohort: int) -> dict[str, Any]:
        """The result of one system, with `difference` to the plain loop's weights (None: no such); or its `error`."""
        try:
            result = self._run_fedsim(system, cohort) if system in CLIENT_ACTORS else self._run_peer(system, cohort)
        except (subprocess.SubprocessError, OSError) as error:
            return {"system": system, "cohort": cohort, "error": str(error)}
        return result | {"system": system, "difference": self._difference(result.pop("weights"), result["cohort"])}

    def _run_fedsim(self, system: str, cohort: int) -> dict[str, Any]:
        out = self.folder / f"{system}.json"
        leg = [self.work, cohort, self.rounds, CLIENT_ACTORS[system], out]
        self._call([sys.executable, "-c", RUN_FEDSIM, *map(str, leg)], out)
        return json.loads(out.read_text())

    def _run_peer(self, system: str, cohort: int, *, rounds: int | None = None) -> dict[str, Any]:
        peer = PEERS[system]
        cohort = min(cohort, peer.max_cohort or cohort)
        out = self.folder / f"{system}-{cohort}.json"
        python = [str(ensure_env(self.envs / peer.module, peer.packages))]
        if peer.processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={peer.processes}"]
        options = ["--cohort", cohort, "--rounds", rounds or self.rounds, "--out", out, "--t0", time.time()]
        self._call([*python, "-m", f"peers.{peer.module}", str(self.folder), *map(str, options)], out)
        if system == "plain":
            self.references[cohort] = out.with_suffix(".npz")
        return json.loads(out.read_text())

    def _call(self, command: list[str], out: Path) -> None:
        """Runs a command in a session of its own, its words to a log; raises when it fails or takes too long."""
        settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
        settings |= {"FLWR_HOME": str(self.folder / "flwr"), "GLOO_SOCKET_IFNAME": "lo", "RAY_USAGE_STATS_ENABLED": "0"}
        log = out.with_suffix(".log")
        with log.open("w") as words:
            process = subprocess.Popen(
                command,
                env=os.environ | settings | {"PYTHONPATH": str(SCRIPTS)},
                cwd=self.folder,
                stdout=words,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(self.timeout_s)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if code or not out.exists():
            last = (log.read_text().strip().splitlines() or ["nothing"])[-1]
            raise subprocess.SubprocessError(f"exit code {code}, last words of {log}: {last}")

    def _difference(self, weights: str, cohort: int) -> float | None:
        """Largest difference to the plain loop's weights after round 1, relative to the largest change."""
        if cohort not in self.references:
            try:
                self._run_peer("plain", cohort, rounds=2)
            except (subprocess.SubprocessError, OSError) as error:
                print(f"weights not compared, as the plain loop failed: {error}", file=sys.stderr)
                return None
        initial, wanted, got = (
            np.load(path) for path in (self.folder / "initial.npz", self.references[cohort], weights)
        )
        change = max(np.abs(wanted[name] - initial[name]).max() for name in wanted)
        return float(max(np.abs(wanted[name] - got[name]).max() for name in wanted) / change)


def ensure_env(folder: Path, packages: tuple[str, ...]) -> Path:
    """The Python of a virtual environment with torch and `packages` in it, made on first use."""
    python, stamp, wanted = folder / "bin" / "python", folder / "installed.txt", "\n".join((TORCH, *packages))
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {wanted.replace(chr(10), ', ')} into {folder}", file=sys.stderr)
        base = shutil.which("python3.11") or sys.executable
        subprocess.run([base, "-m", "venv", folder], check=True)
        for names in ([TORCH, "numpy"], list(packages)):  # torch first: then nothing else picks another build of it
            if names:
                subprocess.run([str(python), "-m", "pip", "install", "--quiet", *names], check=True)
        stamp.write_text(wanted)
    return python
