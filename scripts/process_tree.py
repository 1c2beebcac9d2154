"""Peak memory and processor time of a process and all its descendants, sampled from outside; standard library only.

A second, small Python process reads /proc, so that the watched one loses neither time nor its interpreter lock to the
watching, and the watcher itself is not counted. Linux only. Shared pages (Ray's object store, libraries, mapped files)
count once in PSS and once per process in RSS. A process that lived shorter than the interval can be missed.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class WatchedTree:
    """What a watch has seen so far; `update` refreshes it. MB are 10^6 bytes."""

    def __init__(self, watcher: subprocess.Popen[str]):
        self._watcher = watcher
        self.peak_pss_mb = 0.0
        self.peak_rss_mb = 0.0
        self.cpu_s = 0.0  # user and system time of the whole tree since the watch began

    def update(self, *, command: str = "sample") -> WatchedTree:
        """Takes a sample now (milliseconds) and returns this tree with the figures up to it."""
        print(command, file=self._watcher.stdin, flush=True)
        vars(self).update(json.loads(self._watcher.stdout.readline()))
        return self


@contextmanager
def watch_tree(pid: int | None = None, *, interval_s: float = 0.2) -> Iterator[WatchedTree]:
    """Watches process `pid` (None: this one) and its descendants until the block ends."""
    command = [sys.executable, "-I", "-S", __file__, str(pid or os.getpid()), str(interval_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        tree = WatchedTree(watcher).update()
        try:
            yield tree
        finally:
            tree.update(command="stop")


class Sampler:
    """Reads /proc for one tree. A member stays one when its parent dies and it is handed to another."""

    def __init__(self, root: int):
        self._root = root
        self._cpu: dict[tuple[int, int], int] = {}  # ticks of every member ever seen, by (pid, start time)
        self._before: int | None = None
        self.peak_pss = self.peak_rss = 0

    def sample(self) -> dict[str, float]:
        """One look at the tree; returns the figures of `WatchedTree`."""
        pss = rss = 0
        for pid, identity, ticks in self._members():
            self._cpu[identity] = ticks
            pss += proportional_bytes(pid)
            rss += resident_bytes(pid)
        self.peak_pss, self.peak_rss = max(self.peak_pss, pss), max(self.peak_rss, rss)
        total = sum(self._cpu.values())
        self._before = total if self._before is None else self._before
        cpu_s = (total - self._before) / TICKS
        return {"peak_pss_mb": self.peak_pss / 1e6, "peak_rss_mb": self.peak_rss / 1e6, "cpu_s": cpu_s}

    def _members(self) -> list[tuple[int, tuple[int, int], int]]:
        processes = {pid: stat for pid in running() if (stat := read_stat(pid)) and pid != os.getpid()}
        roots = [pid for pid, stat in processes.items() if pid == self._root or (pid, stat[1]) in self._cpu]
        return [(pid, (pid, processes[pid][1]), processes[pid][2]) for pid in descendants(roots, processes)]


def descendants(roots: list[int], processes: dict[int, tuple[int, int, int]] | None = None) -> set[int]:
    """Processes and everything below them; `processes` as `read_stat` gives them, by number (None: looked up)."""
    if processes is None:
        processes = {pid: stat for pid in running() if (stat := read_stat(pid))}
    children: dict[int, list[int]] = {}
    for pid, (parent, _, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    open_pids = [pid for pid in roots if pid in processes]
    members = set(open_pids)
    while open_pids:
        fresh = [child for child in children.get(open_pids.pop(), []) if child not in members]
        members.update(fresh)
        open_pids += fresh
    return members


def running() -> list[int]:
    """The process numbers in /proc."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read_stat(pid: int) -> tuple[int, int, int] | None:
    """(parent, start time, user + system ticks) of a process; None when it is gone."""
    try:
        # The name stands in brackets and can hold anything, so count fields from the last bracket: proc(5), `stat`.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[19]), int(fields[11]) + int(fields[12])


def proportional_bytes(pid: int, *, parts: tuple[str, ...] = ("Pss:",)) -> int:
    """PSS of a process, or the sum of some of its parts (`Pss_Anon:`...); 0 when it is gone, or not ours to read."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(parts))


def resident_bytes(pid: int) -> int:
    """RSS of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def open_descriptors(pid: int) -> int:
    """File descriptors that a process has open; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def threads_of(pid: int) -> int:
    """Threads of a process; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def main() -> None:
    """The watching process: samples every interval, answers `sample` and `stop` lines, ends with its parent."""
    root, interval_s = int(sys.argv[1]), float(sys.argv[2])
    sampler = Sampler(root)
    while True:
        started = time.monotonic()
        sampler.sample()
        # PSS of many gigabytes takes long to read; never spend more than a tenth of a core on it.
        wait_s = max(interval_s, 9 * (time.monotonic() - started))
        if select.select([sys.stdin], [], [], wait_s)[0]:
            command = sys.stdin.readline().strip()
            if not command:
                return
            print(json.dumps(sampler.sample()), flush=True)
            if command == "stop":
                return


if __name__ == "__main__":
    main()
