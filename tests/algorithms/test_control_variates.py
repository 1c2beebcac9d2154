"""SCAFFOLD's equations, on clients whose loss is a parabola, so that every step has a closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clients import AsItIs, Parabola, parabolas, plain_sgd, steps_of

from fedsim.algorithms.batches import num_batches
from fedsim.algorithms.control_variates import PREFIX, first_variate, next_variate, variates_of
from fedsim.algorithms.local_training import Buffers, shared_start, train_stack, weighted_deltas

RATE, EPOCHS = 0.1, 3
COUNTS = np.array([1, 2, 6])  # two steps an epoch for the last one
SLOPES, OPTIMA = np.array([1.0, 4.0, 2.0]), np.array([3.0, -1.0, 0.5])


def round_of(x, told, own, clients, weights, how):
    """A round in fedsim: mean change, new variates [K, 1], sums."""
    data = parabolas(clients, COUNTS, SLOPES, OPTIMA)
    variates = variates_of(own, told, x)
    params = shared_start(x, len(data))
    batches = steps_of(data, how)
    train_stack(
        Parabola(), params, batches, objective=AsItIs(), how=how, buffers=Buffers(), corrections=variates.corrections
    )
    steps = how.local_epochs * num_batches(data.counts, how.batch_size)
    rows, sums = variates.renewed(params, x, steps=steps, rate=RATE, weights=weights)
    change = weighted_deltas(params, x, weights)["w"] / weights.sum()
    return {"w": x["w"] + change}, rows, sums


def by_hand(x, c, own, clients, weights, total, how):
    """The same from the paper's equations, in float64."""
    ends, new = [], []
    for k in clients:
        y, steps = x, how.local_epochs * -(-COUNTS[k] // how.batch_size)
        for _ in range(steps):
            gradient = SLOPES[k] * (y - OPTIMA[k])
            gradient *= min(1.0, how.clip_norm / abs(gradient)) if how.clip_norm else 1.0
            y -= RATE * (gradient + how.weight_decay * y - own[k] + c)
        ends.append(y)
        new.append(own[k] - c + (x - y) / (steps * RATE))
    change = np.array([after - own[k] for after, k in zip(new, clients, strict=True)])
    own = {**own, **dict(zip(clients, new, strict=True))}
    return x + np.average(np.array(ends) - x, weights=weights), c + (weights * change).sum() / total, own


SETTINGS = {
    "plain": {},
    "clipped": {"clip_norm": 1.5},
    "decayed": {"weight_decay": 0.1},
    "weighted": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rounds_follow_the_equations(name):
    how = plain_sgd(local_epochs=EPOCHS, learning_rate=RATE, batch_size=4, control_variates=True, **SETTINGS[name])
    weigh = (lambda k: COUNTS[k].astype(float)) if name == "weighted" else (lambda k: np.ones(len(k)))
    total = weigh(np.arange(3)).sum()
    state, c, own = 0.0, 0.0, {k: 0.0 for k in range(3)}
    x = {"w": torch.zeros(1)}
    told, kept = first_variate(x), np.zeros((3, 1), dtype=np.float32)
    for cohort in ([0, 1, 2], [0, 2], [1, 2], [0, 1, 2], [1]):
        weights = weigh(np.array(cohort))
        x, rows, sums = round_of(x, told, kept[cohort], cohort, weights, how)
        told = next_variate(told, sums, total)
        kept[cohort] = rows
        state, c, own = by_hand(state, c, own, cohort, weights, total, how)
        assert float(x["w"]) == pytest.approx(state, abs=1e-5)
        assert float(told[PREFIX + "w"]) == pytest.approx(c, abs=1e-5)
        assert kept[:, 0].tolist() == pytest.approx([own[k] for k in range(3)], abs=1e-5)
        # c stays the mean of all clients' variates, by their weights.
        assert c == pytest.approx(np.average([own[k] for k in range(3)], weights=weigh(np.arange(3))), abs=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_variates_lead_to_the_optimum_of_the_mean_loss_where_drift_leads_elsewhere(weighted):
    how = plain_sgd(local_epochs=EPOCHS, learning_rate=RATE, batch_size=4, control_variates=True)
    weights = COUNTS.astype(float) if weighted else np.ones(3)
    x = {"w": torch.zeros(1)}
    drifting, told, kept = x, first_variate(x), np.zeros((3, 1), dtype=np.float32)
    nothing = first_variate(x)
    for _ in range(60):
        x, kept, sums = round_of(x, told, kept, [0, 1, 2], weights, how)
        told = next_variate(told, sums, weights.sum())
        drifting, _, _ = round_of(drifting, nothing, np.zeros((3, 1), dtype=np.float32), [0, 1, 2], weights, how)
    optimum = (weights * SLOPES * OPTIMA).sum() / (weights * SLOPES).sum()
    assert float(x["w"]) == pytest.approx(optimum, abs=1e-4)
    assert abs(float(drifting["w"]) - optimum) > 0.05
    # At the optimum a client's variate is its gradient.
    assert kept[:, 0].tolist() == pytest.approx((SLOPES * (optimum - OPTIMA)).tolist(), abs=1e-3)


def test_a_clipped_variate_is_the_mean_of_clipped_gradients_and_no_longer():
    how = plain_sgd(local_epochs=2, learning_rate=RATE, batch_size=4, control_variates=True, clip_norm=0.5)
    x = {"w": torch.full((1,), 100.0)}
    rows = np.full((3, 1), 7.0, dtype=np.float32)
    told = {PREFIX + "w": torch.full((1,), -3.0)}
    _, rows, _ = round_of(x, told, rows, [0, 1, 2], np.ones(3), how)
    assert rows[:, 0].tolist() == pytest.approx([0.5, 0.5, 0.5], abs=1e-4)
