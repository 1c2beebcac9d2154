"""Refinement: what it trains on, towards what, and when its result is kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from clients import SHAPES, C, D, S, class_stats, world

from fedsim.algorithms.generation import Synthetic, class_means
from fedsim.algorithms.refinement import (
    Refinement,
    real_rows,
    refine,
    refinement_targets,
    weighted_loss,
    with_synthetic,
)
from fedsim.errors import ModelError
from fedsim.models.adapters import stack
from fedsim.seeding import normal, rng

STATS = class_stats([(0, 0, 6), (0, 2, 4), (3, 0, 2), (5, 1, 5), (6, 2, 4), (6, 3, 9)], variance=0.01)
LABELS = np.arange(C).repeat(5)


def how(**changes) -> Refinement:
    settings = {"epochs": 3, "learning_rate": 3e-3, "batch_size": 8, "synthetic_weight": 0.5, "text_anchor": 0.5}
    return Refinement(**{**settings, **changes})


class Source:
    """Synthetic rows from a stream, counting its epochs."""

    def __init__(self, shift: float = 0.0, moved=None) -> None:
        self.shift, self.calls, self.moved = shift, 0, moved or {}

    def __call__(self, stream):
        self.calls += 1
        return Synthetic(LABELS, self.shift + normal(stream, len(LABELS), S, D), self.moved)


def refined(synthetic=None, *, seed=0, key=0, contrastive_weight=0.0, **changes):
    adapter, objective, _ = world(contrastive_weight=contrastive_weight)
    return refine(
        adapter,
        adapter.init(seed),
        STATS,
        objective=objective,
        how=how(**changes),
        synthetic=synthetic,
        stream=rng(key, "refine"),
        held_out_stream=rng(0, "held-out"),
    )


def changed(one, other) -> set[str]:
    return {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}


def test_every_head_is_trained_and_changes_with_the_synthetic_rows():
    start = world()[0].init(0)
    without, one, other = refined(), refined(Source()), refined(Source(shift=1.0))
    for pair in ((start, without.adapter), (without.adapter, one.adapter), (one.adapter, other.adapter)):
        assert changed(*pair) == {"clip", "t5"}
    assert without.kept
    assert one.kept


def test_the_gradient_of_every_head_changes_with_the_synthetic_rows():
    adapter, objective, _ = world()
    params = {name: p.requires_grad_() for name, p in stack(adapter.init(0)).items()}
    targets, real = refinement_targets(objective, STATS, 0.5), real_rows(STATS, 0.5)

    def gradient(shift: float):
        rows = with_synthetic(real, Source(shift)(rng(0, "x")), 0.5)
        loss = weighted_loss(adapter, params, rows, objective, targets)
        return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    one, other = gradient(0.0), gradient(1.0)
    assert changed(one, other) == {"clip", "t5"}
    assert changed(one, gradient(0.0)) == set()


def test_all_epochs_are_used_each_with_new_rows():
    source = Source()
    results = [refined(source, epochs=epochs, learning_rate=1e-3) for epochs in (1, 2, 5)]
    assert source.calls == 8
    assert results[0].loss != results[1].loss != results[2].loss
    for one, other in pairwise(results):
        assert changed(one.adapter, other.adapter) == {"clip", "t5"}
        assert other.held_out_after < one.held_out_after < one.held_out_before


def test_a_result_that_got_worse_on_held_out_rows_is_dropped():
    adapter = world()[0]
    start = adapter.init(0)
    result = refined(Source(), learning_rate=10.0)
    assert not result.kept
    assert result.held_out_after > result.held_out_before
    assert result.adapter.keys() == start.keys()
    assert all(torch.equal(result.adapter[name], start[name]) for name in start)


def test_a_result_that_got_better_is_kept():
    result = refined(Source())
    assert result.kept
    assert result.held_out_after < result.held_out_before


def test_the_averaged_adapter_is_not_written_to():
    adapter, objective, _ = world()
    averaged = adapter.init(0)
    before = {name: t.clone() for name, t in averaged.items()}
    refine(
        adapter,
        averaged,
        STATS,
        objective=objective,
        how=how(),
        synthetic=None,
        stream=rng(0, "refine"),
        held_out_stream=rng(0, "held-out"),
    )
    assert all(torch.equal(averaged[name], before[name]) for name in before)


def test_outputs_of_synthetic_rows_move_their_targets():
    adapter, objective, _ = world()
    moved = {head: normal(rng(0, head), len(LABELS), shape[-1]) for head, shape in SHAPES.items()}
    params, targets = stack(adapter.init(0)), refinement_targets(objective, STATS, 0.25)
    real, made = real_rows(STATS, 0.5), Source(moved=moved)(rng(0, "x"))
    rows = with_synthetic(real, made, 0.5, own_outputs=0.75)
    by_hand = weighted_loss(adapter, params, real, objective, targets)
    for head, out in adapter.forward(params, made.embeddings.unsqueeze(0)).items():
        shift = moved[head] if len(SHAPES[head]) == 1 else moved[head].unsqueeze(1)  # alike for all tokens
        error = (out[0] - targets[head][LABELS] - 0.75 * shift).square().flatten(1).mean(1)
        by_hand = by_hand + 0.5 * (error / objective.targets[head].var(0, unbiased=False).mean()).mean()
    torch.testing.assert_close(weighted_loss(adapter, params, rows, objective, targets), by_hand)
    # They reach every head, and none where clients' outputs don't count.
    assert changed(refined(Source(moved=moved)).adapter, refined(Source()).adapter) == {"clip", "t5"}
    none = (refined(source, text_anchor=1.0).adapter for source in (Source(moved=moved), Source()))
    assert changed(*none) == set()


def test_refinement_is_a_function_of_its_streams():
    one, same, other = refined(Source()), refined(Source()), refined(Source(), key=1)
    assert changed(one.adapter, same.adapter) == set()
    assert one.loss == same.loss
    assert changed(one.adapter, other.adapter) == {"clip", "t5"}
    assert one.held_out_before == other.held_out_before


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_classes_have_equal_weight_and_clients_count_within_them(weight):
    rows = real_rows(STATS, 1 - weight)
    assert rows.weights.sum().item() == pytest.approx(1 - weight)
    for label in range(C):
        assert rows.weights[rows.labels == label].sum().item() == pytest.approx((1 - weight) / C)
    assert rows.weights[0].item() == pytest.approx((1 - weight) * 6 / 8 / C)
    labels = np.array([0, 0, 1, 2, 3])
    both = with_synthetic(rows, Synthetic(labels, torch.zeros(5, S, D)), weight)
    assert len(both.labels) == len(both.embeddings) == len(STATS) + 5
    assert both.weights.sum().item() == pytest.approx(1.0)
    assert both.weights[len(STATS) :].tolist() == pytest.approx([weight / 5] * 5)
    assert both.labels[len(STATS) :].tolist() == labels.tolist()


@pytest.mark.parametrize("anchor", [0.0, 0.25, 1.0])
def test_the_anchor_mixes_the_clients_outputs_with_the_text(anchor):
    _, objective, _ = world()
    targets = refinement_targets(objective, STATS, anchor)
    for head, text in objective.targets.items():
        clients = class_means(STATS, head, text)
        torch.testing.assert_close(targets[head], anchor * text + (1 - anchor) * clients)
        assert not torch.allclose(clients, text)


def test_the_anchor_changes_every_head():
    assert changed(refined(text_anchor=0.0).adapter, refined(text_anchor=1.0).adapter) == {"clip", "t5"}


@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize("contrastive_weight", [0.0, 0.3])
def test_refinement_is_a_plain_torch_loop(synthetic, contrastive_weight):
    # Batches as large as an epoch: one step each, towards the loss of the module's docstring.
    adapter, objective, _ = world(contrastive_weight=contrastive_weight)
    result = refined(Source() if synthetic else None, batch_size=100, epochs=4, contrastive_weight=contrastive_weight)
    params = {name: p.requires_grad_() for name, p in stack(adapter.init(0)).items()}
    optimizer = torch.optim.AdamW(params.values(), lr=3e-3, weight_decay=0.0)
    share, stream, source, last = 0.5 if synthetic else 0.0, rng(0, "refine"), Source(), None

    def rows_loss(x, labels) -> torch.Tensor:
        total = torch.zeros(len(labels))
        for head, out in adapter.forward(params, x.unsqueeze(0)).items():
            text = objective.targets[head]
            wanted = 0.5 * text + 0.5 * class_means(STATS, head, text)
            spread = text.var(0, unbiased=False).mean()
            total = total + (out[0] - wanted[labels]).square().flatten(1).mean(1) / spread
            cosine = torch.nn.functional.cosine_similarity(
                (out[0] - text.mean(0)).flatten(1).unsqueeze(1), (text - text.mean(0)).flatten(1).unsqueeze(0), dim=2
            )
            entropy = torch.nn.functional.cross_entropy(cosine / 0.5, labels, reduction="none")
            total = total + contrastive_weight * entropy
        return total

    for _ in range(4):
        made = source(stream) if synthetic else None
        stream.permutation(len(STATS) + (len(LABELS) if synthetic else 0))
        labels = torch.from_numpy(STATS.label)
        per_row = rows_loss(STATS.audio_mean, labels)
        classes = []
        for label in range(C):
            mine = np.flatnonzero(STATS.label == label)
            count = torch.from_numpy(STATS.count[mine]).float()
            classes.append((count * per_row[mine]).sum() / count.sum())
        loss = (1 - share) * torch.stack(classes).mean()
        if synthetic:
            loss = loss + share * rows_loss(made[1], torch.from_numpy(LABELS)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        last = float(loss.detach())
    assert result.kept
    assert result.loss == pytest.approx(last, rel=1e-4)
    for name, p in params.items():
        torch.testing.assert_close(result.adapter[name], p.detach()[0], atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops():
    with pytest.raises(ModelError, match=r"refinement: the loss is (nan|inf); lower feda2v\.refine_learning_rate"):
        refined(learning_rate=1e30, epochs=3)
