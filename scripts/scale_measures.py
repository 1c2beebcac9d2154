"""What bench_scale.py measures: each function runs in a process of its own, in an empty folder, and returns figures."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from bench_work import SIZES, peak_gflops, process_start, values
from process_tree import resident_bytes, watch_tree

LEAST_ROUNDS = 3
ORCHESTRATION_REPEATS = 5
OVERHEAD_ROUNDS = 3


def prepared(settings: dict[str, Any]) -> Any:
    """The `Setup` of a configuration, with settled resources."""
    from fedsim.config import config_from_mapping
    from fedsim.federation.setup import prepare
    from fedsim.launch.auto import settle

    return settle(prepare(config_from_mapping(settings)))


def opened(setup: Any, run_dir: Path, status: Callable[[Any], None] = lambda _: None) -> Any:
    """The experiment of a setup, as a context manager."""
    from fedsim.launch.session import open_experiment

    run_dir.mkdir()
    return open_experiment(setup, run_dir, status=status)


def timed(action: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def padding(setup: Any) -> float:
    """Share of the rows of a first cohort's batches that are padding."""
    from fedsim.algorithms.batches import padding_share

    counts = setup.partition.counts_of(np.arange(setup.config.federation.cohort_size))
    return padding_share(counts, setup.config.training.batch_size)


def timed_rounds(
    folder: Path,
    *,
    work: str,
    cohort: int,
    actors: int,
    threads: int,
    population: int | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Speed and memory of the rounds after the first, for so many seconds (0: of the first round)."""
    settings = values(work, folder, cohort=cohort, population=population, actors=actors, threads=max(actors, threads))
    size = SIZES.get(work) if work != "W-small" and seconds else None
    peaks = [peak_gflops()] if size else []
    with watch_tree() as tree:
        setup = prepared(settings)
        with opened(setup, folder / "run") as experiment:
            ready_s, cpu_s = time.time() - process_start(), tree.update().cpu_s
            first = timed(experiment.round)
            rounds: list[float] = []
            cpu_s = tree.update().cpu_s if seconds else cpu_s
            while seconds and (len(rounds) < LEAST_ROUNDS or sum(rounds) < seconds):
                rounds.append(timed(experiment.round))
            rounds = rounds or [first]
            cpu_s = tree.update().cpu_s - cpu_s
    speed = cohort / statistics.median(rounds)
    figures = {
        "clients_per_second": speed,
        "peak_pss_mb": tree.peak_pss_mb,
        "peak_rss_mb": tree.peak_rss_mb,
        "cpu_seconds_per_client": cpu_s / (cohort * len(rounds)),
        "rounds": len(rounds),
        "round_s": dict(zip(("least", "median", "most"), np.quantile(rounds, (0, 0.5, 1)).tolist(), strict=True)),
        "ready_s": ready_s,
        "first_round_s": first,
        "padding": padding(setup),
    }
    if size:
        peaks.append(peak_gflops())
        peak = 1e9 * statistics.mean(peaks) * (actors or threads)
        figures |= {"peak_gflops": peaks, "share": speed * size.flop() / peak}
    return figures


def many_rounds(folder: Path, *, cohort: int, early: int, late: int) -> dict[str, Any]:
    """Resident memory, open files and threads of this process after two numbers of rounds."""
    looks = []
    with opened(prepared(values("W-small", folder, cohort=cohort)), folder / "run") as experiment:
        for number in range(1, late + 1):
            experiment.round()
            if number in (early, late):
                held = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]
                looks.append([resident_bytes(os.getpid()) / 1e6, *held])
    return dict(zip(("resident MB", "open files", "threads"), zip(*looks, strict=True), strict=True))


@lru_cache(maxsize=2)
def prepared_blocks(settings: str, share: int, shares: int) -> tuple[Any, Any, list[Any]]:
    """The trainer, the broadcast, and every block of a share with its rows gathered."""
    import torch

    from fedsim.algorithms.sampling import order_cohort
    from fedsim.federation.blocks import BlockTrainer, make_blocks
    from fedsim.federation.parts import build_parts, initial_state
    from fedsim.types import Broadcast

    torch.set_num_threads(1)
    setup, cpu = prepared(json.loads(settings)), torch.device("cpu")
    state = initial_state(setup, build_parts(setup, cpu))
    broadcast = Broadcast(1, setup.config.experiment.seed, state, evaluate_clients=False)
    clients = np.arange(setup.partition.num_clients)
    counts = setup.partition.counts_of(clients)
    cohort = order_cohort(clients, counts, batch_size=setup.config.training.batch_size)
    blocks = make_blocks(cohort, setup.config.resources.clients_per_block)[share::shares]
    trainer = BlockTrainer(setup, cpu)
    return trainer, broadcast, [(block, trainer.prepare(block, broadcast)) for block in blocks]


def bare_cpu_s(settings: str, share: int, shares: int, passes: int) -> float:
    """Processor seconds of local training alone."""
    trainer, broadcast, blocks = prepared_blocks(settings, share, shares)
    before = time.process_time()
    for _ in range(passes):
        for block, rows in blocks:
            trainer.train(block, broadcast, rows)
    return time.process_time() - before


def orchestration(folder: Path, *, work: str, cohort: int, actors: int, threads: int, seconds: float) -> dict[str, Any]:
    """Processor time per client of rounds and of bare training, in turn; medians of the repeats."""
    shares = actors or threads
    setup = prepared(values(work, folder, cohort=cohort, actors=actors, threads=shares))
    settings = setup.config.model_dump_json()
    found = []
    with ProcessPoolExecutor(shares, mp_context=get_context("spawn")) as pool, watch_tree() as tree:

        def bare(passes: int) -> float:
            return sum(pool.map(bare_cpu_s, [settings] * shares, range(shares), [shares] * shares, [passes] * shares))

        bare(1)
        with opened(setup, folder / "run") as experiment:
            experiment.round()
            passes = 1 + int(seconds * shares / bare(1))
            for _ in range(ORCHESTRATION_REPEATS):
                alone_s, before = bare(passes), tree.update().cpu_s
                for _ in range(passes):
                    experiment.round()
                found.append([(tree.update().cpu_s - before) / (passes * cohort), alone_s / (passes * cohort)])
    rounds, training = np.array(found).T
    return {
        "cpu_seconds_per_client": statistics.median(rounds),
        "training_cpu_seconds_per_client": statistics.median(training),
        "orchestration_ms": 1e3 * statistics.median(rounds - training),
    }


def overhead(folder: Path, *, cohort: int, repeats: int) -> dict[str, Any]:
    """Seconds of bare rounds, and of rounds with tracking, a checkpoint each and a live display, a few at a time."""
    from rich.console import Console

    from fedsim.tracking.progress import ProgressDisplay

    settings = values("W", folder, cohort=cohort)
    full = settings | {"tracking": {"enabled": True}, "experiment": settings["experiment"] | {"checkpoint_every": 1}}
    bare_s: list[float] = []
    full_s: list[float] = []
    with (
        (folder / "display.txt").open("w") as text,
        ProgressDisplay(1_000_000, Console(file=text, force_terminal=True)) as display,
        opened(prepared(settings), folder / "bare") as bare,
        opened(prepared(full), folder / "full", status=display.update) as tracked,
    ):
        if not display.live:
            raise RuntimeError("the display isn't live: NO_COLOR, CI or TERM=dumb is set")
        tracked.round()  # waits for the store
        for _ in range(repeats):
            bare.round()  # meanwhile the tracker's thread writes what is left of the round before
            bare_s += [timed(bare.round) for _ in range(OVERHEAD_ROUNDS)]
            full_s += [timed(lambda: display.round_done(tracked.round())) for _ in range(OVERHEAD_ROUNDS)]
    return {"bare_s": bare_s, "full_s": full_s, "overhead": statistics.median(full_s) / statistics.median(bare_s) - 1}


def start(folder: Path, *, tracking: bool) -> dict[str, Any]:
    """Seconds from `fedsim run` (W, 100 clients, in-process) to the first line of metrics.jsonl, nothing cached."""
    config, lines, words = folder / "config.json", folder / "run" / "metrics.jsonl", folder / "words.txt"
    settings = values("W", folder, cohort=100) | {"tracking": {"enabled": tracking}}
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "fedsim", "run", str(config), "--output", str(lines.parent)]
    command += ["--set", "resources.client_actors=0"]
    started = time.perf_counter()
    with words.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as run:
        while run.poll() is None and not (lines.exists() and lines.stat().st_size):
            time.sleep(0.002)
        seconds, code = time.perf_counter() - started, run.poll()
        run.terminate()
    if code is not None:
        raise RuntimeError(
            f"fedsim run ended with {code} before round 1 was over: {words.read_text()[-200:].strip()!r}"
        )
    return {"start_s": seconds}


def digest(folder: Path, *, work: str, cohort: int, actors: int, threads: int) -> dict[str, Any]:
    """The digest of the adapter after two rounds."""
    settings = values(work, folder, cohort=cohort, actors=actors, threads=max(actors, threads))
    with opened(prepared(settings), folder / "run") as experiment:
        experiment.round()
        experiment.round()
        return {"digest": experiment.finish("FINISHED")["digest"]}


def low_rank(folder: Path, *, clients: int) -> dict[str, Any]:
    """Largest difference of a client's weight between low-rank and dense training of W, over the largest change."""
    import torch

    from fedsim.algorithms.batches import training_batches
    from fedsim.algorithms.local_training import Buffers, shared_start, train_stack
    from fedsim.federation.blocks import BlockTrainer
    from fedsim.federation.parts import build_parts, initial_state
    from fedsim.federation.stacks import local_training
    from fedsim.models.adapters.shared_weight import SharedWeight
    from fedsim.types import Block, Broadcast

    torch.set_num_threads(1)
    setup, cpu = prepared(values("W", folder, cohort=clients)), torch.device("cpu")
    parts, how = build_parts(setup, cpu), local_training(setup.config)
    broadcast = Broadcast(1, setup.config.experiment.seed, initial_state(setup, parts))
    rows = BlockTrainer(setup, cpu).prepare(Block(0, np.arange(clients)), broadcast)
    seed, epochs = broadcast.seed, how.local_epochs
    batches = training_batches(rows, seed=seed, round_number=1, epochs=epochs, batch_size=how.batch_size)
    trained: list[dict[str, Any]] = []
    for most_steps in (None, sys.maxsize):  # with so many steps before it, factors would never pay
        stack = shared_start(broadcast.adapter, clients)
        objective, buffers = parts.objective, Buffers()
        train_stack(parts.model, stack, batches, objective=objective, how=how, buffers=buffers, most_steps=most_steps)
        trained.append(stack)
    kinds = [{name for name, p in stack.items() if isinstance(p, SharedWeight)} for stack in trained]
    if not kinds[0] or kinds[1]:
        raise RuntimeError(f"kept as factors: {kinds[0]} and {kinds[1]}; expected some, and none")
    factored = {name: p.dense() if isinstance(p, SharedWeight) else p for name, p in trained[0].items()}
    change = max(float((p - broadcast.adapter[name]).abs().max()) for name, p in factored.items())
    return {"difference": max(float((p - trained[1][name]).abs().max()) for name, p in factored.items()) / change}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    measure.__name__: measure
    for measure in (timed_rounds, many_rounds, orchestration, overhead, start, digest, low_rank)
}
