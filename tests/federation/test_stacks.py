"""Stacks and blocks of them: shared weights in a whole federation, prepared rows, memory, and who gets the blame."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import CPU, block_of, hand_made, make_server, reconfigured, run, tiny_config

from fedsim.algorithms.batches import ClientRows
from fedsim.errors import ClientError
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.parts import build_parts, initial_state
from fedsim.federation.setup import Setup, prepare
from fedsim.federation.stacks import StackTrainer, local_training
from fedsim.models.adapters.layers import is_linear_weight
from fedsim.models.adapters.shared_weight import SUM_GROUP
from fedsim.models.saved import digest
from fedsim.types import Broadcast, flatten_state

NO_STEP = "feda2v.global_model_train=false"
PLAIN_SGD = (
    NO_STEP,
    "training.optimizer=SGD",
    "training.weight_decay=0",
    "training.clip_norm=0",
    "training.learning_rate=0.05",
)
MANY = (*PLAIN_SGD, "federation.num_clients=40", "data.clips_per_class=32", "federation.global_rounds=2")


@pytest.fixture(scope="module")
def many():
    """Forty clients of one or two batches of 2."""
    return prepare(tiny_config(*MANY, "training.batch_size=2"))


def broadcast_of(setup: Setup) -> Broadcast:
    return Broadcast(1, 7, initial_state(setup, build_parts(setup, CPU)))


def adapter_after(setup: Setup, *overrides: str) -> dict[str, torch.Tensor]:
    return run(reconfigured(setup, *MANY, *overrides))[0].state.adapter


@pytest.mark.parametrize("batch_size", [2, 4])
def test_shared_weights_train_the_federation_that_own_weights_train(many, batch_size):
    # An optimiser that has to multiply the weights out, and takes the same steps: momentum so small that it rounds off.
    size = f"training.batch_size={batch_size}"
    shared = adapter_after(many, size)
    own = adapter_after(many, size, "training.momentum=1e-30")
    start = broadcast_of(many).adapter
    for name, tensor in shared.items():
        torch.testing.assert_close(tensor, own[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, start[name]) or name.endswith(("q.weight", "latents")), name


def test_with_shared_weights_the_size_of_blocks_leaves_rounding_at_most(many):
    reference = adapter_after(many, "training.batch_size=2", "resources.block_size=64")
    for size in (4, 16, 32):
        other = adapter_after(many, "training.batch_size=2", f"resources.block_size={size}")
        for name, tensor in reference.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)
    # Where every client has one batch no block decides otherwise, and groups of the sum are the same.
    digests = {digest(adapter_after(many, "training.batch_size=8", f"resources.block_size={n}")) for n in (32, 64, 128)}
    assert len(digests) == 1


def scarce(trainer: BlockTrainer, most: int) -> None:
    """Let memory run out with more than `most` clients at once."""
    train = trainer._stacks.train

    def limited(data: ClientRows, broadcast: Broadcast, **how):
        if len(data) > most:
            raise torch.OutOfMemoryError("no memory for so many clients")
        return train(data, broadcast, **how)

    trainer._stacks.train = limited


def test_a_halved_block_of_shared_weights_gives_the_same_bits_down_to_a_group_of_the_sum(many, caplog):
    setup = reconfigured(many, *MANY, "training.batch_size=2", "resources.block_size=64")
    block, broadcast = block_of(*np.argsort(many.partition.counts_of(np.arange(40)), kind="stable")), broadcast_of(many)
    whole = BlockTrainer(setup, CPU).train(block, broadcast)
    trainer = BlockTrainer(setup, CPU)
    scarce(trainer, SUM_GROUP)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        halved = trainer.train(block, broadcast)
    assert "training fewer" in caplog.text
    assert all(torch.equal(halved.delta_sum[name], total) for name, total in whole.delta_sum.items())
    assert halved.weight_sum == whole.weight_sum
    assert np.array_equal(halved.metrics.loss_after, whole.metrics.loss_after)
    assert np.array_equal(halved.metrics.train_loss, whole.metrics.train_loss)
    # In smaller parts the sum would have other bits: better to say so than to give others.
    scarce(trainer, SUM_GROUP - 1)
    with pytest.raises(ClientError, match="no memory for so many clients"):
        trainer.train(block, broadcast)


@pytest.mark.parametrize("overrides", [(NO_STEP,), PLAIN_SGD], ids=["AdamW", "plain SGD"])
def test_rows_prepared_in_another_thread_are_the_same(setup, overrides):
    trainer, block = BlockTrainer(reconfigured(setup, *overrides), CPU), block_of(2, 0, 4)
    broadcast = broadcast_of(setup)
    with ThreadPoolExecutor(1) as thread:
        prepared = thread.submit(trainer.prepare, block, broadcast).result()
    assert prepared.client.tolist() == [2, 0, 4]
    one, other = trainer.train(block, broadcast, prepared), trainer.train(block, broadcast)
    assert all(torch.equal(one.delta_sum[name], total) for name, total in other.delta_sum.items())


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_clients_that_start_apart_are_trained_together_as_alone(setup, optimizer):
    # Rows of flat tensors [K, P] are cut into parameters, which don't lie side by side there.
    apart = reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none", f"training.optimizer={optimizer}")
    trainer, broadcast = BlockTrainer(apart, CPU), broadcast_of(apart)
    clients = np.argsort(setup.partition.counts, kind="stable")
    flat = flatten_state(broadcast.adapter).numpy()
    own = np.stack([flat + 0.01 * client for client in clients]).astype(np.float32)
    own.setflags(write=False)  # as an object store gives them
    together = trainer.train(block_of(*clients, own=own), broadcast).updates
    for k, client in enumerate(clients):
        alone = trainer.train(block_of(client, own=own[k : k + 1]), broadcast).updates[0]
        assert together[k].tobytes() == alone.tobytes()
        assert not np.array_equal(alone, own[k])
        assert np.abs(alone - own[k]).max() < 0.5


@pytest.mark.parametrize("wild", range(5))
@pytest.mark.parametrize("momentum", ["0", "0.5"], ids=["shared weights", "own weights"])
def test_the_client_whose_update_is_not_finite_is_named_also_where_its_loss_is(setup, tmp_path, wild, momentum):
    # Without a LayerNorm recordings 1e13 times too large have gradients 1e26 times too large: times the rate, infinite.
    rows = np.random.default_rng(0).standard_normal((10, 4, 32)).astype(np.float32)
    rows[2 * wild : 2 * wild + 2] *= 1e13
    adapters = [f"model.adapters.{head}={{preset: mlp, hidden: [16], norm: false}}" for head in ("clip", "t5")]
    world = hand_made(
        reconfigured(setup, *PLAIN_SGD, *adapters, f"training.momentum={momentum}", "training.learning_rate=1e14"),
        tmp_path,
        rows=rows,
        labels=np.tile([0, 1], 5),
        clients=np.arange(10).reshape(5, 2),
    )
    broadcast = replace(broadcast_of(world), evaluate_clients=False)
    trainer = BlockTrainer(world, CPU)
    with pytest.raises(ClientError, match=rf"^client {wild}, round 1, .*non-finite update \(loss \d"):
        trainer.train(block_of(*range(5)), broadcast)
    if wild < 4:
        fine = trainer.train(block_of(*range(wild + 1, 5)), broadcast)
        assert all(tensor.isfinite().all() for tensor in fine.delta_sum.values())


def test_own_weights_are_counted_wherever_clients_get_some(setup):
    sgd, adamw = reconfigured(setup, *PLAIN_SGD), reconfigured(setup, NO_STEP)
    robust = reconfigured(setup, *PLAIN_SGD, "feda2v.adapter_aggregation_mode=median")
    broadcast = broadcast_of(sgd)
    numbers = flatten_state(broadcast.adapter).numel()
    biases = sum(t.numel() for name, t in broadcast.adapter.items() if not is_linear_weight(name))

    def own(world: Setup, *, steps: int = 1, own: bool = False) -> tuple[int, bool]:
        costs = StackTrainer(world, build_parts(world, CPU)).costs(broadcast, most_steps=steps, own=own)
        return costs.own_bytes, costs.may_share

    assert own(sgd) == (8 * biases, True)
    assert own(sgd, steps=1000) == (8 * numbers, False)
    assert own(sgd, own=True) == (8 * numbers, False)
    assert own(robust) == (8 * numbers, False)
    assert own(adamw) == (16 * numbers, False)


def test_a_stack_of_own_weights_under_sgd_is_halved_to_single_clients(many, caplog):
    setup = reconfigured(many, *MANY, "training.batch_size=1", "federation.local_epochs=8")
    block, broadcast = (
        block_of(*np.argsort(many.partition.counts_of(np.arange(40)), kind="stable")[:6]),
        broadcast_of(many),
    )
    whole = BlockTrainer(setup, CPU).train(block, broadcast)
    trainer = BlockTrainer(setup, CPU)
    scarce(trainer, 1)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        halved = trainer.train(block, broadcast)
    assert "out of memory with 2 clients at once" in caplog.text
    assert all(torch.equal(halved.delta_sum[name], total) for name, total in whole.delta_sum.items())


@pytest.mark.parametrize("overrides", [(NO_STEP,), PLAIN_SGD], ids=["AdamW", "plain SGD"])
def test_the_size_of_a_stack_is_a_power_of_two_that_shrinks_with_the_work_of_a_client(setup, overrides):
    sizes = []
    for width, batch_size in ((16, 4), (256, 4), (256, 64), (4096, 512)):
        wide = (f"model.adapters.clip.hidden=[{width}]", f"training.batch_size={batch_size}")
        other = reconfigured(setup, *overrides, *wide)
        stacks = StackTrainer(other, build_parts(other, CPU))
        sizes.append(stacks.size(stacks.costs(broadcast_of(other), most_steps=1, own=False)))
    assert all(size & (size - 1) == 0 and size >= 1 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_a_server_trains_with_the_settings_of_its_configuration(setup):
    how = local_training(tiny_config(*PLAIN_SGD, "federation.local_epochs=3", "training.precision=bfloat16"))
    assert (how.optimizer, how.local_epochs, how.precision, how.linear_steps) == ("SGD", 3, "bfloat16", True)
    rough = make_server(reconfigured(setup, NO_STEP, "training.precision=bfloat16"))
    exact = make_server(reconfigured(setup, NO_STEP))
    start = exact.state.adapter
    for server in (rough, exact):
        server.run_round()
    for name, tensor in rough.state.adapter.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, exact.state.adapter[name])
        moved = float((exact.state.adapter[name] - start[name]).norm())
        assert float((tensor - exact.state.adapter[name]).norm()) < 0.5 * moved + 1e-6, name
