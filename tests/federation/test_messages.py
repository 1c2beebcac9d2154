"""What leaves a client: its size, its contents, and what is refused on arrival."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import CPU, SERVER_STEP, block_of, hand_made, make_server, reconfigured

from fedsim.cluster.wire import pack_update
from fedsim.errors import ClientError
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.messages import check_update, measured_metrics, shown
from fedsim.types import Block, Broadcast, flatten_state, unflatten_state

S, D = 4, 32


@pytest.fixture
def trained(setup):
    """A block's update, the block, what is expected of it, and the broadcast that it answers."""
    server = make_server(setup)
    block = Block(2, np.argsort(setup.partition.counts, kind="stable")[-2:])
    broadcast = Broadcast(3, 7, server.state.adapter, extra={"basis": torch.eye(S * D)[:, :3]})
    update = BlockTrainer(setup, CPU).train(block, broadcast)
    assert len(update.stats) >= 2
    return update, block, server._expected, broadcast


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
    "no spread": (lambda u: replace(u, sums={}), "its sums are [], expected ['diagonal', "),
    "spread's shape": (
        lambda u: replace(u, sums=changed(u.sums, "product", torch.zeros(S * D, 4))),
        "the sum product has shape [128, 4], expected [128, 3]",
    ),
    "spread not finite": (
        lambda u: replace(u, sums=changed(u.sums, "product", torch.full((S * D, 3), torch.inf))),
        "the sum product has non-finite numbers",
    ),
    "negative spread": (
        lambda u: replace(u, sums=changed(u.sums, "diagonal", torch.full((S * D,), -1.0))),
        "the sum diagonal has negative numbers",
    ),
    "no update": (lambda u: replace(u, delta_sum=None), "it holds no sum of its clients' updates"),
    "weight": (lambda u: replace(u, weight_sum=float("nan")), "its weight is nan"),
    "negative weight": (lambda u: replace(u, weight_sum=-1.0), "its weight is -1.0"),
    "loss": (
        lambda u: replace(u, metrics=replace(u.metrics, train_loss=u.metrics.train_loss * np.nan)),
        "train_loss of client ",
    ),
    "accuracy": (
        lambda u: replace(u, metrics=replace(u.metrics, accuracy_after=np.array([0.5, np.inf]))),
        "accuracy_after of client ",
    ),
    "fewer numbers": (
        lambda u: replace(u, metrics=replace(u.metrics, loss_before=u.metrics.loss_before[:1])),
        "loss_before has shape [1], expected [2]",
    ),
    "label too large": (
        lambda u: replace(u, stats=replace(u.stats, label=u.stats.label + 4)),
        "class statistics name a class outside 0 ... 3",
    ),
    "negative label": (
        lambda u: replace(u, stats=replace(u.stats, label=u.stats.label - 4)),
        "class statistics name a class outside 0 ... 3",
    ),
    "fewer labels": (
        lambda u: replace(u, stats=replace(u.stats, label=u.stats.label[1:])),
        "class statistics have ",
    ),
    "other head": (
        lambda u: replace(u, stats=replace(u.stats, output_mean={"clip": u.stats.output_mean["clip"]})),
        "class statistics of heads ['clip'], expected ['clip', 't5']",
    ),
    "shape of outputs": (
        lambda u: replace(
            u,
            stats=replace(
                u.stats, output_mean=changed(u.stats.output_mean, "t5", u.stats.output_mean["t5"].flatten(1))
            ),
        ),
        "t5 has shape ",
    ),
    "shape of means": (
        lambda u: replace(u, stats=replace(u.stats, audio_mean=u.stats.audio_mean[:, :2])),
        "audio_mean has shape ",
    ),
    "shape of variances": (
        lambda u: replace(u, stats=replace(u.stats, audio_var=u.stats.audio_var[..., :1])),
        "audio_var has shape ",
    ),
    "negative variance": (
        lambda u: replace(u, stats=replace(u.stats, audio_var=u.stats.audio_var - 1000)),
        "audio_var has negative numbers",
    ),
    "nan count": (
        lambda u: replace(u, stats=replace(u.stats, count=u.stats.count * np.nan)),
        "class statistics of fewer than privacy.min_count = 2 recordings",
    ),
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
    update, block, expected, broadcast = trained
    check_update(update, block, expected, broadcast)
    with pytest.raises(ClientError) as caught:
        check_update(broken(update), block, expected, broadcast)
    clients = ", ".join(map(str, block.client_ids))
    assert str(caught.value).startswith(f"round 3, block 2 (clients {clients}): bad update: {problem}")


def test_numbers_that_overflow_in_a_sum_are_no_mistake(trained):
    update, block, expected, broadcast = trained
    large = {name: torch.full_like(t, 3e38) for name, t in update.delta_sum.items()}
    assert not torch.isfinite(large["clip.last.bias"].sum())
    check_update(replace(update, delta_sum=large), block, expected, broadcast)


def test_numbers_that_a_round_does_not_measure_may_be_missing(trained):
    update, block, expected, broadcast = trained
    unknown = np.full(2, np.nan)
    quiet = replace(update.metrics, loss_before=unknown, accuracy_after=unknown, held_out_accuracy=unknown)
    with pytest.raises(ClientError, match="loss_before of client"):
        check_update(replace(update, metrics=quiet), block, expected, broadcast)
    check_update(replace(update, metrics=quiet), block, expected, replace(broadcast, evaluate_clients=False))
    assert measured_metrics(replace(broadcast, evaluate_clients=False)) == ("train_loss",)
    assert measured_metrics(replace(broadcast, evaluate_personal=True))[-1] == "held_out_accuracy"


@pytest.mark.parametrize("mode", ["none", "median"])
def test_rows_of_updates_are_checked_too(setup, mode):
    setup = reconfigured(setup, *SERVER_STEP, f"feda2v.adapter_aggregation_mode={mode}")
    server = make_server(setup)
    block, broadcast = block_of(1, 2), Broadcast(1, 7, server.state.adapter)
    update = BlockTrainer(setup, CPU).train(block, broadcast)
    check_update(update, block, server._expected, broadcast)
    rows, size = update.updates, update.updates.shape[1]
    infinite = rows.copy()
    infinite[1, 5] = np.inf
    for wrong, problem in (
        (infinite, "its updates have non-finite numbers"),
        (None, "it holds no updates of its clients"),
        (rows[:1], rf"its updates are float32 \[1, {size}\], expected float32 \[2, {size}\]"),
        (rows[:, 1:], rf"its updates are float32 \[2, {size - 1}\]"),
        (rows.astype(np.float64), "its updates are float64"),
    ):
        with pytest.raises(ClientError, match=problem):
            check_update(replace(update, updates=wrong), block, server._expected, broadcast)


def test_a_message_names_eight_clients_and_no_more():
    assert shown([3]) == "3"
    assert shown(np.arange(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert shown(np.arange(4096)) == "0, 1, 2, 3, 4, 5, 6, 7, ..."
    assert shown([0, 1], {0: "hall", 1: "kitchen"}.__getitem__) == "hall, kitchen"


def recordings_of(setup, folder, count: int):
    """A federation of two clients with `count` recordings each, of the same three classes."""
    rows = np.random.default_rng(0).standard_normal((2 * count, S, D), dtype=np.float32)
    labels = np.arange(2 * count) % 3
    world = hand_made(setup, folder, rows=rows, labels=labels, clients=[range(0, count), range(count, 2 * count)])
    return rows, world


def message_of(world, *, client_ids=(0, 1)) -> bytes:
    start = make_server(world).state.adapter
    update = BlockTrainer(world, CPU).train(block_of(*client_ids), Broadcast(1, 7, start))
    return pickle.dumps(pack_update(update), protocol=5)


def test_the_size_of_a_message_does_not_depend_on_the_number_of_recordings(setup, tmp_path):
    sizes = [len(message_of(recordings_of(setup, tmp_path, n)[1])) for n in (10, 1000)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("mode", ["weighted", "none"])
def test_no_recording_is_in_a_message(setup, tmp_path, mode):
    setup = reconfigured(setup, *SERVER_STEP, f"feda2v.adapter_aggregation_mode={mode}")
    rows, world = recordings_of(setup, tmp_path, 12)
    message = message_of(world)
    server = make_server(world)
    start = server.state.adapter
    own = reconfigured(world, *SERVER_STEP, "feda2v.adapter_aggregation_mode=none")
    trained = BlockTrainer(own, CPU).train(block_of(0, 1), Broadcast(1, 7, start)).updates
    after = [unflatten_state(torch.from_numpy(row), start) for row in trained]
    assert flatten_state(after[1]).numpy().tobytes() == trained[1].tobytes()
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
        config = reconfigured(setup, *SERVER_STEP, f"privacy.min_count={minimum}")
        world = hand_made(config, tmp_path, rows=rows, labels=[0, 1, 1, 1, 1], clients=[range(5)])
        found[minimum] = rows[0].tobytes() in message_of(world, client_ids=(0,))
    assert found == {1: True, 2: False}


def test_variances_stay_at_home_when_asked(setup, tmp_path):
    _, world = recordings_of(setup, tmp_path, 12)
    lean = reconfigured(world, *SERVER_STEP, "privacy.share_variances=false")
    assert len(message_of(world)) - len(message_of(lean)) == pytest.approx(6 * S * D * 4, abs=200)
