"""Random streams: Philox against its published vectors, and bits that depend on nothing but their own counter."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fedsim.seeding import counter_bits, rng

# kat_vectors of Random123 (Salmon et al. 2011): philox4x32, 10 rounds: counter, key, result.
ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key) -> tuple[int, ...]:
    """Philox-4x32-10 on whole numbers, as the paper writes it."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ low, second & ONES, (first >> 32) ^ d ^ high, first & ONES
        low, high = (low + 0x9E3779B9) & ONES, (high + 0xBB67AE85) & ONES
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_the_reference_gives_the_published_vectors(counter, key, wanted):
    assert philox(counter, key) == wanted


@pytest.mark.parametrize(
    "first_three", [(0, 0, 0), (ONES, ONES, ONES), (0x243F6A88, 0x85A308D3, 0x13198A2E), (7, 0, 1)]
)
@pytest.mark.parametrize(("seed", "keys"), [(0, ()), (3, (1,)), (-1, ("a", 2))])
def test_bits_are_philox_of_the_counter_under_a_key_from_the_arguments(first_three, seed, keys):
    name = "/".join(map(str, (seed, "x", *keys)))
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], dtype="<u4").tolist()
    bits = counter_bits(seed, "x", *keys, counters=np.array([first_three]))
    assert bits.dtype == np.uint32
    assert tuple(bits[0].tolist()) == philox((*first_three, 0), key)


def test_bits_do_not_depend_on_what_else_is_asked_for():
    counters = np.array([[client, epoch, word] for client in (0, 5, ONES) for epoch in range(3) for word in range(4)])
    together = counter_bits(1, "x", counters=counters)
    order = np.random.default_rng(0).permutation(len(counters))
    assert np.array_equal(counter_bits(1, "x", counters=counters[order]), together[order])
    for counter, words in zip(counters, together, strict=True):
        assert np.array_equal(counter_bits(1, "x", counters=counter[None])[0], words)
    assert len({tuple(words) for words in together.tolist()}) == len(counters)
    assert counter_bits(1, "x", counters=np.zeros((0, 3), dtype=np.int64)).shape == (0, 4)


@pytest.mark.parametrize(
    "stream", [lambda *a: rng(*a).bytes(16), lambda *a: counter_bits(*a, counters=np.zeros((1, 3)))]
)
def test_seed_purpose_and_every_key_give_another_stream(stream):
    draws = [
        np.asarray(stream(*args)).tobytes() for args in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 1, 1)]
    ]
    assert len(set(draws)) == len(draws)
    assert np.asarray(stream(0, "a")).tobytes() == draws[0]


def test_bits_are_evenly_spread():
    # 40000 words: each of the 32 bits is set in half of them, give or take four standard deviations.
    counters = np.stack([np.arange(10000), np.zeros(10000), np.zeros(10000)], axis=1)
    words = counter_bits(9, "spread", counters=counters).ravel()
    shares = (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(0)
    assert abs(shares - 0.5).max() < 4 * 0.5 / np.sqrt(len(words))
