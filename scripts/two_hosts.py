"""Two hosts on one machine: network namespaces, a cable between them that can be cut, and a Ray node in each.

Needs root and iproute2. The hosts share files and nothing else: `two_hosts()` starts a Ray head in the first one, a
node in the second one, and leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 6399


class TwoHosts:
    """Two network namespaces and the cable between them.

    Args:
        environment: of Ray's processes.
        cpus: of the Ray node of each host.
    """

    def __init__(self, environment: Mapping[str, str], cpus: tuple[int, int]) -> None:
        self._names = tuple(f"fs{os.getpid()}{host}" for host in "ab")
        self._environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | dict(environment)
        self._folder = Path(tempfile.mkdtemp(prefix="fs2-", dir="/tmp"))
        self._cpus = cpus
        self.address = f"{ADDRESSES[0]}:{PORT}"

    def on(self, host: int) -> list[str]:
        """What comes before a command that is to run on a host."""
        return ["ip", "netns", "exec", self._names[host]]

    def lay_cable(self) -> None:
        """Make both hosts, with a cable between them."""
        first, second = self._names
        for name in self._names:
            _ip("netns", "add", name)
        _ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "cable", "up")

    def start_ray(self) -> None:
        """A Ray head on the first host, and a node that joins it on the second."""
        for host, how in enumerate(
            (["--head", f"--port={PORT}", "--include-dashboard=false"], [f"--address={self.address}"])
        ):
            words = [
                *self.on(host), sys.executable, "-m", "ray.scripts.scripts", "start", *how,
                f"--node-ip-address={ADDRESSES[host]}", f"--num-cpus={self._cpus[host]}", "--disable-usage-stats",
                f"--object-store-memory={100 * 2**20}", *(["--temp-dir", str(self._folder)] if host == 0 else []),
            ]  # fmt: skip
            done = subprocess.run(words, env=self._environment, capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise SystemExit(f"Ray doesn't start on host {host}: {done.stdout}{done.stderr}")

    def cut(self) -> None:
        """Unplug the cable: nothing arrives, and nobody is told."""
        _ip("-n", self._names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("-n", self._names[1], "link", "set", "cable", "up")

    def kill(self, host: int) -> int:
        """The power of a host fails: the cable is dead and so is every process; returns how many there were."""
        self.cut()
        return self._end(self._names[host])

    def _end(self, name: str) -> int:
        done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        processes = []
        for pid in map(int, done.stdout.split()):
            try:
                processes.append(psutil.Process(pid))
                os.kill(pid, signal.SIGKILL)
            except (psutil.Error, ProcessLookupError):
                continue
        psutil.wait_procs(processes, timeout=20)
        return len(processes)

    def close(self) -> None:
        """End every process of both hosts, and the hosts."""
        for name in self._names:
            self._end(name)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(words)}: {done.stderr.strip()}")


def can_make_hosts() -> bool:
    """Whether this process may make network namespaces."""
    name = f"fs{os.getpid()}try"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made


@contextmanager
def two_hosts(environment: Mapping[str, str] | None = None, cpus: tuple[int, int] = (2, 2)) -> Iterator[TwoHosts]:
    """Both hosts with a Ray node each, ended with everything that runs on them."""
    hosts = TwoHosts({"RAY_AUTH_MODE": "disabled", **(environment or {})}, cpus)
    try:
        hosts.lay_cable()
        hosts.start_ray()
        yield hosts
    finally:
        hosts.close()
