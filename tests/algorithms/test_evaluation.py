"""Scores of predictors whose scores are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from clients import targets_of

from fedsim.algorithms.evaluation import client_accuracies, evaluate, worst_tenth
from fedsim.algorithms.objective import make_objective
from fedsim.errors import ModelError
from fedsim.models.adapters import Adapter, HeadSpec, make_adapter

C = 8
SHAPES = {"clip": (12,), "t5": (3, 6)}
TARGETS = targets_of(SHAPES, C)
OBJECTIVE = make_objective(TARGETS)


@dataclass(frozen=True)
class Oracle:
    """A head that answers a class's row of a table; the class number is the recording's only coordinate."""

    table: torch.Tensor

    def init(self, stream):
        return {}

    def forward(self, params, x):
        return self.table[x[:, :, 0, 0].long()]


def oracle(tables) -> Adapter:
    heads = {head: Oracle(table) for head, table in tables.items()}
    return Adapter((1, 1), {}, heads, {h: torch.zeros(()) for h in tables}, dict.fromkeys(tables, 1.0))


def scores(tables, labels, seen=None):
    """Evaluation of an oracle that is told the classes `seen` instead of the true `labels`."""
    labels = torch.as_tensor(labels)
    seen = labels if seen is None else torch.as_tensor(seen)
    return evaluate(oracle(tables), {}, seen.float().view(-1, 1, 1), labels, objective=OBJECTIVE)


BALANCED = np.arange(C).repeat(20)  # 160 recordings: more than two chunks


def test_a_perfect_predictor():
    result = scores(TARGETS, BALANCED)
    for name in ("top1", "top5", "balanced_accuracy", "top1_clip", "top1_t5"):
        assert result.metrics[name] == 1.0
    assert result.metrics["nmse_clip"] == result.metrics["nmse_t5"] == 0.0
    assert result.metrics["cosine"] == pytest.approx(1.0)
    assert result.metrics["margin"] > 0.1
    assert np.array_equal(result.confusion, 20 * np.eye(C))


def test_a_constant_predictor_scores_nmse_one_and_chance():
    specs = {head: HeadSpec("mlp", shape, (4,), 8, 2) for head, shape in SHAPES.items()}
    scale = {head: weight**-0.5 for head, weight in OBJECTIVE.weight.items()}
    adapter = make_adapter((2, 5), specs, centre=OBJECTIVE.centre, scale=scale)
    silent = {name: torch.zeros_like(t) if "last" in name else t for name, t in adapter.init(0).items()}
    x = torch.randn(len(BALANCED), 2, 5, generator=torch.Generator().manual_seed(0))
    result = evaluate(adapter, silent, x, torch.from_numpy(BALANCED), objective=OBJECTIVE)
    assert result.metrics["nmse_clip"] == pytest.approx(1.0, abs=1e-5)
    assert result.metrics["nmse_t5"] == pytest.approx(1.0, abs=1e-5)
    for name in ("top1", "top1_clip", "top1_t5", "balanced_accuracy"):
        assert result.metrics[name] == 1 / C
    assert result.metrics["top5"] == 5 / C
    assert result.metrics["margin"] == result.metrics["cosine"] == 0.0


def test_a_predictor_that_is_always_wrong():
    wrong = (BALANCED + 1) % C
    result = scores(TARGETS, BALANCED, wrong)
    assert result.metrics["top1"] == result.metrics["balanced_accuracy"] == 0.0
    assert result.metrics["margin"] < 0
    assert np.array_equal(result.confusion, 20 * np.roll(np.eye(C), 1, axis=1))
    difference = (TARGETS["clip"].roll(-1, 0) - TARGETS["clip"]).square().mean()
    assert result.metrics["nmse_clip"] == pytest.approx(
        float(difference / TARGETS["clip"].var(0, unbiased=False).mean()), rel=1e-5
    )


def test_confusion_rows_are_true_classes_and_columns_predicted_ones():
    labels, seen = [0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 0, 2]
    result = scores(TARGETS, labels, seen)
    wanted = np.zeros((C, C))
    for label, predicted in zip(labels, seen, strict=True):
        wanted[label, predicted] += 1
    assert np.array_equal(result.confusion, wanted)
    assert result.metrics["top1"] == 0.5
    # recalls 1/3, 1 and 1/2 of the classes that occur
    assert result.metrics["balanced_accuracy"] == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)


def test_margin_and_top5_by_hand():
    seen = [3, 4, 4]
    result = scores(TARGETS, [3, 3, 4], seen)
    centred = (TARGETS["clip"] - TARGETS["clip"].mean(0)).double()
    directions = centred / centred.norm(dim=1, keepdim=True)
    cosine = (directions @ directions.T)[seen]
    margins, top5 = [], []
    for row, label in zip(cosine, [3, 3, 4], strict=True):
        margins.append(row[label] - row[[c for c in range(C) if c != label]].max())
        top5.append(label in row.argsort(descending=True)[:5])
    assert result.metrics["margin"] == pytest.approx(float(sum(margins)) / 3, rel=1e-5)
    assert result.metrics["top5"] == pytest.approx(sum(top5) / 3)


def test_common_components_and_scale_of_outputs_do_not_count_for_the_nearest_text():
    # Cosines are centred: what all targets share says nothing about the class.
    shifted = {head: table + 100.0 for head, table in TARGETS.items()}
    result = evaluate(
        oracle({h: OBJECTIVE.centre[h] + 100 + 0.01 * (t - OBJECTIVE.centre[h]) for h, t in TARGETS.items()}),
        {},
        torch.arange(C).float().view(-1, 1, 1),
        torch.arange(C),
        objective=make_objective(shifted),
    )
    assert result.metrics["top1"] == 1.0
    assert result.metrics["nmse_clip"] == pytest.approx(0.99**2, rel=1e-3)


def test_heads_are_scored_apart():
    result = scores({"clip": TARGETS["clip"].roll(1, 0), "t5": TARGETS["t5"]}, BALANCED)
    assert result.metrics["top1"] == result.metrics["top1_clip"] == 0.0
    assert result.metrics["top1_t5"] == 1.0
    assert result.metrics["nmse_t5"] == 0.0
    assert result.metrics["nmse_clip"] > 0.5


def test_top5_with_fewer_than_five_classes_is_always_right():
    objective = make_objective({"clip": TARGETS["clip"][:3]})
    labels = torch.tensor([0, 1, 2])
    adapter = oracle({"clip": TARGETS["clip"][:3].roll(1, 0)})
    result = evaluate(adapter, {}, labels.float().view(-1, 1, 1), labels, objective=objective)
    assert result.metrics["top5"] == 1.0
    assert result.metrics["top1"] == 0.0


def test_client_accuracies_by_hand():
    confusion = np.array([[3, 1, 0], [0, 5, 5], [0, 0, 0]])  # recalls 3/4, 1/2; class 2 wasn't held out
    class_counts = np.array([[4, 0, 0], [1, 1, 0], [0, 0, 7], [2, 1, 1]])
    np.testing.assert_allclose(
        client_accuracies(confusion, class_counts), [0.75, 0.625, 0.0, (2 * 0.75 + 0.5 + 0.0) / 4]
    )


@pytest.mark.parametrize(("count", "worst"), [(1, 0.0), (9, 0.0), (10, 0.0), (20, 0.5), (25, 0.5), (30, 1.0)])
def test_the_worst_tenth_is_at_least_one_client(count, worst):
    values = np.random.default_rng(0).permutation(np.arange(count, dtype=float))
    assert worst_tenth(values) == worst


def test_targets_must_differ_between_classes():
    with pytest.raises(ModelError, match="targets of head 'clip' don't differ between classes: nothing to learn"):
        make_objective({"clip": torch.ones(4, 6)})
    with pytest.raises(ModelError, match="nothing to learn"):
        make_objective({"clip": torch.randn(1, 6)})


def test_lambda_makes_heads_of_any_scale_and_shape_count_alike():
    objective = make_objective({"small": 1e-3 * TARGETS["clip"], "large": 50.0 + 30 * TARGETS["t5"]})
    for head, targets in objective.targets.items():
        rows = objective.nmse_rows(head, objective.centre[head].expand_as(targets), targets)
        assert rows.shape == (C,)
        assert float(rows.mean()) == pytest.approx(1.0, rel=1e-4)
