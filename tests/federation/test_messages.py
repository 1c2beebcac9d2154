"""What leaves a client: its size, its contents, and what is refused on arrival."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import CPU, hand_made, make_server, reconfigured

from fedsim.cluster.wire import pack_update
from fedsim.errors import ClientError
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.messages import check_update
from fedsim.types import Block, Broadcast

NO_STEP = "feda2v.global_model_train=false"
S, D = 4, 32


@pytest.fixture
def trained(setup):
    """A block's update, the block, and the adapter it answers to."""
    setup = reconfigured(setup, NO_STEP)
    start = make_server(setup).state.adapter
    block = Block(2, tuple(int(c) for c in np.argsort(setup.partition.counts, kind="stable")[-2:]))
    update = BlockTrainer(setup, CPU).train(block, Broadcast(3, 7, start))
    assert len(update.stats) >= 2
    return update, block, start


def changed(state, name, tensor):
    return {**state, name: tensor}


BREAK = {
    "clients": (
        lambda u: replace(u, metrics=replace(u.metrics, client=u.metrics.client[::-1])),
        "it is about clients",
    ),
    "tensor missing": (
        lambda u: replace(u, delta_sum=dict(list(u.delta_sum.items())[1:])),
        "tensor names differ from the adapter's",
    ),
    "tensor added": (
        lambda u: replace(u, delta_sum=changed(u.delta_sum, "evil", torch.zeros(1))),
        "tensor names differ from the adapter's: ['evil']",
    ),
    "shape": (
        lambda u: replace(u, delta_sum=changed(u.delta_sum, "clip.last.bias", torch.zeros(17))),
        "clip.last.bias has shape [17], expected [16]",
    ),
    "nan": (
        lambda u: replace(u, delta_sum=changed(u.delta_sum, "clip.last.bias", torch.full((16,), torch.nan))),
        "clip.last.bias has non-finite numbers",
    ),
    "no update": (lambda u: replace(u, delta_sum=None), "it holds no update"),
    "weight": (lambda u: replace(u, weight_sum=float("nan")), "its weight is nan"),
    "foreign client": (
        lambda u: replace(u, stats=replace(u.stats, client=u.stats.client + 100)),
        "class statistics name a client outside the block",
    ),
    "small count": (
        lambda u: replace(u, stats=replace(u.stats, count=np.ones_like(u.stats.count))),
        "class statistics of fewer than privacy.min_count = 2 recordings",
    ),
    "rows": (
        lambda u: replace(u, stats=replace(u.stats, audio_mean=u.stats.audio_mean[1:])),
        "audio_mean has ",
    ),
    "infinite mean": (
        lambda u: replace(u, stats=replace(u.stats, audio_mean=u.stats.audio_mean + torch.inf)),
        "audio_mean has non-finite numbers",
    ),
    "nan variance": (
        lambda u: replace(u, stats=replace(u.stats, audio_var=u.stats.audio_var * torch.nan)),
        "audio_var has non-finite numbers",
    ),
    "nan output": (
        lambda u: replace(
            u,
            stats=replace(
                u.stats, output_mean=changed(u.stats.output_mean, "t5", torch.full((len(u.stats), 4, 16), torch.nan))
            ),
        ),
        "t5 has non-finite numbers",
    ),
}


@pytest.mark.parametrize(("broken", "problem"), BREAK.values(), ids=BREAK)
def test_a_wrong_update_is_refused_naming_round_block_clients_and_problem(trained, broken, problem):
    update, block, start = trained
    check_update(update, block, start, round_number=3, min_count=2)
    with pytest.raises(ClientError) as caught:
        check_update(broken(update), block, start, round_number=3, min_count=2)
    clients = ", ".join(map(str, block.client_ids))
    assert str(caught.value).startswith(f"round 3, block 2 (clients {clients}): bad update: {problem}")


def test_personal_tensors_are_checked_too(setup):
    setup = reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none")
    start = make_server(setup).state.adapter
    block = Block(0, (1, 2))
    update = BlockTrainer(setup, CPU).train(block, Broadcast(1, 7, start))
    check_update(update, block, start, round_number=1, min_count=2)
    own = changed(update.personal[2], "clip.last.bias", torch.full((16,), torch.inf))
    for personal, problem in (
        ({**update.personal, 2: own}, r"clip\.last\.bias has non-finite numbers"),
        ({1: update.personal[1]}, "it holds no update"),
        ({**update.personal, 5: own}, "it holds no update"),
    ):
        with pytest.raises(ClientError, match=problem):
            check_update(replace(update, personal=personal), block, start, round_number=1, min_count=2)


def recordings_of(setup, folder, count: int):
    """A federation of two clients with `count` recordings each, of the same three classes."""
    rows = np.random.default_rng(0).standard_normal((2 * count, S, D), dtype=np.float32)
    labels = np.arange(2 * count) % 3
    world = hand_made(setup, folder, rows=rows, labels=labels, clients=[range(0, count), range(count, 2 * count)])
    return rows, world


def message_of(world, *, client_ids=(0, 1)) -> bytes:
    start = make_server(world).state.adapter
    update = BlockTrainer(world, CPU).train(Block(0, client_ids), Broadcast(1, 7, start))
    return pickle.dumps(pack_update(update), protocol=5)


def test_the_size_of_a_message_does_not_depend_on_the_number_of_recordings(setup, tmp_path):
    sizes = [len(message_of(recordings_of(reconfigured(setup, NO_STEP), tmp_path, n)[1])) for n in (10, 1000)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("mode", ["weighted", "none"])
def test_no_recording_is_in_a_message(setup, tmp_path, mode):
    setup = reconfigured(setup, NO_STEP, f"feda2v.adapter_aggregation_mode={mode}")
    rows, world = recordings_of(setup, tmp_path, 12)
    message = message_of(world)
    server = make_server(world)
    start = server.state.adapter
    own = reconfigured(world, NO_STEP, "feda2v.adapter_aggregation_mode=none")
    after = BlockTrainer(own, CPU).train(Block(0, (0, 1)), Broadcast(1, 7, start)).personal
    searched = list(rows) + [segment for row in rows for segment in row]
    for client in (0, 1):
        for state in (start, after[client]):
            params = {name: t.unsqueeze(0) for name, t in state.items()}
            with torch.no_grad():
                outputs = server.parts.adapter.forward(params, torch.from_numpy(rows).unsqueeze(0))
            searched += [row.numpy() for out in outputs.values() for row in out[0]]
    assert len(searched) == 24 + 24 * S + 2 * 2 * 2 * 24
    for row in searched:
        assert np.ascontiguousarray(row, dtype=np.float32).tobytes() not in message
    # The search does find what is in the message.
    mean = torch.from_numpy(rows[0:12][world.labels[0:12] == 0]).mean(0)
    assert mean.numpy().tobytes() in message


def test_with_a_minimum_of_one_a_lone_recording_would_be_in_the_message(setup, tmp_path):
    # What privacy.min_count is there to prevent, and what its warning says.
    rows = np.random.default_rng(0).standard_normal((5, S, D), dtype=np.float32)
    found = {}
    for minimum in (1, 2):
        config = reconfigured(setup, NO_STEP, f"privacy.min_count={minimum}")
        world = hand_made(config, tmp_path, rows=rows, labels=[0, 1, 1, 1, 1], clients=[range(5)])
        found[minimum] = rows[0].tobytes() in message_of(world, client_ids=(0,))
    assert found == {1: True, 2: False}


def test_variances_stay_at_home_when_asked(setup, tmp_path):
    _, world = recordings_of(reconfigured(setup, NO_STEP), tmp_path, 12)
    lean = reconfigured(world, NO_STEP, "privacy.share_variances=false")
    assert len(message_of(world)) - len(message_of(lean)) == pytest.approx(6 * S * D * 4, abs=200)
