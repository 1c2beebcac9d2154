"""No local epochs: clients send statistics alone, and the server trains the adapter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import (
    CPU,
    SERVER_STEP,
    ReorderedPool,
    block_of,
    digest_after,
    kept_of,
    make_server,
    numbers,
    reconfigured,
    run,
    tiny_config,
)

from fedsim.algorithms.local_training import shared_start
from fedsim.algorithms.statistics import evaluate_stack
from fedsim.errors import ClientError
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.clock import RoundClock
from fedsim.federation.parts import build_parts, initial_state
from fedsim.federation.server_step import ServerStep
from fedsim.federation.setup import prepare
from fedsim.models.saved import digest
from fedsim.types import Broadcast, Learnt

SERVER_ONLY = (*SERVER_STEP, "federation.local_epochs=0")


@pytest.mark.parametrize("mode", ["avg", "weighted", "median", "krum"])
def test_the_adapter_after_a_round_is_the_start_refined(setup, mode):
    setup = reconfigured(
        setup, *SERVER_ONLY, f"feda2v.adapter_aggregation_mode={mode}", "feda2v.generator_type=gaussian"
    )
    server, _ = run(setup, 1)
    parts = build_parts(setup, CPU)
    start = initial_state(setup, parts)
    data = BlockTrainer(setup, CPU).prepare(block_of(*server._sample_cohort(1)), Broadcast(1, 7, start))
    measured = evaluate_stack(
        parts.model,
        shared_start(start, len(data)),
        data,
        objective=parts.objective,
        batch_size=4,
        stats_min_count=2,
    )
    order = np.lexsort((measured.stats.label, measured.stats.client))
    by_hand = ServerStep(setup, parts, {}).run(
        start, measured.stats.take(order), None, Learnt(), RoundClock(1, lambda _: None)
    )
    assert digest(server.state.adapter) == digest(by_hand.adapter) != digest(start)


def test_local_training_leaves_the_server_s_part_alone(setup):
    # Where clients keep their own adapters the server's moves by refinement alone; so it does where none trains, as
    # long as targets are the public ones.
    public = (*SERVER_STEP, "feda2v.global_model_train_from_nodes_adapters=false")
    apart = reconfigured(setup, *public, "feda2v.adapter_aggregation_mode=none")
    server_only = reconfigured(setup, *public, "federation.local_epochs=0")
    assert digest_after(server_only, 3) == digest_after(apart, 3)


def test_the_loss_is_that_of_the_adapter_that_was_sent(setup):
    setup = reconfigured(setup, *SERVER_ONLY, "experiment.evaluate_every=2", "federation.global_rounds=3")
    server = make_server(setup)
    results = []
    for _ in range(3):
        sent = server.state.adapter
        results.append(server.run_round())
        trainer, broadcast = BlockTrainer(setup, CPU), Broadcast(1, 7, sent, evaluate_clients=True)
        losses = [trainer.train(block_of(client), broadcast).metrics.loss_before[0] for client in range(7)]
        assert results[-1].metrics["train/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    # Refinement is training: the clients' loss falls, though they do nothing.
    losses = [result.metrics["train/loss"] for result in results]
    assert losses[2] < losses[0]
    for result in results:
        assert np.isfinite(list(result.metrics.values())).all()
    for result in results[1:]:
        assert result.metrics["train/loss_before"] == result.metrics["train/loss_after"] == result.metrics["train/loss"]
        assert result.metrics["train/accuracy_before"] == result.metrics["train/accuracy_after"]
    assert "train/loss_before" not in results[0].metrics


def test_the_change_is_exactly_zero(setup):
    setup = reconfigured(setup, *SERVER_ONLY)
    start = make_server(setup).state.adapter
    update = BlockTrainer(setup, CPU).train(block_of(0, 3, 5), Broadcast(1, 7, start))
    assert all(not tensor.any() for tensor in update.delta_sum.values())
    rows = BlockTrainer(reconfigured(setup, *SERVER_ONLY, "feda2v.adapter_aggregation_mode=median"), CPU)
    assert not rows.train(block_of(0, 3, 5), Broadcast(1, 7, start)).updates.any()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("kind", ["vae", "full"])
def test_order_and_blocks_leave_no_trace(setup, kind, optimizer):
    options = (*SERVER_ONLY, f"feda2v.generator_type={kind}", f"training.optimizer={optimizer}")
    setup = reconfigured(setup, *options)
    server, results = run(setup, 2)
    backwards = ReorderedPool(setup, lambda updates, _: updates[::-1])
    for other in (
        run(setup, 2, pool=backwards),
        run(reconfigured(setup, *options, "resources.block_size=1"), 2),
        run(reconfigured(setup, *options, "resources.block_size=8"), 2),
    ):
        assert digest(other[0].state.adapter) == digest(server.state.adapter)
        assert numbers(other[1]) == numbers(results)


def test_only_statistics_go_up(setup):
    _, (trained,) = run(reconfigured(setup, *SERVER_STEP), 1)
    server, (idle,) = run(reconfigured(setup, *SERVER_ONLY), 1)
    adapter = 4 * sum(tensor.numel() for tensor in server.state.adapter.values())
    assert trained.bytes_up - idle.bytes_up == 7 * adapter
    assert trained.bytes_down == idle.bytes_down


def test_clients_apart_keep_what_they_began_with(setup):
    setup = reconfigured(setup, *SERVER_ONLY, "feda2v.adapter_aggregation_mode=none")
    server, results = run(setup, 2)
    assert len(set(kept_of(server).values())) == 1
    assert np.isfinite(list(results[-1].metrics.values())).all()


@pytest.mark.slow
def test_encoder_layers_stay_as_they_are():
    ast = (
        "model.audio_encoder={name: tiny_ast, segments: 2, dim: 16, trainable: 'last:1'}",
        "data.clips_per_class=4",
        "federation.num_clients=3",
        *SERVER_ONLY,
    )
    setup = prepare(tiny_config(*ast))
    start = initial_state(setup, build_parts(setup, CPU))
    server, _ = run(setup, 1)
    for name, tensor in server.state.adapter.items():
        assert torch.equal(tensor, start[name]) == name.startswith("encoder.")


def test_a_loss_that_is_not_finite_still_stops_the_round(setup):
    setup = reconfigured(setup, *SERVER_ONLY)
    server = make_server(setup)
    broken = {name: torch.full_like(tensor, 1e30) for name, tensor in server.state.adapter.items()}
    server.state = replace(server.state, adapter=broken)
    with pytest.raises(ClientError, match="non-finite update") as caught:
        server.run_round()
    assert "\n" not in str(caught.value)
