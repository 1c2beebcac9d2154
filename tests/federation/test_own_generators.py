"""Generators on the clients: each its own or a shared one, and synthetic rows from them in local training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import (
    CPU,
    OWN_GENERATORS,
    SERVER_STEP,
    LossyPool,
    ReorderedPool,
    block_of,
    generators_of,
    hand_made,
    make_server,
    numbers,
    reconfigured,
    run,
)

from fedsim.algorithms.client_generator import flat_rows, network_of
from fedsim.federation.blocks import BlockTrainer
from fedsim.models.saved import digest
from fedsim.types import flatten_state

NO_STEP = "feda2v.global_model_train=false"
SHARED = "feda2v.client_generator=shared"
MODES = {"own": (NO_STEP, *OWN_GENERATORS), "shared": (NO_STEP, *OWN_GENERATORS, SHARED)}


@pytest.mark.parametrize("overrides", MODES.values(), ids=MODES)
def test_results_do_not_depend_on_blocks_or_their_order(setup, overrides):
    found = []
    for size, reorder in ((1, None), (2, lambda updates, _: updates[::-1]), (8, None)):
        world = reconfigured(setup, *overrides, f"resources.block_size={size}")
        pool = None if reorder is None else ReorderedPool(world, reorder)
        server, results = run(world, 3, pool=pool)
        found.append((digest(server.state.adapter), digest(server.state.learnt.network), numbers(results)))
        found[-1] += ({client: row.numpy().tobytes() for client, row in generators_of(server).items()},)
    # Sums over blocks go along one tree, whose leaves are clients, whatever the blocks.
    assert found[0] == found[1] == found[2]


def test_every_client_trains_a_network_of_its_own_and_only_those_that_take_part(setup):
    world = reconfigured(setup, NO_STEP, *OWN_GENERATORS, "federation.cohort_size=3")
    server = make_server(world)
    server.run_round()
    assert generators_of(server) == {}, "round 1 measures what networks start from"
    server.run_round()
    first = generators_of(server)
    assert len(first) == 3
    start = flatten_state(server.state.learnt.network)
    assert len({row.numpy().tobytes() for row in first.values()}) >= 2
    server.run_round()
    second = generators_of(server)
    again = server._sample_cohort(3).tolist()
    assert second.keys() == first.keys() | set(again)
    for client, row in first.items():
        assert torch.equal(row, second[client]) == (client not in again or torch.equal(row, start))
    assert torch.equal(flatten_state(server.state.learnt.network), start), "newcomers start where the first ones did"


def test_nothing_of_an_own_network_is_sent_and_a_shared_one_is_averaged(setup):
    own, shared = (run(reconfigured(setup, *overrides), 3) for overrides in MODES.values())
    size = 4 * sum(tensor.numel() for tensor in own[0].state.learnt.network.values())
    cohort = own[1][2].cohort_size
    assert shared[1][2].bytes_up - own[1][2].bytes_up == cohort * (size + 4)
    assert own[1][1].bytes_down - own[1][2].bytes_down == cohort * size, "newcomers receive the start once"
    assert digest(shared[0].state.learnt.network) != digest(own[0].state.learnt.network)
    assert generators_of(shared[0]) == {}


def test_lost_clients_keep_what_they_had(setup):
    world = reconfigured(setup, NO_STEP, *OWN_GENERATORS, "federation.quorum=0.1")
    server, _ = run(world, 2)
    before = generators_of(server)
    server.pool = LossyPool(world, {0, 2})
    result = server.run_round()
    after, lost = generators_of(server), {client.client for client in result.lost}
    assert len(lost) >= 2
    for client, row in before.items():
        if client in lost:
            assert torch.equal(row, after[client])
    assert any(not torch.equal(row, after[client]) for client, row in before.items())


def test_a_client_without_residuals_keeps_the_start_and_still_draws_rows_around_its_recordings(setup, tmp_path):
    torch.manual_seed(0)
    rows = torch.randn(14, 4, 32).numpy()
    labels = np.array([0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3])
    world = hand_made(setup, tmp_path, rows=rows, labels=labels, clients=[[0, 1], range(2, 10), range(10, 14)])
    world = replace(world, test_rows=np.arange(4))
    server, results = run(replace(world, config=reconfigured(setup, NO_STEP, *OWN_GENERATORS).config), 2)
    kept, start = generators_of(server), flatten_state(server.state.learnt.network)
    assert torch.equal(kept[0], start)
    assert not torch.equal(kept[1], start)
    none = reconfigured(setup, NO_STEP, *OWN_GENERATORS, "training.augmentation=0").config
    plain = run(replace(world, config=none), 2)[1]
    assert results[1].metrics["train/loss"] != plain[1].metrics["train/loss"]


@pytest.mark.parametrize("overrides", MODES.values(), ids=MODES)
def test_without_augmentation_adapters_are_those_of_a_run_without_generators(setup, overrides):
    with_generators = run(reconfigured(setup, *overrides, "training.augmentation=0"), 3)[0]
    without = run(reconfigured(setup, NO_STEP), 3)[0]
    assert digest(with_generators.state.adapter) == digest(without.state.adapter)
    augmented = run(reconfigured(setup, *overrides), 3)[0]
    assert digest(augmented.state.adapter) != digest(without.state.adapter)


def test_own_and_shared_generators_draw_different_rows(setup):
    own, shared = (run(reconfigured(setup, *overrides), 3)[0] for overrides in MODES.values())
    assert digest(own.state.adapter) != digest(shared.state.adapter)


def test_clients_that_only_train_generators_leave_the_adapter_as_it_was(setup):
    world = reconfigured(setup, NO_STEP, *OWN_GENERATORS[:-1], "federation.local_epochs=0")
    server = make_server(world)
    before = digest(server.state.adapter)
    for _ in range(3):
        server.run_round()
    assert digest(server.state.adapter) == before
    assert len(generators_of(server)) == 7
    assert server.state.buffer is None, "no class statistics are sent"


def test_statistics_are_those_of_recordings_alone(setup):
    augmented, plain = (
        run(reconfigured(setup, *SERVER_STEP, *OWN_GENERATORS, f"training.augmentation={share}"), 2)[0].state.buffer
        for share in (2, 0)
    )
    assert torch.equal(augmented.audio_mean, plain.audio_mean)
    assert augmented.count.tolist() == plain.count.tolist()


def test_a_block_that_returns_no_networks_is_refused(setup):
    from fedsim.errors import ClientError
    from fedsim.federation.messages import check_update

    server, _ = run(reconfigured(setup, NO_STEP, *OWN_GENERATORS), 1)
    broadcast = server._broadcast(2)
    assert network_of(broadcast.extra)
    clients = server._sample_cohort(2)[:2]
    start = flat_rows({n: t.unsqueeze(0).repeat(2, *[1] * t.ndim) for n, t in network_of(broadcast.extra).items()})
    block = replace(block_of(*clients), generators=start)
    update = BlockTrainer(server.setup, CPU).train(block, broadcast)
    check_update(update, block, server._expected, broadcast)
    with pytest.raises(ClientError, match="it holds no generators of its clients"):
        check_update(replace(update, generators=None), block, server._expected, broadcast)
    bad = np.array(update.generators)
    bad[1, 3] = np.nan
    with pytest.raises(ClientError, match="non-finite"):
        check_update(replace(update, generators=bad), block, server._expected, broadcast)


def test_the_scale_of_networks_stays_that_of_the_first_ones(setup):
    """A client that was away has its network in the scale of the round that it was trained in."""
    server, _ = run(reconfigured(setup, NO_STEP, *OWN_GENERATORS, "federation.cohort_size=2"), 0)
    scales = []
    for _ in range(4):
        server.run_round()
        scales.append(server.state.learnt.deviation)
    assert not torch.equal(server.state.learnt.pooled.variance.sqrt(), scales[0]), "cohorts differ"
    assert all(torch.equal(scale, scales[0]) for scale in scales)
