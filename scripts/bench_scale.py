"""How fedsim scales, from ten clients in a round to a million: speed, memory, and the cost beside arithmetic.

    python scripts/bench_scale.py --out docs/benchmarks/scale.json      # everything, on an idle machine
    python scripts/bench_scale.py --cases growth rounds                 # some of the cases below
    python scripts/bench_scale.py --quick                               # does everything work? tiny sizes, a minute

throughput     clients/s of the median round after the first (a million clients: of the first), by one thread, by two,
               and by two actors; share of the float32 matrix-product peak: that of one thread just before and
               after, times the threads or actors
million        a million distinct clients in one round over two actors
population     a cohort out of 15 million clients, from the start of the process
growth         peak memory with a large cohort against a small one
rounds         memory, open files and threads over many rounds
orchestration  processor time of a round less that of local training alone: same blocks, as many processes at a time
overhead       rounds with tracking, checkpoints and a live display against rounds without
start          from the command to the first line of metrics.jsonl
digest         SHA-256 of the adapter for several numbers of actors; low-rank against dense local training

Every measurement is a fresh process with one BLAS thread (scale_measures.py), the works are those of bench_work.py,
memory is that of the process tree. In brackets: the bound to keep on two cores, and whether it was kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench_peers import commit, machine
from scale_measures import MEASURES
from scale_table import Finding, Row, table, trained_by

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TERM": "xterm"}
UNWANTED = ("NO_COLOR", "CI", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")  # they change what is measured
MANY = 1_000_000
"""Clients of a round that is measured once only."""
LEAST_SHARE = {("W", 1000): 80, ("W-adamw", 100): 55}
"""Of the matrix-product peak, in percent: low-rank weights, and dense ones with AdamW."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are the full run."""

    throughput: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("W", (10, 100, 1000, 5000)),
        ("W-small", (100, 1000, 10_000, 100_000, MANY)),
        ("W-adamw", (100,)),
        ("W-real", (1000,)),
    )
    million: int = MANY
    population: tuple[int, int] = (15_000_000, 10_000)  # clients, cohort
    growth: tuple[int, int] = (1000, 100_000)  # cohorts
    rounds: tuple[int, int, int] = (1000, 50, 500)  # cohort, first and second look
    orchestration: tuple[tuple[str, int], ...] = (("W-small", 4096), ("W", 1024))
    overhead: tuple[int, int] = (1000, 4)  # cohort, repeats
    starts: int = 3
    digest: tuple[tuple[str, int], ...] = (("W-small", 256), ("W", 256), ("W-adamw", 256))
    digest_ways: tuple[tuple[int, int], ...] = (*((0, n) for n in (1, 2, 3)), *((n, 1) for n in (1, 2, 3, 5, 8)))
    ways: tuple[tuple[int, int], ...] = ((0, 1), (0, 2), (2, 1))  # actors (0: none), threads of each process
    seconds: float = 5.0  # that a measurement goes on


QUICK = Sizes(
    throughput=(("W", (10,)), ("W-small", (100,)), ("W-adamw", (10,))),
    million=1000,
    population=(15_000_000, 100),
    growth=(100, 1000),
    rounds=(100, 5, 20),
    orchestration=(("W-small", 256),),
    overhead=(10, 1),
    starts=1,
    digest=(("W-small", 32),),
    digest_ways=((0, 1), (0, 2), (2, 1)),
    ways=((0, 2),),
    seconds=0.1,
)


class NoFigures(Exception):
    """A measurement failed; the message says which and why."""


def alone(measure: str, **how: Any) -> dict[str, Any]:
    """The figures of a measurement in a process of its own, and `process_s`, what it all took."""
    print(f"{measure} {', '.join(f'{name} {value}' for name, value in how.items())}", file=sys.stderr, flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED} | ENVIRONMENT
    with tempfile.TemporaryDirectory(prefix="fedsim-scale-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, __file__, "--measure", measure, json.dumps(how), folder]
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        process_s = time.perf_counter() - started
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise NoFigures(f"{measure} {how}: exit code {done.returncode}, {last}")
        return json.loads((Path(folder) / "figures.json").read_text()) | {"process_s": process_s}


def throughput(sizes: Sizes) -> Iterator[Row]:
    """Every work and cohort, with each number of actors."""
    for (work, cohorts), (actors, threads) in product(sizes.throughput, sizes.ways):
        if work == "W-real" and not os.environ.get("FEDSIM_DATA"):
            print("W-real: skipped, FEDSIM_DATA names no folder with esc10", file=sys.stderr)
            continue
        for cohort in cohorts:
            on = {"work": work, "cohort": cohort, "actors": actors, "threads": threads}
            try:
                figures = alone("timed_rounds", **on, seconds=0 if cohort >= MANY else sizes.seconds)
            except NoFigures as error:
                yield Row.failed("throughput", error, **on)
                continue
            findings = [Finding("padding", 100 * figures["padding"], " %")] if figures["padding"] else []
            if (work, cohort) == ("W", 1000):
                findings.append(Finding("peak PSS", figures["peak_pss_mb"], " MB", most=1300))
            if least := LEAST_SHARE.get((work, cohort)):
                findings.append(Finding("share of peak", 100 * figures["share"], " %", least=least))
            yield Row("throughput", on, figures, tuple(findings))


def million(sizes: Sizes) -> Iterator[Row]:
    """One round."""
    on = {"work": "W-small", "cohort": sizes.million, "actors": 2, "threads": 1}
    figures = alone("timed_rounds", **on)
    memory = Finding("peak PSS", figures["peak_pss_mb"], " MB", most=2000)
    wall = [Finding("round", figures["first_round_s"], " s", most=90), Finding("process", figures["process_s"], " s")]
    yield Row("million", on, figures, (*wall, memory))


def population(sizes: Sizes) -> Iterator[Row]:
    """A small part of many."""
    clients, cohort = sizes.population
    on = {"work": "W-small", "cohort": cohort, "actors": 0, "threads": 2, "population": clients}
    figures = alone("timed_rounds", **on)
    ready, memory = figures["ready_s"], Finding("peak PSS", figures["peak_pss_mb"], " MB", most=1000)
    first = Finding("round 1 ends after", ready + figures["first_round_s"], " s")
    yield Row("population", on, figures, (Finding("round 1 starts after", ready, " s", most=10), first, memory))


def growth(sizes: Sizes) -> Iterator[Row]:
    """Peak memory of two cohorts."""
    for actors, threads in sizes.ways:
        on = {"work": "W-small", "actors": actors, "threads": threads}
        runs = [alone("timed_rounds", **on, cohort=cohort, seconds=sizes.seconds) for cohort in sizes.growth]
        small, large = (run["peak_pss_mb"] for run in runs)
        grown = Finding("peak PSS grows by", 100 * (large / small - 1), " %", most=10)
        was = Finding(f"with {sizes.growth[0]:,} clients", small, " MB")
        yield Row("growth", on | {"cohort": sizes.growth[1]}, runs[1] | {"small": runs[0]}, (grown, was))


def rounds(sizes: Sizes) -> Iterator[Row]:
    """Many rounds."""
    cohort, early, late = sizes.rounds
    figures = alone("many_rounds", cohort=cohort, early=early, late=late)
    before, after = figures["resident MB"]
    grown = Finding(f"resident memory from round {early} to {late} grows by", 100 * (after / before - 1), " %", most=2)
    held = [Finding(f"{name} more", figures[name][1] - figures[name][0], most=0) for name in ("open files", "threads")]
    yield Row("rounds", {"work": "W-small", "cohort": cohort}, figures, (grown, *held))


def orchestration(sizes: Sizes) -> Iterator[Row]:
    """What a client costs beside its training."""
    for (work, cohort), (actors, threads) in product(sizes.orchestration, sizes.ways):
        on = {"work": work, "cohort": cohort, "actors": actors, "threads": threads}
        figures = alone("orchestration", **on, seconds=sizes.seconds / 2)
        training = Finding("training alone", 1e3 * figures["training_cpu_seconds_per_client"], " ms")
        rest = Finding("all but training", figures["orchestration_ms"], " ms", most=0.05)
        yield Row("orchestration", on, figures, (rest, training))


def overhead(sizes: Sizes) -> Iterator[Row]:
    """What bookkeeping costs."""
    cohort, repeats = sizes.overhead
    figures = alone("overhead", cohort=cohort, repeats=repeats)
    longer = Finding("a round takes longer by", 100 * figures["overhead"], " %", most=3)
    without = Finding("without", statistics.median(figures["bare_s"]), " s")
    yield Row("overhead", {"work": "W", "cohort": cohort}, figures, (longer, without))


def start(sizes: Sizes) -> Iterator[Row]:
    """From the command to a finished round."""
    for tracking in (False, True):
        runs = [alone("start", tracking=tracking)["start_s"] for _ in range(sizes.starts)]
        name = f"command to first round, tracking {'on' if tracking else 'off'}"
        found = (Finding(name, statistics.median(runs), " s"),)
        yield Row("start", {"work": "W", "cohort": 100}, {"start_s": runs, "tracking": tracking}, found)


def digest(sizes: Sizes) -> Iterator[Row]:
    """The same bits, and nearly the same."""
    for work, cohort in sizes.digest:
        on = {"work": work, "cohort": cohort}
        ways = [{"actors": actors, "threads": threads} for actors, threads in sizes.digest_ways]
        digests = {trained_by(way): alone("digest", **on, **way)["digest"] for way in ways}
        first, *others = digests.values()
        alike = Finding(f"of {', '.join(digests)}, alike", 1 + others.count(first), least=len(digests))
        yield Row("digest", on, {"digests": digests}, (alike,))
    figures = alone("low_rank", clients=16)
    differ = Finding("low-rank and dense weights differ by", figures["difference"], " of the change", most=1e-4)
    yield Row("digest", {"work": "W", "cohort": 16}, figures, (differ,))


CASES: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    case.__name__: case
    for case in (throughput, million, population, growth, rounds, orchestration, overhead, start, digest)
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything works, nothing else")
    parser.add_argument("--out", type=Path, help="file for all results (JSON)")
    return parser.parse_args()


def main() -> int:
    """Runs the cases, prints the table; 1 when a measurement failed."""
    if sys.argv[1:2] == ["--measure"]:
        name, how, folder = sys.argv[2:]
        (Path(folder) / "figures.json").write_text(json.dumps(MEASURES[name](Path(folder), **json.loads(how))))
        return 0
    options, rows = arguments(), []
    for name in options.cases:
        try:
            for row in CASES[name](QUICK if options.quick else Sizes()):
                rows.append(row)
        except NoFigures as error:
            rows.append(Row.failed(name, error))
    print(table(rows))
    if options.out:
        about = {"command": shlex.join(sys.argv), "commit": commit(), "machine": machine()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(about | {"results": [row.plain() for row in rows]}, indent=2) + "\n")
    return 1 if any("error" in row.figures for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
