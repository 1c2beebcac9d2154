"""Embedding recordings with an AST: fedsim's encoder and store against a plain transformers loop.

    python scripts/bench_features.py              # 12 layers, 86 M random weights, 6 clips: 2 minutes
    python scripts/bench_features.py --tiny       # two small layers: seconds
    python scripts/bench_features.py --clips 32 --batch 8 --json features.json

The plain loop is what a notebook does: feature extractor, model, mean over the real time patches, projection; one clip
at a time and in batches. Both sides get the same model, the same clips of 5 s of noise and the same number of threads.
fedsim also runs on one thread. Embeddings must agree, and fedsim's must be equal bit for bit for all thread counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.data.store import fill_store
from fedsim.models.encoders.ast import AstEncoder
from fedsim.models.encoders.pooling import projection, segment_weights
from fedsim.models.encoders.threads import available_cores

RATE, SECONDS, SEGMENTS, DIM = 16_000, 5, 4, 512
TOLERANCE = 1e-4


def make_ast(*, tiny: bool) -> tuple[Any, Any]:
    """Model with random weights and its feature extractor, without a network."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    small: dict[str, int] = {}
    if tiny:
        small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        torch.manual_seed(0)
        return ASTModel(ASTConfig(**small)).eval(), ASTFeatureExtractor()


def plain_loop(model: Any, extractor: Any, clips: list[np.ndarray], batch: int) -> np.ndarray:
    """Audio embeddings [n, S, D] by transformers alone."""
    config, rows = model.config, []
    frequency = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    time_patches = (config.max_length - config.patch_size) // config.time_stride + 1
    matrix = projection(config.hidden_size, DIM)
    for start in range(0, len(clips), batch):
        some = clips[start : start + batch]
        inputs = extractor(some, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[:, 2:]
        over_time = hidden.reshape(len(some), frequency, time_patches, -1).mean(1)
        frames = torch.tensor([1 + (len(clip) - 400) // 160 for clip in some])
        valid = (frames - config.patch_size) // config.time_stride + 1
        rows.append(segment_weights(valid, time_patches, SEGMENTS) @ over_time @ matrix)
    return torch.cat(rows).numpy()


def fedsim_store(encoder: AstEncoder, clips: list[np.ndarray], batch: int, folder: Path) -> np.ndarray:
    """The same by fedsim: encoder and embedding store in a fresh cache."""
    store = fill_store(
        cache_dir=folder,
        fingerprint=encoder.fingerprint,
        hashes=[f"{number:064d}" for number in range(len(clips))],
        names=[f"clip {number}" for number in range(len(clips))],
        load=lambda number: clips[number],
        encode=lambda waves: (encoder.encode(waves), np.zeros(len(waves), dtype=np.int64)),
        row_shape=encoder.shape,
        batch_size=batch,
        on_bad_audio="error",
    )
    return np.array(store.rows)


def timed(work: Callable[[], np.ndarray], *, threads: int) -> tuple[np.ndarray, float, float]:
    """Result, wall and processor seconds under so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(*, tiny: bool, clips: int, batch: int) -> list[dict[str, Any]]:
    """Every way once, after one clip to warm up; checks that the embeddings agree."""
    model, extractor = make_ast(tiny=tiny)
    encoder = AstEncoder(model, extractor, segments=SEGMENTS, dim=DIM, label="random AST")
    source, cores = np.random.default_rng(0), available_cores()
    waves = [(0.1 * source.standard_normal(SECONDS * RATE)).astype(np.float32) for _ in range(clips)]
    plain_loop(model, extractor, waves[:1], 1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, tuple[int, Callable[[], np.ndarray]]] = {
            "transformers, one by one": (cores, lambda: plain_loop(model, extractor, waves, 1)),
            f"transformers, batches of {batch}": (cores, lambda: plain_loop(model, extractor, waves, batch)),
            f"fedsim, batches of {batch}": (cores, lambda: fedsim_store(encoder, waves, batch, Path(folder, "all"))),
            f"fedsim, batches of {batch}, 1 thread": (
                1,
                lambda: fedsim_store(encoder, waves, batch, Path(folder, "1")),
            ),
        }
        rows: dict[str, np.ndarray] = {}
        for name, (threads, work) in ways.items():
            rows[name], wall, cpu = timed(work, threads=threads)
            results.append({"way": name, "threads": threads, "clips_per_s": clips / wall, "cpu_s": cpu / clips})
            print(f"{name}: {wall:.1f} s", file=sys.stderr)
    by_hand, *_, ours, alone = rows.values()
    for result, made in zip(results, rows.values(), strict=True):
        result["differ"] = float(np.abs(made - by_hand).max() / np.abs(by_hand).max())
        if result["differ"] > TOLERANCE:
            raise SystemExit(f"{result['way']}: embeddings differ by {result['differ']:.1e} of the largest value")
    if not np.array_equal(ours, alone):
        raise SystemExit("fedsim's embeddings depend on the number of threads")
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; ratios to the first way."""
    lines = ["| way | threads | clips/s | ratio | CPU s per clip | largest difference |", "|" + " --- |" * 6]
    for result in results:
        ratio = result["clips_per_s"] / results[0]["clips_per_s"]
        lines.append(
            f"| {result['way']} | {result['threads']} | {result['clips_per_s']:.3g} | {ratio:.2f} "
            f"| {result['cpu_s']:.3g} | {result['differ']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="AST embedding throughput")
    parser.add_argument("--tiny", action="store_true", help="two small layers instead of the real size")
    parser.add_argument("--clips", type=int, default=6, help="recordings of 5 s")
    parser.add_argument("--batch", type=int, default=3, help="recordings of a batch")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    results = measure(tiny=args.tiny, clips=args.clips, batch=args.batch)
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
