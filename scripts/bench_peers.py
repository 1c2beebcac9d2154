"""The same federated work in fedsim, Flower, pfl-research, a plain PyTorch loop and one Ray actor per client.

    python scripts/bench_peers.py --work W --cohort 1000 --rounds 4 --out docs/benchmarks/peers-W-1000.json
    python scripts/bench_peers.py --work W-small --cohort 20 --rounds 2      # does everything work? a minute or two

Each system runs alone, one after the other, in a process and (fedsim excepted) a virtual environment of its own, made
on first use; same data, same row orders, one BLAS thread per worker. Clients/s is of the median round after the first.
The weights after round 1 must agree with those of the plain loop. A peer that can't be installed or fails is named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_work
from peers.launch import CLIENT_ACTORS, PEERS, SCRIPTS, Bench

TOLERANCE = 0.01  # largest difference of a weight, relative to the largest change of a weight in the round


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table with aligned columns; ratios are to the faster of a peer's legs."""
    done = [result for result in results if "error" not in result]
    best = {
        peer: max((r["clients_per_second"] for r in done if r["system"].split("-")[0] == peer), default=None)
        for peer in ("flower", "pfl")
    }
    head = ["system", "clients", "clients/s", "x Flower", "x pfl", "peak PSS, MB", "CPU per client, ms"]
    rows = [[*head, "start to round 1, s", "weights differ by"]]
    for result in done:
        speed = result["clients_per_second"]
        ratios = [f"{speed / best[peer]:.3g}" if best[peer] else "-" for peer in ("flower", "pfl")]
        memory, cpu = f"{result['peak_pss_mb']:.0f}", f"{1e3 * result['cpu_seconds_per_client']:.3g}"
        start, differ = f"{result['startup_s']:.1f}", "unknown"
        if result["difference"] is not None:
            differ = f"{result['difference']:.1e}"
        rows.append([result["system"], str(result["cohort"]), f"{speed:.4g}", *ratios, memory, cpu, start, differ])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([*lines, *(f"{r['system']}: no result: {r['error']}" for r in results if "error" in r)])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"cpu": model or platform.machine(), "cores": os.cpu_count(), "memory_gb": round(memory, 1)}


def commit() -> str:
    """The commit of this checkout; `-dirty` when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False).stdout.strip()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PEERS, *CLIENT_ACTORS]
    parser.add_argument("--work", choices=("W", "W-small"), default="W-small")
    parser.add_argument("--cohort", type=int, default=100, help="clients, all in every round; even, for pfl-2")
    parser.add_argument("--rounds", type=int, default=4, help="at least 2; the first one is not timed")
    parser.add_argument("--systems", nargs="+", choices=names, default=names, metavar="SYSTEM", help=", ".join(names))
    parser.add_argument("--envs", type=Path, default=Path("~/.cache/fedsim/bench-envs").expanduser())
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one system")
    parser.add_argument("--out", type=Path, help="file for all results (JSON)")
    options = parser.parse_args()
    if options.rounds < 2 or options.cohort < 1:
        parser.error(f"--rounds {options.rounds} --cohort {options.cohort}: give at least 2 rounds and 1 client")
    return options


def main() -> int:
    """Runs the systems, prints the table; 1 when a system has no result or other weights than the plain loop."""
    options = arguments()
    folder = Path(tempfile.mkdtemp(prefix="fedsim-peers-"))
    bench_work.write_work(folder, options.work, cohort=options.cohort, rounds=options.rounds)
    bench = Bench(folder, options.work, options.rounds, options.envs.resolve(), options.timeout)
    results = []
    for system in options.systems:
        print(f"{system}: {options.work}, {options.cohort} clients, {options.rounds} rounds", file=sys.stderr)
        results.append(bench.run(system, cohort=options.cohort))
    print(table(results))
    if options.out:
        about = {"command": shlex.join(sys.argv), "commit": commit(), "machine": machine(), "work": options.work}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(about | {"rounds": options.rounds, "results": results}, indent=2) + "\n")
    differing = [result["system"] for result in results if (result.get("difference") or 0) > TOLERANCE]
    if differing:
        print(f"OTHER WEIGHTS than the plain loop's (tolerance {TOLERANCE} of the update): {', '.join(differing)}")
    if differing or any("error" in result for result in results):
        print(f"logs and weights are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
