"""Random streams: every one is a function of (seed, purpose, keys) and of nothing else.

A stream never depends on how many numbers another stream has drawn, so results don't depend on the number of
actors, on the order in which clients finish, or on a resume.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def rng(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """The random stream of one purpose.

    Args:
        seed: the experiment's seed.
        purpose: what the numbers are for, e.g. "client", "cohort", "generator".
        *keys: what tells streams of one purpose apart, e.g. round number and client id.

    Returns:
        A fresh NumPy generator (Philox, keyed by SHA-256 of the arguments): the same arguments give the same numbers
        on every machine.
    """
    text = "/".join([str(seed), purpose, *map(str, keys)])
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def normal(stream: np.random.Generator, *shape: int) -> torch.Tensor:
    """Standard normal float32 tensor of the given shape, drawn from `stream` (the same bits on any device)."""
    return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))
