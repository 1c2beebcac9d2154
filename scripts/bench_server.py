"""The server step against the size of the cohort: seconds by phase and peak memory, for several generators.

    python scripts/bench_server.py                                        # 100 ... 100 000 clients, about 3 minutes
    python scripts/bench_server.py --cohorts 100 1000 --generators vae --json server.json

Every client holds 3 of 10 classes and sends an audio mean [1, 512], its variance and a mean output [768] for each. The
tables are made, cut and sent block by block, as blocks do it; making them isn't counted. Every case runs in a process
of its own, on one thread, for a few rounds with other clients in each; times are medians over the rounds after the
first, processor time so that neighbours on the machine tell less. Ratios are to the smallest cohort of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CLASSES, PER_CLIENT, WIDTH, OUTPUT = 10, 3, 512, 768
BLOCK = 512
COLUMNS = {
    "collect_s": "collect, s",
    "generator_s": "generator, s",
    "refine_s": "refine, s",
    "rest_s": "rest, s",
    "step_s": "all, s",
    "peak_mb": "peak, MB",
}


def resident_mb(field: str) -> float:
    """`VmRSS` or `VmHWM` (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


class Cohort:
    """Makes the class statistics of blocks: rows are class means plus the same noise in every block."""

    def __init__(self) -> None:
        import torch

        source = torch.Generator().manual_seed(0)
        rows = BLOCK * PER_CLIENT
        self.means = torch.randn(CLASSES, 1, WIDTH, generator=source)
        self.noise = 0.3 * torch.randn(rows, 1, WIDTH, generator=source)
        self.outputs = torch.randn(rows, OUTPUT, generator=source)
        self.variance = 0.1 + torch.rand(rows, 1, WIDTH, generator=source)

    def block(self, first: int, clients: int) -> Any:
        """Statistics of clients first, first + 1, ..."""
        import numpy as np
        import torch

        from fedsim.types import ClassStats

        client = np.repeat(np.arange(first, first + clients), PER_CLIENT)
        label = (client + np.tile([0, 1, 5], clients)) % CLASSES
        count = 3 + client * 7919 % 29
        rows = len(client)
        mean = self.means[torch.from_numpy(label)] + self.noise[:rows]
        return ClassStats(
            client, label, count, mean, self.variance[:rows].clone(), {"clip": self.outputs[:rows].clone()}
        )


def server_step(kind: str) -> tuple[Any, Any, Any]:
    """The server step of a small federation, its configuration and the adapter's first tensors."""
    import torch

    from fedsim.algorithms.objective import make_objective
    from fedsim.config import config_from_mapping
    from fedsim.federation.server_step import ServerStep
    from fedsim.models.adapters import HeadSpec, make_adapter

    config = config_from_mapping(
        {
            "data": {"name": "synthetic"},
            "model": {"heads": {"clip": [OUTPUT]}, "audio_encoder": {"name": "logmel", "segments": 1, "dim": WIDTH}},
            "feda2v": {
                "adapter_aggregation_mode": "weighted",
                "global_model_train": True,
                "global_model_train_from_nodes_adapters": True,
                "use_generator": True,
                "generator_type": kind,
            },
        },
        (),
    )
    objective = make_objective({"clip": torch.randn(CLASSES, OUTPUT, generator=torch.Generator().manual_seed(1))})
    scale = {head: weight**-0.5 for head, weight in objective.weight.items()}
    specs = {"clip": HeadSpec("mlp", (OUTPUT,), (1024,), 768, 8)}
    adapter = make_adapter((1, WIDTH), specs, centre=objective.centre, scale=scale)
    # The step asks a setup and its parts for no more than this.
    setup: Any = SimpleNamespace(config=config, class_names=tuple(f"class {n}" for n in range(CLASSES)))
    parts: Any = SimpleNamespace(adapter=adapter, objective=objective, device=torch.device("cpu"))
    return ServerStep(setup, parts, {}), config, adapter.init(0)


class CpuClock:
    """Stands in for the round's clock: processor seconds by phase."""

    def __init__(self, round_number: int) -> None:
        self.round_number, self.seconds = round_number, dict[str, float]()

    def __call__(self, phase: str) -> CpuClock:
        """Name the phase that begins."""
        self._phase = phase
        return self

    def __enter__(self) -> None:
        self._start = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._phase] = time.process_time() - self._start


def run_case(kind: str, clients: int, rounds: int) -> dict[str, float]:
    """Medians over rounds 2, 3, ... of one generator and cohort size."""
    import numpy as np
    import torch

    from fedsim.algorithms.row_sample import RowCollector, sample_rows

    torch.set_num_threads(1)
    step, config, adapter = server_step(kind)
    cohort, limit = Cohort(), config.feda2v.statistics_rows
    before, buffer, seen = resident_mb("VmRSS"), None, []
    for number in range(1, rounds + 1):
        key = {"seed": config.experiment.seed, "round_number": number}
        collector, collect = RowCollector(limit, **key), 0.0
        for start in range(0, clients, BLOCK):
            table = cohort.block((number - 1) * clients + start, min(BLOCK, clients - start))
            table = sample_rows(table, limit, **key)
            at = time.process_time()
            collector.add(table)
            collect += time.process_time() - at
        at = time.process_time()
        stats = collector.sample()
        collect += time.process_time() - at
        clock: Any = CpuClock(number)
        at = time.process_time()
        stepped = step.run(adapter, stats, buffer, clock)
        total = time.process_time() - at
        adapter, buffer = stepped.adapter, stepped.buffer
        generate, refine = clock.seconds["generate"], clock.seconds["refine"]
        seen.append([collect, generate, refine, total - generate - refine, collect + total])
    medians = np.median(np.array(seen[1:]), axis=0).tolist()
    peak = resident_mb("VmHWM")
    return dict(zip(COLUMNS, [*medians, peak], strict=True)) | {"rows": len(stats), "grown_mb": peak - before}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown with ratios to the smallest cohort of the same generator."""
    head = ["generator", "clients", "rows", *COLUMNS.values(), "time x", "memory x"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for result in results:
        base = min((r for r in results if r["generator"] == result["generator"]), key=lambda r: r["clients"])
        ratios = [f"{result[name] / base[name]:.2f}" for name in ("step_s", "peak_mb")]
        cells = [f"{result[name]:.3f}" if name != "peak_mb" else f"{result[name]:.0f}" for name in COLUMNS]
        line = [result["generator"], f"{result['clients']:,}".replace(",", " "), str(result["rows"]), *cells, *ratios]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run every case in a fresh process and print the table."""
    parser = argparse.ArgumentParser(description="server step against cohort size")
    parser.add_argument(
        "--cohorts", type=int, nargs="+", default=[100, 1000, 10_000, 100_000], help="clients per round"
    )
    parser.add_argument("--generators", nargs="+", default=["replay", "gaussian", "vae"], help="kinds of generator")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a case, at least 2; the first isn't counted")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "CLIENTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}; the first isn't counted, so at least 2 are needed")
    if args.case:
        print(json.dumps(run_case(args.case[0], int(args.case[1]), args.rounds)))
        return
    results = []
    for kind in args.generators:
        for clients in args.cohorts:
            command = [sys.executable, __file__, "--rounds", str(args.rounds), "--case", kind, str(clients)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            results.append({"generator": kind, "clients": clients} | json.loads(done.stdout.splitlines()[-1]))
            print(f"{kind}, {clients} clients: {results[-1]['step_s']:.3f} s", file=sys.stderr)
    print(f"One thread, processor seconds, {platform.machine()}, Python {platform.python_version()}\n")
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
