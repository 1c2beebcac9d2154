"""Local training: a stack is its clients one by one, one client is a plain torch loop, and padding is nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clients import AsItIs, C, Parabola, dense, joined, parabolas, plain_sgd, steps_of, training
from clients import client_rows as rows_of_shape
from clients import world as world_of_sizes

from fedsim.algorithms.aggregation import tree_sum
from fedsim.algorithms.batches import Batches
from fedsim.algorithms.local_training import Buffers, loss_and_grads, shared_start, train_stack
from fedsim.algorithms.statistics import evaluate_stack
from fedsim.models.adapters import stack
from fedsim.models.adapters.shared_weight import SharedWeight

COUNTS = [1, 2, 4, 4, 5, 8, 9, 13]  # ordered by batches of 4
# Multiples of 16: torch's fused AdamW rounds the rest of a tensor in another way, and that would move with the stack.
S, D = 2, 16
SIZES = {"shapes": {"clip": (16,), "t5": (3, 16)}, "hidden": (16,), "width": 16, "input_shape": (S, D)}


def world(**changes):
    return world_of_sizes(**{**SIZES, **changes})


def client_rows(client, count, *, input_shape=(S, D), **kwargs):
    return rows_of_shape(client, count, input_shape=input_shape, **kwargs)


def clients_of(counts, **kwargs):
    return joined([client_rows(client, count, **kwargs) for client, count in enumerate(counts)])


def trained(data, *, how, seed=0, contrastive_weight=0.0, shared=True, most_steps=None):
    """Parameters and last-epoch losses after local training, of clients that start from one state (or one each)."""
    adapter, objective, model = world(contrastive_weight=contrastive_weight)
    if shared:
        params = shared_start(adapter.init(seed), len(data))
    else:
        states = [adapter.init(int(client)) for client in data.client]
        params = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    losses = train_stack(
        model, params, steps_of(data, how), objective=objective, how=how, buffers=Buffers(), most_steps=most_steps
    )
    return params, losses


def evaluated(params, data, **kwargs):
    _, objective, model = world()
    return evaluate_stack(model, params, data, objective=objective, batch_size=4, stats_min_count=1, **kwargs)


SETTINGS = {
    "AdamW": training(),
    "SGD with momentum": training(optimizer="SGD", momentum=0.9),
    "plain SGD": plain_sgd(local_epochs=2, clip_norm=1.0),
}


@pytest.mark.parametrize("how", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_a_stack_equals_its_clients_one_by_one_bit_for_bit(how, size, shared):
    settings = {"how": how, "shared": shared, "contrastive_weight": 0.3, "most_steps": 8}
    for data in clients_of(COUNTS).split(size):
        params, losses = trained(data, **settings)
        together, weights = evaluated(params, data), dense(params)
        for position, alone in enumerate(data.split(1)):
            own, loss = trained(alone, **settings)
            single, own = evaluated(own, alone), dense(own)
            assert all(torch.equal(weights[name][position], own[name][0]) for name in own)
            assert losses[position] == loss[0]
            assert together.loss[position] == single.loss[0]
            assert together.accuracy[position] == single.accuracy[0]
            mine = together.stats.take(np.flatnonzero(together.stats.client == alone.client[0]))
            assert mine.label.tolist() == single.stats.label.tolist()
            assert mine.count.tolist() == single.stats.count.tolist()
            assert torch.equal(mine.audio_mean, single.stats.audio_mean)
            assert torch.equal(mine.audio_var, single.stats.audio_var)
            for head, mean in single.stats.output_mean.items():
                assert torch.equal(mine.output_mean[head], mean)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_stack_equals_its_clients_one_by_one_at_real_widths(optimizer):
    sizes = {"shapes": {"clip": (768,), "t5": (17, 64)}, "hidden": (128,), "width": 64, "input_shape": (4, 512)}
    adapter, objective, model = world(**sizes, contrastive_weight=0.1)
    how = training(optimizer=optimizer, batch_size=32, local_epochs=1, weight_decay=0.0)

    def deltas(data):
        params = shared_start(adapter.init(0), len(data))
        kwargs = {"objective": objective, "how": how, "buffers": Buffers(), "most_steps": 3}
        losses = train_stack(model, params, steps_of(data, how), **kwargs)
        return dense(params), losses

    data = clients_of([1, 32, 33, 70], input_shape=(4, 512))
    together, losses = deltas(data)
    for k, part in enumerate(data.split(1)):
        alone, loss = deltas(part)
        assert all(torch.equal(together[name][k], alone[name][0]) for name in alone)
        assert losses[k] == loss[0]


def plain_loop(data, *, how, contrastive_weight=0.0):
    """What a textbook does with one client: torch.optim on leaves, real rows only, the loss spelt out."""
    adapter, objective, _ = world(contrastive_weight=contrastive_weight)
    params = {name: p.requires_grad_() for name, p in stack(adapter.init(0)).items()}
    start = {name: p.detach().clone() for name, p in params.items()}
    if how.optimizer == "AdamW":
        optimizer = torch.optim.AdamW(params.values(), lr=how.learning_rate, weight_decay=how.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            params.values(), lr=how.learning_rate, weight_decay=how.weight_decay, momentum=how.momentum
        )
    for batch in steps_of(data, how):
        real = batch.mask[0].bool()
        labels = batch.labels[0, real]
        loss = torch.zeros(())
        for head, out in adapter.forward(params, batch.inputs[:, real]).items():
            targets = objective.targets[head]
            loss = loss + ((out[0] - targets[labels]) ** 2).mean() / targets.var(0, unbiased=False).mean()
            if contrastive_weight:
                centred = (targets - targets.mean(0)).flatten(1)
                cosine = torch.nn.functional.cosine_similarity(
                    (out[0] - targets.mean(0)).flatten(1).unsqueeze(1), centred.unsqueeze(0), dim=2
                )
                loss = loss + contrastive_weight * torch.nn.functional.cross_entropy(cosine / 0.5, labels)
        loss = loss + how.proximal_weight / 2 * sum(((p - start[n]) ** 2).sum() for n, p in params.items())
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
        {"optimizer": "SGD", "weight_decay": 0.0, "clip_norm": 0.0, "proximal_weight": 5.0},
        {"proximal_weight": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("contrastive_weight", [0.0, 0.5])
@pytest.mark.parametrize("count", [4, 11])
def test_one_client_is_a_plain_torch_loop_step_for_step(changes, contrastive_weight, count):
    # With 4 recordings an epoch is one step; 11 make two whole batches and a short one.
    for epochs in (1, 2, 4):
        how = training(local_epochs=epochs, **changes)
        data = client_rows(0, count)
        ours = dense(trained(data, how=how, contrastive_weight=contrastive_weight)[0])
        plain = plain_loop(data, how=how, contrastive_weight=contrastive_weight)
        for name, p in plain.items():
            # Adam divides by the size of gradients that may be little more than rounding.
            atol = 2e-5 if how.optimizer == "AdamW" else 2e-6
            torch.testing.assert_close(ours[name], p, atol=atol, rtol=2e-5)


def test_the_proximal_term_is_fedproxs():
    # Li et al. 2020, equation 2: F(w) + mu / 2 (w - x)^2, here with F = slope / 2 (w - optimum)^2.
    slopes, optima, start, rate, mu = (1.0, 4.0), (3.0, -1.0), 0.5, 0.05, 2.0
    how = plain_sgd(learning_rate=rate, local_epochs=40, proximal_weight=mu)
    params, data = shared_start({"w": torch.full((1,), start)}, 2), parabolas([0, 1], [1, 3], slopes, optima)
    train_stack(Parabola(), params, steps_of(data, how), objective=AsItIs(), how=how, buffers=Buffers())
    for k, (slope, optimum) in enumerate(zip(slopes, optima, strict=True)):
        w = start
        for _ in range(40):
            w -= rate * (slope * (w - optimum) + mu * (w - start))
        assert float(params["w"][k]) == pytest.approx(w, abs=1e-5)
        # Where it leads: between the client's optimum and the start.
        goal = (slope * optimum + mu * start) / (slope + mu)
        assert float(params["w"][k]) == pytest.approx(goal, abs=0.01)


@pytest.mark.parametrize("how", SETTINGS.values(), ids=SETTINGS)
def test_equal_clients_average_to_one_client(how):
    one = client_rows(0, 6)
    params, losses = trained(joined([one] * 4), how=how)
    own, loss = trained(one, how=how)
    start, own = world()[0].init(0), dense(own)
    for name, p in dense(params).items():
        assert torch.equal(tree_sum(p - start[name]) / 4, own[name][0] - start[name]), name
    assert set(losses) == set(loss)


def test_clients_with_other_ids_or_data_differ():
    data = joined([client_rows(0, 8), client_rows(1, 8, data_key=0), client_rows(0, 8, data_key=2)])
    params, losses = trained(data, how=training())
    assert len(set(losses)) == 3
    for name, p in dense(params).items():
        assert not torch.equal(p[0], p[1]), name
        assert not torch.equal(p[0], p[2]), name


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_local_epochs_are_respected_and_the_loss_is_that_of_the_last(clip_norm):
    adapter, objective, model = world()
    # SGD without momentum has no memory: two epochs are one epoch and another one.
    how = plain_sgd(local_epochs=3, learning_rate=1e-2, clip_norm=clip_norm)
    data = joined([client_rows(0, 9), client_rows(1, 11)])
    params, losses, batches = stack(adapter.init(0), 2), [], steps_of(data, how)
    for epoch in range(3):
        steps = slice(3 * epoch, 3 * epoch + 3)
        some = Batches(data, batches.index[:, steps], batches.mask[:, steps], np.array([3, 3]))
        one = replace(how, local_epochs=1)
        losses.append(train_stack(model, params, some, objective=objective, how=one, buffers=Buffers()))
        all_epochs, loss = trained(data, how=replace(how, local_epochs=epoch + 1))
        for name, p in dense(all_epochs).items():
            torch.testing.assert_close(p, params[name], atol=1e-6, rtol=1e-5)
        np.testing.assert_allclose(loss, losses[-1], rtol=1e-5)
    assert (losses[0] > losses[1]).all()
    assert (losses[1] > losses[2]).all()


def test_the_reported_loss_is_the_mean_over_recordings():
    adapter, objective, _ = world()
    # A step so small that parameters stay: then the loss of the epoch is that of the client's recordings.
    data = clients_of([3, 9])
    losses = trained(data, how=training(learning_rate=1e-12))[1]
    for loss, own in zip(losses, [slice(0, 3), slice(3, 12)], strict=True):
        outputs = adapter.forward(stack(adapter.init(0)), data.inputs[own].unsqueeze(0))
        wanted = objective.loss_rows(outputs, data.labels[own].unsqueeze(0)).mean()
        assert loss == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("filling", [0.0, 1e6, -1e9])
@pytest.mark.parametrize("shared", [True, False])
def test_what_lies_in_padded_rows_changes_no_gradient(filling, shared):
    adapter, objective, model = world(contrastive_weight=0.3)
    data, how = clients_of([1, 3]), training(local_epochs=1)
    clean = next(iter(steps_of(data, how)))
    padded = clean.mask == 0
    assert clean.mask.sum(1).tolist() == [1, 3]
    nonsense = torch.full((S, D), filling) * torch.linspace(1, 2, D)
    dirty = replace(
        clean,
        inputs=torch.where(padded[..., None, None], nonsense, clean.inputs),
        labels=torch.where(padded, C - 1, clean.labels),
    )
    params = shared_start(adapter.init(0), 2) if shared else stack(adapter.init(0), 2)
    results = [loss_and_grads(model, params, batch, objective=objective) for batch in (clean, dirty)]
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        one, other = (g if isinstance(g, torch.Tensor) else g.dense() for g in (grad, results[1][1][name]))
        assert torch.equal(one, other), name
        assert one.abs().sum() > 0 or name.startswith("t5.pool.q"), name


@pytest.mark.parametrize("how", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_broken_client_breaks_no_neighbour(how, position, value):
    # Also not through padding, which must repeat a client's own rows and nobody else's.
    clients = [client_rows(k, 5) for k in range(3)]
    broken = replace(clients[position], inputs=torch.full_like(clients[position].inputs, value))
    data = joined([broken if k == position else client for k, client in enumerate(clients)])
    params, losses = trained(data, how=how)
    after, params = evaluated(params, data), dense(params)
    for k in range(3):
        if k != position:
            own, loss = trained(clients[k], how=how)
            alone, own = evaluated(own, clients[k]), dense(own)
            assert all(torch.equal(params[name][k], own[name][0]) for name in own)
            assert losses[k] == loss[0]
            assert after.loss[k] == alone.loss[0]


def test_no_client_changes_the_weights_that_all_start_from():
    adapter, objective, model = world()
    start = adapter.init(0)
    kept = {name: tensor.clone() for name, tensor in start.items()}
    for how in SETTINGS.values():
        params, data = shared_start(start, 2), clients_of([5, 9])
        train_stack(model, params, steps_of(data, how), objective=objective, how=how, buffers=Buffers())
        assert all(torch.equal(start[name], kept[name]) for name in kept)


@pytest.mark.parametrize("how", [training(), training(optimizer="SGD", momentum=0.9), plain_sgd()], ids=str)
def test_what_a_stack_leaves_in_the_buffers_does_not_reach_the_next(how):
    adapter, objective, model = world()
    first, second = clients_of([4, 5, 9, 13]), clients_of([5, 6, 7])
    spoilt = replace(first, inputs=torch.full_like(first.inputs, torch.nan))
    buffers = Buffers()

    def run(data, buffers):
        params = shared_start(adapter.init(0), len(data))
        losses = train_stack(model, params, steps_of(data, how), objective=objective, how=how, buffers=buffers)
        return params, losses

    params, losses = run(spoilt, buffers)
    assert np.isnan(losses).all()
    assert any(p.isnan().all() for p in dense(params).values())
    again, fresh = run(second, buffers), run(second, Buffers())
    assert np.array_equal(again[1], fresh[1])
    wanted = dense(fresh[0])
    assert all(torch.equal(p, wanted[name]) for name, p in dense(again[0]).items())


def test_buffers_give_the_same_memory_for_the_same_name():
    buffers, device = Buffers(), torch.device("cpu")
    large = buffers.get("a", torch.Size((4, 3, 5)), device)
    small = buffers.get("a", torch.Size((2, 3, 5)), device)
    assert small.data_ptr() == large.data_ptr()
    assert small.shape == (2, 3, 5)
    assert small.is_contiguous()
    assert buffers.get("b", torch.Size((4, 3, 5)), device).data_ptr() != large.data_ptr()
    assert buffers.get("a", torch.Size((5, 3, 5)), device).shape == (5, 3, 5)


@pytest.mark.parametrize("shared", [True, False])
def test_bfloat16_gradients_are_near_and_weights_stay_float32(shared):
    sizes = {"shapes": {"clip": (64,), "t5": (3, 64)}, "hidden": (64,), "width": 64, "input_shape": (2, 64)}
    adapter, objective, model = world(**sizes, cosine_weight=0.5)
    how = plain_sgd(batch_size=8, precision="bfloat16", clip_norm=1.0)
    data = clients_of([8, 8, 16], input_shape=(2, 64))
    batch = next(iter(steps_of(data, how)))
    start = shared_start(adapter.init(0), 3) if shared else stack(adapter.init(0), 3)
    exact = loss_and_grads(model, start, batch, objective=objective)
    rough = loss_and_grads(model, start, batch, objective=objective, precision="bfloat16")
    torch.testing.assert_close(rough[0], exact[0], rtol=1e-2, atol=1e-2)
    assert not torch.equal(rough[0], exact[0])  # it did compute in another precision
    both = [[g if isinstance(g, torch.Tensor) else g.dense() for g in grads.values()] for _, grads in (exact, rough)]
    assert {grad.dtype for grad in both[1]} == {torch.float32}
    one, other = (torch.cat([grad.flatten() for grad in grads]) for grads in both)
    assert float((one - other).norm() / one.norm()) < 2e-2
    for optimizer in (how, training(batch_size=8, precision="bfloat16")):
        params = shared_start(adapter.init(0), 3) if shared else stack(adapter.init(0), 3)
        losses = train_stack(
            model, params, steps_of(data, optimizer), objective=objective, how=optimizer, buffers=Buffers()
        )
        assert np.isfinite(losses).all()
        assert {p.dtype for p in dense(params).values()} == {torch.float32}
        before = evaluate_stack(model, start, data, objective=objective, batch_size=8).loss
        assert (evaluate_stack(model, params, data, objective=objective, batch_size=8).loss < before).all()
        assert not any(isinstance(p, SharedWeight) for p in params.values()) or optimizer is how
