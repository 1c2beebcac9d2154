"""Distillation against loops written out: who teaches what, towards what, and on which scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clients import SHAPES, D, S, class_stats, targets_of, world

from fedsim.algorithms.aggregation import Joined
from fedsim.algorithms.distillation import Distillation, client_states, distil, teacher_outputs
from fedsim.errors import ModelError
from fedsim.models.adapters import stack
from fedsim.types import flatten_state

HOLDINGS = [(4, 0, 3), (4, 1, 3), (7, 1, 5), (7, 2, 2), (9, 1, 9)]
LABELS = np.repeat([0, 1, 2], 5)


@pytest.fixture
def scene():
    adapter, objective, _ = world()
    teachers = {client: adapter.init(client) for client in (4, 7, 8, 9)}
    rows = torch.randn(len(LABELS), S, D, generator=torch.Generator().manual_seed(1))
    return adapter, objective, teachers, class_stats(HOLDINGS), rows


def outputs(adapter, state, rows):
    with torch.no_grad():
        return {head: out[0] for head, out in adapter.forward(stack(state), rows.unsqueeze(0)).items()}


def test_only_the_holders_of_a_class_teach_it_and_all_alike(scene):
    adapter, _, teachers, stats, rows = scene
    found = teacher_outputs(adapter, teachers.items(), stats, LABELS, rows)
    assert found.keys() == SHAPES.keys()
    own = {client: outputs(adapter, state, rows) for client, state in teachers.items()}
    for row, label in enumerate(LABELS):
        holders = {0: [4], 1: [4, 7, 9], 2: [7]}[int(label)]  # nobody asks client 8; counts don't weigh
        for head in SHAPES:
            wanted = np.mean([own[client][head][row].double().numpy() for client in holders], axis=0)
            np.testing.assert_allclose(found[head][row], wanted, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_scaled_error_to_the_teachers(scene):
    adapter, objective, teachers, stats, rows = scene
    targets = teacher_outputs(adapter, teachers.items(), stats, LABELS, rows)
    start = adapter.init(0)
    how = Distillation(epochs=1, learning_rate=1e-12, batch_size=4)
    done = distil(adapter, start, rows, targets, objective=objective, how=how, stream=np.random.default_rng(0))
    wanted = 0.0
    for head, table in targets_of().items():
        spread = table.numpy().astype(np.float64).var(axis=0).mean()
        error = outputs(adapter, start, rows)[head].double() - targets[head].double()
        wanted += float(error.square().mean()) / spread
    assert done.loss_before == pytest.approx(wanted, rel=1e-5)
    assert done.loss_after == pytest.approx(wanted, rel=1e-4)


def test_one_teacher_is_learnt_and_the_start_stays_as_it_was(scene):
    adapter, objective, teachers, _, rows = scene
    stats = class_stats([(4, label, 3) for label in range(3)])
    targets = teacher_outputs(adapter, teachers.items(), stats, LABELS, rows)
    start = adapter.init(0)
    kept = {name: tensor.clone() for name, tensor in start.items()}
    how = Distillation(epochs=200, learning_rate=1e-2, batch_size=8)
    done = distil(adapter, start, rows, targets, objective=objective, how=how, stream=np.random.default_rng(0))
    assert done.loss_after < 0.05 * done.loss_before
    assert all(torch.equal(start[name], tensor) for name, tensor in kept.items())
    assert any(not torch.equal(done.adapter[name], tensor) for name, tensor in kept.items())


def test_every_batch_mixes_classes(scene, monkeypatch):
    adapter, objective, teachers, stats, rows = scene
    seen = []
    forward = type(adapter).forward
    place = {tuple(row.flatten().tolist()): label for row, label in zip(rows, LABELS.tolist(), strict=True)}

    def watched(self, params, inputs):
        if torch.is_grad_enabled():
            seen.append([place[tuple(row.flatten().tolist())] for row in inputs[0]])
        return forward(self, params, inputs)

    monkeypatch.setattr(type(adapter), "forward", watched)
    targets = teacher_outputs(adapter, teachers.items(), stats, LABELS, rows)
    how = Distillation(epochs=2, learning_rate=1e-3, batch_size=5)
    distil(adapter, adapter.init(0), rows, targets, objective=objective, how=how, stream=np.random.default_rng(0))
    assert len(seen) == 6
    assert all(len(set(batch)) > 1 for batch in seen)
    for epoch in (seen[:3], seen[3:]):
        assert sorted(label for batch in epoch for label in batch) == LABELS.tolist()
    assert seen[:3] != seen[3:]


def test_a_loss_that_is_not_finite_stops(scene):
    adapter, objective, teachers, stats, rows = scene
    targets = teacher_outputs(adapter, teachers.items(), stats, LABELS, rows)
    targets["clip"][0, 0] = torch.nan
    how = Distillation(epochs=1, learning_rate=1e-3, batch_size=5)
    with pytest.raises(ModelError, match=r"distillation: the loss is nan; lower feda2v.kd_learning_rate"):
        distil(adapter, adapter.init(0), rows, targets, objective=objective, how=how, stream=np.random.default_rng(0))


@pytest.mark.parametrize("cuts", [[], [3, 11]])
@pytest.mark.parametrize("budget", [1, 10**9])
def test_clients_tensors_are_put_together_from_columns(cuts, budget, monkeypatch):
    monkeypatch.setattr("fedsim.algorithms.distillation.ROWS_BYTES", budget)
    adapter, _, _ = world()
    start, teachers = adapter.init(0), {client: adapter.init(client) for client in (9, 4, 7)}
    base = flatten_state(start).numpy()
    rows = np.stack([flatten_state(state).numpy() - base for state in teachers.values()])
    joined = Joined(columns=np.split(rows, cuts, axis=1), clients=np.array([9, 4, 7]), counts=np.ones(3))
    found = list(client_states(joined, start))
    assert [client for client, _ in found] == [9, 4, 7]
    for client, state in found:
        for name, tensor in teachers[client].items():
            torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-6)
