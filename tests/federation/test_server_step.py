"""The bound on class statistics inside whole rounds."""

from __future__ import annotations

import logging

import pytest
from worlds import SERVER_STEP, ReorderedPool, digest_after, reconfigured, run, slow_but


@pytest.mark.parametrize("kind", slow_but(["vae"], ["gaussian", "cof", "vae"]))
def test_a_bounded_sample_is_the_same_for_every_block_size_and_arrival(setup, kind):
    def digest_of(*overrides: str, reverse: bool = False) -> str:
        bounded = reconfigured(setup, *SERVER_STEP, f"feda2v.generator_type={kind}", *overrides)
        pool = ReorderedPool(bounded, lambda updates, _: updates[::-1]) if reverse else None
        return digest_after(bounded, 2, pool=pool)

    wanted = digest_of("feda2v.statistics_rows=3", "resources.block_size=8")
    for size in (1, 2, 4):
        rows = ("feda2v.statistics_rows=3", f"resources.block_size={size}")
        assert digest_of(*rows) == digest_of(*rows, reverse=True) == wanted
    assert digest_of("resources.block_size=8") != wanted


def test_a_round_says_when_its_statistics_are_a_sample(setup, caplog):
    bounded = reconfigured(setup, *SERVER_STEP, "feda2v.statistics_rows=3")
    with caplog.at_level(logging.INFO):
        server, _ = run(bounded, 1)
    assert "round 1: 3 rows of class statistics stand for those of all clients" in caplog.text
    assert len(server.state.buffer) == 3
    with caplog.at_level(logging.INFO):
        caplog.clear()
        whole, _ = run(reconfigured(setup, *SERVER_STEP), 1)
    assert "stand for those of all clients" not in caplog.text
    assert len(whole.state.buffer) > 3
    # What three rows stand for is near the recordings behind all of them.
    assert server.state.buffer.weight.sum() == pytest.approx(whole.state.buffer.count.sum(), rel=0.6)
