"""Local training: a block is its clients one by one, one client is a plain torch loop, and padding is nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clients import C, D, S, client_rows, training, world

from fedsim.algorithms.aggregation import Average, tree_sum
from fedsim.algorithms.local_training import batch_plan, lay_out, loss_and_grads, num_batches, train_stack
from fedsim.algorithms.statistics import evaluate_stack
from fedsim.models.adapters import stack
from fedsim.seeding import rng

COUNTS = [1, 2, 4, 4, 5, 8, 9, 13]  # ordered by batches of 4


def trained(clients, *, how, seed=0, contrastive_weight=0.0, shared=True):
    """Parameters and last-epoch losses after local training, of clients that start from one state (or one each)."""
    adapter, objective, model = world(contrastive_weight=contrastive_weight)
    if shared:
        params = stack(adapter.init(seed), len(clients))
    else:
        states = [adapter.init(client.client) for client in clients]
        params = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    losses = train_stack(model, params, clients, objective=objective, how=how)
    return params, losses


def evaluated(params, clients, **kwargs):
    _, objective, model = world()
    return evaluate_stack(model, params, clients, objective=objective, batch_size=4, stats_min_count=1, **kwargs)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_a_block_equals_its_clients_one_by_one_bit_for_bit(optimizer, block_size, shared):
    how = training(optimizer=optimizer, momentum=0.9 if optimizer == "SGD" else 0.0)
    for start in range(0, len(COUNTS), block_size):
        members = range(start, start + block_size)
        block = [client_rows(k, COUNTS[k]) for k in members]
        params, losses = trained(block, how=how, shared=shared, contrastive_weight=0.3)
        together = evaluated(params, block)
        for position, k in enumerate(members):
            alone = [client_rows(k, COUNTS[k])]
            own, loss = trained(alone, how=how, shared=shared, contrastive_weight=0.3)
            assert all(torch.equal(params[name][position], own[name][0]) for name in own)
            assert losses[position] == loss[0]
            single = evaluated(own, alone)
            assert together.loss[position] == single.loss[0]
            assert together.accuracy[position] == single.accuracy[0]
            mine = together.stats.take(np.flatnonzero(together.stats.client == k))
            assert mine.label.tolist() == single.stats.label.tolist()
            assert mine.count.tolist() == single.stats.count.tolist()
            assert torch.equal(mine.audio_mean, single.stats.audio_mean)
            assert torch.equal(mine.audio_var, single.stats.audio_var)
            for head, mean in single.stats.output_mean.items():
                assert torch.equal(mine.output_mean[head], mean)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_block_equals_its_clients_one_by_one_at_real_widths(optimizer):
    sizes = {"shapes": {"clip": (768,), "t5": (17, 64)}, "hidden": (128,), "width": 64, "input_shape": (4, 512)}
    _, objective, model = world(**sizes, contrastive_weight=0.1)
    how = training(optimizer=optimizer, batch_size=32, local_epochs=1)

    def deltas(members):
        clients = [client_rows(k, [1, 32, 33, 70][k], input_shape=(4, 512)) for k in members]
        params = stack(model.adapter.init(0), len(members))
        losses = train_stack(model, params, clients, objective=objective, how=how)
        return params, losses

    together, losses = deltas(range(4))
    for k in range(4):
        alone, loss = deltas([k])
        assert all(torch.equal(together[name][k], alone[name][0]) for name in alone)
        assert losses[k] == loss[0]


def plain_loop(client, *, how, epochs, contrastive_weight=0.0):
    """What a textbook does with one client: torch.optim on leaves, real rows only, the loss spelt out."""
    adapter, objective, _ = world(contrastive_weight=contrastive_weight)
    params = {name: p.requires_grad_() for name, p in stack(adapter.init(0)).items()}
    if how.optimizer == "AdamW":
        optimizer = torch.optim.AdamW(params.values(), lr=how.learning_rate, weight_decay=how.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            params.values(), lr=how.learning_rate, weight_decay=how.weight_decay, momentum=how.momentum
        )
    plan = batch_plan(len(client.labels), batch_size=how.batch_size, epochs=epochs, stream=client.stream)
    for step in plan:
        rows = torch.from_numpy(step[step >= 0])
        labels = client.labels[rows]
        loss = torch.zeros(())
        for head, out in adapter.forward(params, client.inputs[rows].unsqueeze(0)).items():
            targets = objective.targets[head]
            loss = loss + ((out[0] - targets[labels]) ** 2).mean() / targets.var(0, unbiased=False).mean()
            if contrastive_weight:
                centred = (targets - targets.mean(0)).flatten(1)
                cosine = torch.nn.functional.cosine_similarity(
                    (out[0] - targets.mean(0)).flatten(1).unsqueeze(1), centred.unsqueeze(0), dim=2
                )
                loss = loss + contrastive_weight * torch.nn.functional.cross_entropy(cosine / 0.5, labels)
        optimizer.zero_grad()
        loss.backward()
        if how.clip_norm:
            torch.nn.utils.clip_grad_norm_(params.values(), how.clip_norm)
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 0.0},
        {"optimizer": "SGD", "momentum": 0.9},
        {"optimizer": "SGD", "weight_decay": 0.0, "clip_norm": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("contrastive_weight", [0.0, 0.5])
@pytest.mark.parametrize("count", [4, 11])
def test_one_client_is_a_plain_torch_loop_step_for_step(changes, contrastive_weight, count):
    # With 4 recordings an epoch is one step; 11 make two whole batches and a short one.
    for epochs in range(1, 6):
        how = training(local_epochs=epochs, **changes)
        ours, _ = trained([client_rows(0, count)], how=how, contrastive_weight=contrastive_weight)
        plain = plain_loop(client_rows(0, count), how=how, epochs=epochs, contrastive_weight=contrastive_weight)
        for name, p in plain.items():
            torch.testing.assert_close(ours[name], p, atol=2e-6, rtol=2e-5)


def test_equal_clients_average_to_one_client():
    clients = [client_rows(k, 6, stream_key=0, data_key=0) for k in range(4)]
    params, losses = trained(clients, how=training())
    one, loss = trained([client_rows(0, 6)], how=training())
    start = world()[0].init(0)
    average, rule = {}, Average()
    deltas = {name: p - start[name] for name, p in params.items()}
    average = rule.step(start, {name: tree_sum(d) for name, d in deltas.items()}, 4 * rule.weight(6))
    alone = rule.step(start, {name: p[0] - start[name] for name, p in one.items()}, rule.weight(6))
    assert all(torch.equal(average[name], alone[name]) for name in alone)
    assert set(losses) == set(loss)


def test_clients_with_other_streams_or_data_differ():
    clients = [client_rows(0, 8), client_rows(1, 8, data_key=0), client_rows(2, 8, stream_key=0)]
    params, losses = trained(clients, how=training())
    assert len(set(losses)) == 3
    for name in params:
        assert not torch.equal(params[name][0], params[name][1]), name
        assert not torch.equal(params[name][0], params[name][2]), name


@pytest.mark.parametrize(("count", "batch_size", "epochs"), [(1, 4, 1), (4, 4, 3), (9, 4, 2), (5, 1, 2)])
def test_a_plan_takes_every_recording_once_an_epoch_in_a_new_order(count, batch_size, epochs):
    plan = batch_plan(count, batch_size=batch_size, epochs=epochs, stream=rng(0, "x"))
    assert plan.shape == (epochs * num_batches(count, batch_size), batch_size)
    orders = [epoch[epoch >= 0].tolist() for epoch in plan.reshape(epochs, -1)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len(set(map(tuple, orders))) == epochs or count == 1
    # Only the last batch of an epoch is padded, at its end.
    assert ((plan.reshape(epochs, -1) >= 0).cumprod(1).sum(1) == count).all()


def test_fewer_epochs_are_a_prefix_of_more():
    short, long = (batch_plan(9, batch_size=4, epochs=e, stream=rng(0, "x")) for e in (2, 5))
    assert np.array_equal(short, long[: len(short)])


def test_local_epochs_are_respected_and_the_loss_is_that_of_the_last():
    adapter, objective, model = world()
    # SGD without momentum has no memory: two epochs are one epoch and another one.
    how = training(optimizer="SGD", weight_decay=0.0, local_epochs=1)
    params, losses = stack(adapter.init(0)), []
    client = client_rows(0, 9)
    for _ in range(3):
        losses.append(train_stack(model, params, [client], objective=objective, how=how)[0])
        both, loss = trained([client_rows(0, 9)], how=replace(how, local_epochs=len(losses)))
        assert all(torch.equal(params[name], both[name]) for name in params)
        assert loss[0] == losses[-1]
    assert losses[0] > losses[1] > losses[2]


def test_the_reported_loss_is_the_mean_over_recordings():
    adapter, objective, model = world()
    # A step so small that parameters stay: then the loss of the epoch is that of the client's recordings.
    client = client_rows(0, 9)
    params = stack(adapter.init(0))
    loss = train_stack(model, params, [client], objective=objective, how=training(learning_rate=1e-12))
    outputs = adapter.forward(stack(adapter.init(0)), client.inputs.unsqueeze(0))
    assert loss[0] == pytest.approx(float(objective.loss_rows(outputs, client.labels.unsqueeze(0)).mean()), rel=1e-5)


@pytest.mark.parametrize("filling", [0.0, 1e6, -1e9])
def test_what_lies_in_padded_rows_changes_no_gradient(filling):
    adapter, objective, model = world(contrastive_weight=0.3)
    clients = [client_rows(0, 1), client_rows(1, 3)]
    plans = [batch_plan(len(c.labels), batch_size=4, epochs=1, stream=c.stream) for c in clients]
    batches = lay_out(clients, plans)
    assert batches.mask.sum(2).tolist() == [[1], [3]]
    padded = batches.mask == 0
    dirty = replace(
        batches,
        inputs=torch.cat([batches.inputs, torch.full((1, S, D), filling) * torch.linspace(1, 2, D)]),
        lengths=torch.cat([batches.lengths, torch.zeros(1, dtype=torch.int64)]),
        labels=torch.cat([batches.labels, torch.tensor([C - 1])]),
        index=torch.where(padded, len(batches.labels), batches.index),
    )
    params = stack(adapter.init(0), 2)
    results = [loss_and_grads(model, params, b.take(0, 0), objective=objective) for b in (batches, dirty)]
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name
        assert grad.abs().sum() > 0 or name.startswith("t5.pool.q"), name


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_broken_client_breaks_no_neighbour(position, value):
    # Also not through padding, which must repeat a client's own rows and nobody else's.
    clients = [client_rows(k, 5) for k in range(3)]
    broken = replace(clients[position], inputs=torch.full_like(clients[position].inputs, value))
    mixed = [broken if k == position else client for k, client in enumerate(clients)]
    params, losses = trained(mixed, how=training())
    after = evaluated(params, mixed)
    for k in range(3):
        if k != position:
            own, loss = trained([client_rows(k, 5)], how=training())
            assert all(torch.equal(params[name][k], own[name][0]) for name in own)
            assert losses[k] == loss[0]
            assert after.loss[k] == evaluated(own, [client_rows(k, 5)]).loss[0]


def test_clients_leave_the_stack_when_their_steps_are_done():
    clients = [client_rows(k, count) for k, count in enumerate([1, 4, 5, 12])]
    plans = [batch_plan(len(c.labels), batch_size=4, epochs=2, stream=c.stream) for c in clients]
    batches = lay_out(clients, plans)
    assert batches.steps.tolist() == [2, 2, 4, 6]
    assert [batches.first_active(step) for step in range(6)] == [0, 0, 2, 2, 3, 3]
    inputs, lengths, labels, mask = batches.take(2, 3)
    assert inputs.shape == (2, 4, S, D)
    assert lengths.shape == labels.shape == mask.shape == (2, 4)
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(inputs[0, 0], clients[2].inputs[plans[2][3, 0]])
