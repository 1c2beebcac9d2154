"""Packing: what goes in comes out, owned by its reader."""

from __future__ import annotations

import gc
import pickle
import time
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from worlds import CPU, SERVER_STEP, block_of, make_server, reconfigured

from fedsim.cluster.wire import (
    pack_block,
    pack_broadcast,
    pack_state,
    pack_update,
    unpack_block,
    unpack_broadcast,
    unpack_state,
    unpack_update,
)
from fedsim.errors import ModelError
from fedsim.federation.blocks import BlockTrainer
from fedsim.types import Block, BlockUpdate, Broadcast, ClassStats, ClientMetrics

STATE = {
    "matrix": torch.arange(6.0).view(2, 3),
    "turned": torch.arange(6.0).view(2, 3).T,
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "row": torch.tensor([1.0, float("inf"), -0.0]),
}


def same(one, other) -> None:
    """Equal in everything, deep down."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif hasattr(one, "__dataclass_fields__"):
        for field in fields(one):
            same(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


def test_a_state_makes_the_round_trip_in_one_vector():
    packed = pack_state(STATE)
    assert packed.vector.dtype == np.float32
    assert packed.vector.shape == (6 + 6 + 1 + 0 + 3,)
    same(unpack_state(packed), STATE)
    assert np.signbit(packed.vector[-1])


def test_an_empty_state_makes_the_round_trip():
    assert unpack_state(pack_state({})) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_other_numbers_than_float32_are_refused(dtype):
    with pytest.raises(ModelError, match=f"only float32 tensors are federated, w is {dtype}"):
        pack_state({"w": torch.zeros(2, dtype=dtype)})


def test_broadcasts_and_blocks_make_the_round_trip():
    for extra in ({}, {"basis": torch.eye(3)[:, :2], "deviation": torch.ones(3)}):
        broadcast = Broadcast(3, 7, STATE, evaluate_personal=True, extra=extra)
        record, packed, sent = pack_broadcast(broadcast)
        assert record.adapter == {}
        assert record.extra == {}
        same(unpack_broadcast((record, packed, sent)), broadcast)
    for own in (None, np.ones((2, 3), dtype=np.float32)):
        block = Block(2, np.array([5, 9]), own)
        same(unpack_block(pack_block(block)), block)


@pytest.mark.parametrize("mode", ["weighted", "none", "median"])
@pytest.mark.parametrize("variances", ["true", "false"])
def test_updates_make_the_round_trip(setup, mode, variances):
    options = (f"feda2v.adapter_aggregation_mode={mode}", f"privacy.share_variances={variances}")
    setup = reconfigured(setup, *SERVER_STEP, *options, "feda2v.statistics_rows=2")
    start = make_server(setup).state.adapter
    extra = {"basis": torch.eye(128)[:, :3]} if mode == "weighted" else {}
    update = BlockTrainer(setup, CPU).train(block_of(1, 2, 3), Broadcast(1, 7, start, extra=extra))
    assert sorted(update.sums) == (["diagonal", "freedom", "product"] if extra else [])
    assert (update.delta_sum is None) == (update.updates is not None) == (mode != "weighted")
    assert len(update.stats) == 2
    assert update.stats.threshold > 0
    assert (update.stats.audio_var is None) == (variances == "false")
    same(unpack_update(pack_update(update)), update)


def test_unpacked_tensors_own_their_memory():
    packed = pack_state(STATE)
    packed.vector.flags.writeable = False  # as arrays from the object store are
    first = unpack_state(packed)
    for tensor in first.values():
        tensor += 1
    same(unpack_state(packed), STATE)


def frozen(message):
    """As Ray hands it out: arrays over one piece of memory that can't be written to."""
    buffers = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])


def large_update(clients: int) -> BlockUpdate:
    """A block of many small clients: three classes each, embeddings of 64 numbers, outputs of 32."""
    random, rows = np.random.default_rng(0), 3 * clients
    numbers = random.random(clients)
    stats = ClassStats(
        client=np.repeat(np.arange(clients), 3),
        label=np.tile(np.arange(3), clients),
        count=np.full(rows, 5),
        audio_mean=torch.rand(rows, 1, 64),
        audio_var=torch.rand(rows, 1, 64),
        output_mean={"clip": torch.rand(rows, 32)},
    )
    metrics = ClientMetrics(np.arange(clients), np.full(clients, 20), *[numbers] * 6)
    delta = {"first.weight": torch.rand(64, 64), "last.weight": torch.rand(32, 64), "last.bias": torch.rand(32)}
    return BlockUpdate(3, delta, 4096.0, stats, metrics, None, 0.5)


def test_an_update_is_read_where_it_lies(recwarn):
    whole = large_update(10)
    message = frozen(pack_update(whole))
    assert not message["delta_sum"].vector.flags.writeable
    update = unpack_update(message)
    same(update, whole)
    delta = message["delta_sum"].vector.__array_interface__["data"][0]
    assert update.delta_sum["first.weight"].data_ptr() == delta
    assert update.stats.audio_mean.data_ptr() == message["audio_mean"].__array_interface__["data"][0]
    assert not recwarn.list  # torch's warning about read-only memory is meant for others


def test_an_update_that_is_dropped_lets_its_message_go():
    message = frozen(pack_update(large_update(10)))
    vector = message["delta_sum"].vector
    gone = weakref.ref(vector)
    update = unpack_update(message)
    del message, vector
    assert gone() is not None
    del update
    gc.collect()
    assert gone() is None


def test_a_block_of_many_small_clients_is_packed_and_unpacked_in_no_time():
    update, spent = large_update(4096), []
    for _ in range(20):
        start = time.process_time()
        unpack_update(pack_update(update))
        spent.append(time.process_time() - start)
    assert min(spent) < 0.003


@pytest.mark.ray
def test_a_reader_can_not_change_what_others_read(setup, cluster):
    import ray

    server = make_server(setup)
    broadcast = Broadcast(1, 7, server.state.adapter)
    reference = ray.put(pack_broadcast(broadcast))
    assert not ray.get(reference)[1].vector.flags.writeable
    first = unpack_broadcast(ray.get(reference))
    for tensor in first.adapter.values():
        tensor.fill_(torch.nan)
    same(unpack_broadcast(ray.get(reference)), broadcast)


@pytest.mark.ray
def test_updates_come_through_the_object_store(setup, cluster):
    import ray

    update = BlockTrainer(setup, CPU).train(block_of(1, 2), Broadcast(1, 7, make_server(setup).state.adapter))
    reference = ray.put(pack_update(update))
    same(unpack_update(ray.get(reference)), replace(update))
