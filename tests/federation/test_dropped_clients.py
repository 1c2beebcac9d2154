"""`federation.on_client_error: drop`: who fails is found and named, the others count, with the same bits everywhere."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import CPU, SERVER_STEP, hand_made, make_server, numbers, reconfigured, run, slow_but

from fedsim.errors import ClientError, QuorumError
from fedsim.federation.blocks import make_blocks
from fedsim.federation.pool import InProcessPool
from fedsim.federation.run_directory import append_round
from fedsim.federation.stacks import StackTrainer
from fedsim.models.saved import digest

DROP = ("federation.on_client_error=drop", "federation.quorum=0.5", "federation.num_clients=7")


def world(setup, folder, *bad: int):
    """Seven clients of six recordings; those of `bad` clients are so large that sums overflow."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(0).standard_normal((42, 4, 32), dtype=np.float32)
    for client in bad:
        rows[6 * client : 6 * client + 6] *= 1e37
    clients = [range(6 * k, 6 * k + 6) for k in range(7)]
    made = hand_made(setup, folder, rows=rows, labels=np.arange(42) % 4, clients=clients)
    return replace(made, test_rows=np.array([0, 1, 2, 3]))


@pytest.fixture(scope="module")
def poisoned(setup, tmp_path_factory):
    return world(setup, tmp_path_factory.mktemp("world"), 2, 5)


def drop(setup, *options: str):
    return replace(setup, config=reconfigured(setup, *DROP, *options).config)


@pytest.mark.parametrize("mode", ["weighted", "median", "none"])
@pytest.mark.parametrize("block_size", slow_but([4], [1, 2, 4, 8]))
def test_the_same_clients_are_dropped_with_the_same_bits_for_any_block_size(poisoned, mode, block_size):
    options = (f"feda2v.adapter_aggregation_mode={mode}", *(SERVER_STEP if mode != "none" else ()))
    here, results = run(drop(poisoned, *options, f"resources.block_size={block_size}"), 2)
    there, others = run(drop(poisoned, *options, "resources.block_size=2"), 2)
    assert all([lost.client for lost in result.lost] == [2, 5] for result in results)
    assert digest(here.state.adapter) == digest(there.state.adapter)
    assert numbers(results) == numbers(others)
    assert [result.lost for result in results] == [result.lost for result in others]


def test_a_dropped_client_is_named_in_the_log_and_in_metrics_jsonl(poisoned, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        _, (result,) = run(drop(poisoned), 1)
    append_round(tmp_path, result)
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert [lost["client"] for lost in record["lost"]] == [2, 5]
    for lost in record["lost"]:
        assert lost["reason"].startswith(f"dropped: client {lost['client']}, round 1, phase local training: non-finite")
        assert f"client {lost['client']} is dropped: client {lost['client']}, round 1" in caplog.text


def test_a_run_with_a_dropped_client_is_that_of_a_cohort_in_which_it_is_missing(poisoned):
    """The aggregate is the weighted mean over the clients that are left, computed here by hand from single clients."""
    server, _ = run(drop(poisoned, "resources.block_size=8"), 1)
    start = run(drop(poisoned), 0)[0].state.adapter
    total, weights = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in start.items()}, 0.0
    alone = make_server(drop(poisoned))
    for update in InProcessPool(poisoned, CPU).train(make_blocks(np.array([0, 1, 3, 4, 6]), 1), alone._broadcast(1)):
        weights += update.weight_sum
        for name in total:
            total[name] += update.delta_sum[name]
    for name, p in server.state.adapter.items():
        torch.testing.assert_close(p, start[name] + (total[name] / weights).float(), rtol=1e-5, atol=1e-7)


def test_the_quorum_counts_dropped_clients_as_missing(poisoned):
    with pytest.raises(QuorumError, match=r"round 1: 5 of 7 clients answered, federation.quorum asks for 6"):
        run(drop(poisoned, "federation.quorum=0.8"), 1)


def test_without_drop_the_first_one_stops_the_run(poisoned):
    with pytest.raises(ClientError, match=r"^client [25], round 1, phase local training: non-finite update"):
        run(drop(poisoned, "federation.on_client_error=stop"), 1)


def test_code_that_raises_for_one_client_costs_that_client_alone(setup, tmp_path, monkeypatch):
    sound = drop(world(setup, tmp_path / "sound"), "resources.block_size=4")
    train = StackTrainer.train

    def fragile(self, data, *args, **kwargs):
        if 3 in data.client:
            raise KeyError("no such word")
        return train(self, data, *args, **kwargs)

    monkeypatch.setattr(StackTrainer, "train", fragile)
    _, (result,) = run(sound, 1)
    assert [(lost.client, lost.reason) for lost in result.lost] == [(3, "dropped: round 1: KeyError: 'no such word'")]


def test_secure_sums_do_not_open_without_the_dropped_client(poisoned):
    secure = drop(poisoned, "privacy.secure_sums=true", "privacy.statistics=sums", "federation.quorum=1")
    with pytest.raises(QuorumError, match="the masks that others share with them can't be taken off"):
        run(secure, 1)
