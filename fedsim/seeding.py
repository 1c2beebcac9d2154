"""Random streams: every one is a function of (seed, purpose, keys) and of nothing else.

A stream never depends on how many numbers another stream has drawn, so results don't depend on the number of
actors, on the order in which clients finish, or on a resume.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def _digest(seed: int, purpose: str, *keys: int | str) -> bytes:
    return hashlib.sha256("/".join([str(seed), purpose, *map(str, keys)]).encode()).digest()


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
    key = np.frombuffer(_digest(seed, purpose, *keys)[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def counter_bits(seed: int, purpose: str, *keys: int | str, counters: np.ndarray) -> np.ndarray:
    """Random bits for many (client, position, ...) at once: what `rng` is for one client, without an object for each.

    Philox-4x32-10 (Salmon et al. 2011, section 4.3): the bits of a counter don't depend on which others are asked for.

    Args:
        seed: the experiment's seed.
        purpose: what the numbers are for.
        *keys: what tells streams of one purpose apart, e.g. the round number.
        counters: [n, 3] integers in 0 .. 2^32 - 1, e.g. (client id, epoch, position).

    Returns:
        Four words per counter [n, 4], uint32.
    """
    low_key, high_key = np.frombuffer(_digest(seed, purpose, *keys)[:8], dtype=np.uint32).astype(np.uint64)
    a, b, c = (np.ascontiguousarray(column, dtype=np.uint64) for column in np.asarray(counters).T)
    d = np.zeros_like(a)
    for _ in range(10):
        one, two = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (two >> _HALF) ^ b ^ low_key, two & _LOW, (one >> _HALF) ^ d ^ high_key, one & _LOW
        low_key, high_key = (low_key + np.uint64(0x9E3779B9)) & _LOW, (high_key + np.uint64(0xBB67AE85)) & _LOW
    return np.stack([a, b, c, d], axis=1).astype(np.uint32)


def normal(stream: np.random.Generator, *shape: int) -> torch.Tensor:
    """Standard normal float32 tensor of the given shape, drawn from `stream` (the same bits on any device)."""
    return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))
