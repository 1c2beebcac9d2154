#!/usr/bin/env python
"""Runs thousands of small rounds and looks at what grows: the section "Long runs" of docs/reliability.md.

A whole run of the command line with a generator, refinement, checkpoints, evaluation and SQLite MLflow, watched from
outside:

    python scripts/soak.py                                # 2000 rounds with two client actors
    python scripts/soak.py --in-process                   # without Ray
    python scripts/soak.py --save with.json --fail        # figures to a file; exit code 1 where something grew
    python scripts/soak.py --plot docs/soak.png with.json without.json

Memory is PSS summed over the process tree: a page that n processes share counts 1/n in each, so once in the sum.
"Written" leaves out pages of files (libraries), whose share changes whenever another process of the machine maps them
too. Every figure of a round is the median of the looks taken in the tenth of the run (100 rounds at most) that ends
there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from driven_runs import SETTINGS, Run, words
from process_tree import TICKS, descendants, open_descriptors, proportional_bytes, read_stat, threads_of

MARKS = (200, 500, 1000, 1500, 2000)
ROUND = SETTINGS | {
    "experiment.name": "soak",
    "experiment.checkpoint_every": 50,
    "experiment.evaluate_every": 10,
    "federation.num_clients": 2,
    "federation.local_epochs": 1,
    "feda2v.global_model_train_epochs": 1,
    "feda2v.generator_epochs": 1,
    "training.batch_size": 16,
}
UNITS = {
    "memory written": "MB",
    "memory": "MB",
    "descriptors": "",
    "threads": "",
    "processes": "",
    "object store in use": "MB",
    "objects": "",
    "Ray's folder": "MB",
    "Ray's files": "",
    "run directory": "MB",
    "files of the run": "",
    "folders in /tmp": "",
}
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}  # so that the object store can be asked from outside
GROWTH = 0.03
Look = dict[str, float]


def kind_of(pid: int, root: int) -> str:
    """What a process is, for the table of shares."""
    if pid == root:
        return "driver"
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "gone"
    for word, kind in (("ray::ClientActor", "client actors"), ("ray::ServerActor", "server actor"), ("ray::", "idle")):
        if word in line:
            return kind
    return Path(line.split(" ")[0]).name if "gcs_server" in line or "raylet/raylet" in line else "Ray's helpers"


def tree_size(folder: Path) -> tuple[int, int]:
    """Files of a folder, and their bytes."""
    count = size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(parent, name)).st_size
                count += 1
            except OSError:
                continue
    return count, size


def folders_of(pid: int) -> list[Path]:
    """Folders of private Rays that a process has started."""
    found = []
    for owner in Path("/tmp").glob("fs-*/owner"):
        try:
            if owner.read_text().strip() == str(pid):
                found.append(owner.parent)
        except OSError:
            continue
    return found


def argument(pids: Sequence[int], name: str) -> str | None:
    """The value of `--name=value` in the first command line that has it."""
    for pid in pids:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        for word in line.split("\0"):
            if word.startswith(f"--{name}="):
                return word.partition("=")[2]
    return None


class Watcher:
    """Looks at one run; finds its Ray, where it has one, once its raylet is up."""

    def __init__(self, run: Run) -> None:
        self._run, self._raylet, self._folder = run, None, None
        self._offset, self._round, self.times = 0, 0, dict[int, float]()
        self.looks: list[Look] = []
        self.folders: set[Path] = set()
        self.shares: list[dict[str, float]] = []

    def round_number(self) -> int:
        """The last finished round; reads what is new in metrics.jsonl."""
        path = self._run.folder / "metrics.jsonl"
        if path.is_file():
            with path.open("rb") as stream:
                stream.seek(self._offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    record = json.loads(line)
                    self._round = record["round"]
                    self.times[self._round] = record["time"]
        return self._round

    def look(self) -> None:
        """Take all figures now."""
        root = self._run.process.pid
        number, pids = self.round_number(), sorted(descendants([root]))
        written = {pid: proportional_bytes(pid, parts=("Pss_Anon:", "Pss_Shmem:")) for pid in pids}
        share: dict[str, float] = defaultdict(float)
        for pid, size in written.items():
            share[kind_of(pid, root)] += size / 1e6
        files, size = tree_size(self._run.folder)
        look = {
            "round": number,
            "memory written": sum(written.values()) / 1e6,
            "memory": sum(map(proportional_bytes, pids)) / 1e6,
            "descriptors": sum(map(open_descriptors, pids)),
            "threads": sum(map(threads_of, pids)),
            "processes": len(pids),
            "cpu": sum(stat[2] for pid in pids if (stat := read_stat(pid))) / TICKS,
            "run directory": size / 1e6,
            "files of the run": files,
            "folders in /tmp": len(folders_of(root)),
        }
        self.folders |= set(folders_of(root))
        self.looks.append(look | self._ray(pids))
        self.shares.append({"round": number, **share})

    def _ray(self, pids: Sequence[int]) -> Look:
        """The object store, and Ray's folder."""
        if self._raylet is None and (address := argument(pids, "gcs-address")):
            from ray._raylet import GcsClient

            nodes = GcsClient(address=address).get_all_node_info().values()
            self._raylet = next(((node.node_manager_address, node.node_manager_port) for node in nodes), None)
            self._folder = argument(pids, "temp_dir") or argument(pids, "temp-dir") or argument(pids, "session_dir")
        if self._raylet is None:
            return {}
        from ray._private.internal_api import node_stats

        store = node_stats(*self._raylet, include_memory_info=False).store_stats
        files, size = tree_size(Path(self._folder)) if self._folder else (0, 0)
        return {
            "object store in use": store.object_store_bytes_used / 1e6,
            "objects": store.num_local_objects,
            "Ray's folder": size / 1e6,
            "Ray's files": files,
        }


def at(looks: Sequence[Mapping[str, float]], name: str, mark: int, window: int) -> float:
    """The median of a figure in the rounds that end with `mark`."""
    values = [look.get(name, 0.0) for look in looks if mark - window < look["round"] <= mark]
    return statistics.median_low(values) if values else float("nan")


def marks_of(rounds: int) -> list[int]:
    """The rounds at which the table looks: 200, 500... of 2000, their parts of shorter runs."""
    return sorted({max(1, round(mark * rounds / MARKS[-1])) for mark in MARKS})


def seconds_per_round(times: Mapping[int, float], first: int, last: int) -> float:
    """Of rounds first + 1 to last."""
    return (times[last] - times[first]) / (last - first)


def cpu_per_round(looks: Sequence[Look], first: int, last: int) -> float:
    """Processor seconds of the tree between looks: other work on the machine doesn't count."""
    some = [look for look in looks if first <= look["round"] <= last]
    rounds = some[-1]["round"] - some[0]["round"] if some else 0
    return (some[-1]["cpu"] - some[0]["cpu"]) / rounds if rounds else float("nan")


def soak(rounds: int, *, actors: int, interval_s: float) -> dict[str, Any]:
    """Run, watch, and put the figures together."""
    with tempfile.TemporaryDirectory(prefix="fedsim-soak-") as folder:
        resources = {"resources.client_actors": actors, "resources.num_cpus": 2}
        run_dir = Path(folder) / "run"
        settings = ROUND | resources | {"federation.global_rounds": rounds}
        run = Run(run_dir, words(run_dir, settings), ENVIRONMENT)
        watcher = Watcher(run)
        while run.process.poll() is None and watcher.round_number() < rounds:
            if watcher.round_number():
                watcher.look()
            time.sleep(interval_s)
        if run.end():
            raise SystemExit(f"the run failed:\n{run.text}")
        watcher.round_number()
        result = json.loads((run_dir / "result.json").read_text())
    window = max(1, min(100, rounds // 10))
    parts = ((window, min(3 * window, rounds)), (max(1, rounds - 2 * window), rounds))
    first, last = (seconds_per_round(watcher.times, *part) for part in parts)
    cpu_first, cpu_last = (cpu_per_round(watcher.looks, *part) for part in parts)
    return {
        "rounds": rounds,
        "actors": actors,
        "looks": watcher.looks,
        "shares": watcher.shares,
        "window": window,
        "seconds first": first,
        "seconds last": last,
        "cpu first": cpu_first,
        "cpu last": cpu_last,
        "lacks": result["mlflow_lacks"],
        "left": sorted(str(folder) for folder in watcher.folders if folder.exists()),
    }


def title(found: Mapping[str, Any]) -> str:
    """How it was run."""
    return f"Ray, {found['actors']} client actors" if found["actors"] else "in process"


def table(found: Mapping[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
    marks, looks, window = marks_of(found["rounds"]), found["looks"], found["window"]
    head = [title(found), *(f"round {mark}" for mark in marks), "change"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, unit in UNITS.items():
        if any(name in look for look in looks):
            lines.append(_line(f"{name}, {unit}" if unit else name, [at(looks, name, mark, window) for mark in marks]))
    for kind in sorted({kind for share in found["shares"] for kind in share} - {"round"}):
        values = [at(found["shares"], kind, mark, window) for mark in marks]
        lines.append(_line(f"memory written: {kind}, MB", values))
    first, last = found["seconds first"], found["seconds last"]
    lines.append("")
    lines.append(
        f"A round took {1000 * first:.0f} ms in rounds {window + 1} to {3 * window} and {1000 * last:.0f} ms in the "
        f"last {2 * window}: ratio {last / first:.2f}; processor "
        f"time {1000 * found['cpu first']:.0f} and {1000 * found['cpu last']:.0f} ms: ratio "
        f"{found['cpu last'] / found['cpu first']:.2f}. Left in /tmp: {', '.join(found['left']) or 'nothing'}. "
        f"MLflow lacks: {found['lacks'] or 'nothing'}."
    )
    return lines


def _line(name: str, values: Sequence[float]) -> str:
    first, last = values[0], values[-1]
    change = f"{100 * (last / first - 1):+.1f} %" if first else f"{last - first:+g}"
    return f"| {name} | " + " | ".join(f"{value:.1f}".removesuffix(".0") for value in values) + f" | {change} |"


def grown(found: Mapping[str, Any]) -> list[str]:
    """What grew more than it may."""
    marks, looks, window = marks_of(found["rounds"]), found["looks"], found["window"]
    start, end = ({name: at(looks, name, mark, window) for name in UNITS} for mark in (marks[0], marks[-1]))
    told = [f"{name}: {start[name]:.1f} to {end[name]:.1f} MB" for name in ("memory written", "memory")
            if not end[name] <= start[name] * (1 + GROWTH)]  # fmt: skip
    told += [f"{name}: {start[name]:g} to {end[name]:g}" for name in ("descriptors", "threads", "processes")
             if not end[name] <= start[name]]  # fmt: skip
    told += [f"left in /tmp: {name}" for name in found["left"]]
    return told


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Memory, descriptors and threads by round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(7, 7), sharex=True, layout="constrained")
    for found in runs:
        looks = [look for look in found["looks"] if look["round"] > 5]
        for axis, name in zip(axes, ("memory written", "descriptors", "threads"), strict=True):
            axis.plot(
                [look["round"] for look in looks], [look[name] for look in looks], label=title(found), linewidth=1
            )
    names = ("memory written, MB (process tree)", "open file descriptors", "threads")
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("round")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, print the table; or draw figures that were saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saved", nargs="*", type=Path, help="with --plot: files of --save")
    parser.add_argument("--rounds", type=int, default=2000, help="at least 3")
    parser.add_argument("--in-process", action="store_true", help="without Ray")
    parser.add_argument("--interval", type=float, default=3.0, help="seconds between looks")
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw saved figures, run nothing")
    parser.add_argument("--fail", action="store_true", help="exit code 1 where something grew")
    options = parser.parse_args()
    if options.plot:
        plot([json.loads(path.read_text()) for path in options.saved], options.plot)
        return
    found = soak(options.rounds, actors=0 if options.in_process else 2, interval_s=options.interval)
    if options.save:
        options.save.write_text(json.dumps(found))
    print("\n".join(table(found)))
    for line in (told := grown(found)):
        print(f"grew: {line}")
    sys.exit(int(options.fail and bool(told)))


if __name__ == "__main__":
    main()
