"""Prototypes and the pull towards them, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clients import SHAPES, C, class_stats, targets_of, world

from fedsim.algorithms.prototypes import KNOWN, PREFIX, next_prototypes, with_prototypes


def told_of(known) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    tables = {PREFIX + head: torch.randn(C, *shape, generator=generator) for head, shape in SHAPES.items()}
    return {**tables, KNOWN: torch.tensor(known, dtype=torch.float32)}


def outputs_of(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {head: torch.randn(2, rows, *shape, generator=generator) for head, shape in SHAPES.items()}


def test_the_loss_is_the_objective_and_the_scaled_error_to_the_prototype():
    _, objective, _ = world(contrastive_weight=0.4)
    told, outputs, labels = told_of([1, 0, 1, 1]), outputs_of(3), torch.tensor([[0, 1, 2], [3, 3, 1]])
    loss = with_prototypes(objective, told, 0.7).loss_rows(outputs, labels)
    plain = objective.loss_rows(outputs, labels)
    for k in range(2):
        for b in range(3):
            label, pull = int(labels[k, b]), 0.0
            for head, targets in targets_of().items():
                spread = np.var(targets.numpy().astype(np.float64), axis=0).mean()
                error = outputs[head][k, b].double().numpy() - told[PREFIX + head][label].double().numpy()
                pull += (error**2).mean() / spread
            wanted = float(plain[k, b]) + (0.7 * pull if label != 1 else 0.0)
            assert float(loss[k, b]) == pytest.approx(wanted, rel=1e-5)


def test_a_class_without_a_prototype_pulls_nothing_whatever_stands_in_its_place():
    _, objective, _ = world()
    outputs, labels = outputs_of(2), torch.tensor([[0, 1], [1, 0]])
    found = []
    for filling in (0.0, 1e6):
        told = told_of([1, 0, 0, 0])
        for head in SHAPES:
            told[PREFIX + head][1:] = filling
        leaves = {head: out.clone().requires_grad_() for head, out in outputs.items()}
        with_prototypes(objective, told, 2.0).loss_rows(leaves, labels).sum().backward()
        found.append({head: leaf.grad for head, leaf in leaves.items()})
    leaves = {head: out.clone().requires_grad_() for head, out in outputs.items()}
    objective.loss_rows(leaves, labels).sum().backward()
    for head, leaf in leaves.items():
        assert torch.equal(found[0][head], found[1][head])
        torch.testing.assert_close(found[0][head][0, 1], leaf.grad[0, 1])
        assert not torch.allclose(found[0][head][0, 0], leaf.grad[0, 0])


def test_without_prototypes_the_objective_is_itself():
    _, objective, _ = world()
    assert with_prototypes(objective, {"basis": torch.eye(2)}, 1.0) is objective


def test_prototypes_are_count_weighted_means_and_absent_classes_keep_theirs():
    stats = class_stats([(3, 0, 2), (5, 0, 6), (5, 2, 4)])
    first = next_prototypes({"basis": torch.eye(2)}, stats, C)
    assert first.keys() == {KNOWN, *(PREFIX + head for head in SHAPES)}
    assert first[KNOWN].tolist() == [1, 0, 1, 0]
    for head in SHAPES:
        rows, table = stats.output_mean[head].double(), first[PREFIX + head]
        np.testing.assert_allclose(table[0], (2 * rows[0] + 6 * rows[1]) / 8, rtol=1e-5)
        np.testing.assert_allclose(table[2], rows[2], rtol=1e-6)
        assert not table[[1, 3]].any()
    later = class_stats([(1, 0, 3), (1, 3, 3)], seed=1)
    second = next_prototypes(first, later, C)
    assert second[KNOWN].tolist() == [1, 0, 1, 1]
    for head in SHAPES:
        assert torch.equal(second[PREFIX + head][2], first[PREFIX + head][2])
        np.testing.assert_allclose(second[PREFIX + head][[0, 3]], later.output_mean[head], rtol=1e-6)
    nothing = class_stats([(1, 0, 3)]).take(np.zeros(0, dtype=np.int64))
    assert next_prototypes({**second, "basis": torch.eye(2)}, nothing, C).keys() == second.keys()
    assert next_prototypes({}, nothing, C) == {}


def test_rows_of_a_sample_count_for_those_that_were_left_out():
    stats = replace(class_stats([(1, 0, 2), (2, 0, 9)]), threshold=6.0)
    rows = stats.output_mean["clip"]
    wanted = (6 * rows[0] + 9 * rows[1]) / 15
    torch.testing.assert_close(next_prototypes({}, stats, C)[PREFIX + "clip"][0], wanted)
