"""Packing: what goes in comes out, owned by its reader."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from worlds import CPU, make_server, reconfigured

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
from fedsim.types import Block, Broadcast

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
    broadcast = Broadcast(3, 7, STATE, evaluate_personal=True)
    record, packed = pack_broadcast(broadcast)
    assert record.adapter == {}
    same(unpack_broadcast((record, packed)), broadcast)
    block = Block(2, (5, 9), {9: STATE})
    record, personal = pack_block(block)
    assert record.personal == {}
    same(unpack_block((record, personal)), block)


@pytest.mark.parametrize("mode", ["weighted", "none"])
@pytest.mark.parametrize("variances", ["true", "false"])
def test_updates_make_the_round_trip(setup, mode, variances):
    options = (f"feda2v.adapter_aggregation_mode={mode}", f"privacy.share_variances={variances}")
    setup = reconfigured(setup, *options)
    start = make_server(setup).state.adapter
    update = BlockTrainer(setup, CPU).train(Block(0, (1, 2)), Broadcast(1, 7, start))
    assert (update.delta_sum is None) == (mode == "none")
    assert (update.stats.audio_var is None) == (variances == "false")
    same(unpack_update(pack_update(update)), update)


def test_unpacked_tensors_own_their_memory():
    packed = pack_state(STATE)
    packed.vector.flags.writeable = False  # as arrays from the object store are
    first = unpack_state(packed)
    for tensor in first.values():
        tensor += 1
    same(unpack_state(packed), STATE)


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
    update = BlockTrainer(setup, CPU).train(Block(0, (1, 2)), broadcast)
    reference = ray.put(pack_update(update))
    first = unpack_update(ray.get(reference))
    for array in (*first.delta_sum.values(), first.stats.audio_mean, first.stats.audio_var):
        array.fill_(torch.nan)
    first.stats.count.fill(0)
    same(unpack_update(ray.get(reference)), replace(update))
