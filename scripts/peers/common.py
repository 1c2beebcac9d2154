"""What the peers share: the work folder, the model with its loss, training of one client, and the record of a run.

Needs PyTorch and NumPy only. Shapes: `n` rows of a client, `D` input, `H` hidden, `O` output, `C` classes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from process_tree import WatchedTree, watch_tree
from torch import Tensor, nn
from torch.nn import functional

NAMES = {"w0": "hidden.weight", "b0": "hidden.bias", "w1": "out.weight", "b1": "out.bias"}


class Adapter(nn.Module):
    """y = centre + scale * (W1 gelu(W0 x + b0) + b1); works on y - centre [.., O], which is all that the loss needs."""

    def __init__(self, initial: Mapping[str, np.ndarray], settings: Mapping[str, float]):
        super().__init__()
        self.hidden = nn.Linear(*initial["w0"].shape)
        self.out = nn.Linear(*initial["w1"].shape)
        self.settings = settings
        # The files store [in, out], torch [out, in].
        self.load_state_dict({NAMES[name]: torch.from_numpy(array.T.copy()) for name, array in initial.items()})

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] to y - centre [.., O]."""
        return self.settings["scale"] * self.out(functional.gelu(self.hidden(x)))

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Mean over a batch of the squared and the cosine error against centred targets [B, O]."""
        y = self(x)
        cosine = functional.cosine_similarity(y, target, dim=-1)
        squared = functional.mse_loss(y, target)
        return self.settings["weight"] * squared + self.settings["cosine_weight"] * (1 - cosine).mean()

    def arrays(self) -> dict[str, np.ndarray]:
        """The weights as the files store them."""
        state = self.state_dict()
        return {name: state[key].numpy().T for name, key in NAMES.items()}


class Work:
    """A work folder: settings, shared data (memory-mapped) and the order in which every client visits its rows."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings = json.loads((self.folder / "work.json").read_text())
        self.batch_size = self.settings["batch_size"]
        self._inputs, self._labels, self._rows, self._plans = map(
            self._load, ("inputs.npy", "labels.npy", "rows.npy", "plans.npy")
        )
        self._targets = self._load("targets.npy") - self._load("centre.npy")  # centred [C, O]

    def _load(self, name: str) -> np.ndarray:
        # asarray: plain indexing of a mapped file costs several times that of an array.
        return np.asarray(np.load(self.folder / name, mmap_mode="r", allow_pickle=False))

    def adapter(self) -> Adapter:
        """The model with its initial weights."""
        with np.load(self.folder / "initial.npz", allow_pickle=False) as initial:
            return Adapter(dict(initial), self.settings)

    def client(self, client: int, *, round_index: int) -> tuple[Tensor, Tensor]:
        """Inputs [n, D] and centred targets [n, O] of a client in the order of that round's epoch."""
        rows = self._rows[client][self._plans[round_index, client]]
        return torch.from_numpy(self._inputs[rows]), torch.from_numpy(self._targets[self._labels[rows]])


class Trainer:
    """One module, used again for every client; plain SGD in place, as torch.optim takes a second to import."""

    def __init__(self, folder: str | Path):
        self.work = Work(folder)
        self.adapter = self.work.adapter()
        self._parameters = list(self.adapter.parameters())

    def train(self, client: int, *, round_index: int) -> int:
        """One epoch from the adapter's present weights; returns the number of rows."""
        x, target = self.work.client(client, round_index=round_index)
        batches = zip(x.split(self.work.batch_size), target.split(self.work.batch_size), strict=True)
        for x_batch, target_batch in batches:
            self.adapter.loss(x_batch, target_batch).backward()
            self._step()
        return len(x)

    @torch.no_grad()
    def _step(self) -> None:
        for parameter in self._parameters:
            parameter.add_(parameter.grad, alpha=-self.work.settings["learning_rate"])
            parameter.grad = None


@lru_cache(maxsize=1)
def worker_trainer(folder: str) -> Trainer:
    """The trainer of a worker process, made once."""
    return Trainer(folder)


def arguments() -> argparse.Namespace:
    """The command line of every peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="work folder")
    parser.add_argument("--cohort", type=int, required=True, help="clients, all trained in every round")
    parser.add_argument("--rounds", type=int, required=True, help="at least 2: the first one warms up")
    parser.add_argument("--out", type=Path, required=True, help="result.json; the weights go beside it")
    parser.add_argument("--t0", type=float, default=time.time(), help="unix time at which the command was given")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: give at least 2, the first one only warms up")
    return options


class Recorder:
    """Times the rounds of one system and writes its result; a context manager around the whole run."""

    def __init__(self, system: str, options: argparse.Namespace, *, packages: tuple[str, ...], pid: int | None = None):
        self._system, self._options, self._packages = system, options, ("torch", *packages)
        self._watch = watch_tree(pid)
        self._tree: WatchedTree
        self._seconds: list[float] = []
        self._cpu_s: list[float] = []  # of the tree, at the end of each round

    def __enter__(self) -> Recorder:
        self._tree = self._watch.__enter__()
        return self

    def start_round(self) -> None:
        """To be called right before a round."""
        self._started = time.perf_counter()

    def end_round(self, adapter: Adapter) -> None:
        """To be called with the averaged model in hand."""
        self._seconds.append(time.perf_counter() - self._started)
        if len(self._seconds) == 1:
            self._startup_s = time.time() - self._options.t0
            np.savez(self._options.out.with_suffix(".npz"), **adapter.arrays())
        self._cpu_s.append(self._tree.update().cpu_s)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._watch.__exit__(kind, *rest)
        if kind is not None:
            return
        options, steady = self._options, self._seconds[1:]
        if len(self._seconds) != options.rounds:
            raise RuntimeError(f"{self._system} did {len(self._seconds)} of {options.rounds} rounds; see its log")
        trained = options.cohort * len(steady)
        result = {
            "system": self._system,
            "versions": {name: importlib.metadata.version(name) for name in self._packages},
            "cohort": options.cohort,
            "seconds": self._seconds,
            "clients_per_second": options.cohort / statistics.median(steady),
            "cpu_seconds_per_client": (self._cpu_s[-1] - self._cpu_s[0]) / trained,
            "startup_s": self._startup_s,
            "peak_pss_mb": self._tree.peak_pss_mb,
            "peak_rss_mb": self._tree.peak_rss_mb,
            "weights": str(options.out.with_suffix(".npz")),
        }
        options.out.write_text(json.dumps(result, indent=2))
