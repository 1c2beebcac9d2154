"""What the generator is trained on and asked for, and how its losses are told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clients import C, D, S, class_stats, targets_of, world

from fedsim.algorithms.generation import (
    class_means,
    conditions,
    describe_epoch,
    draw_synthetic,
    head_rows,
    merge_buffer,
)
from fedsim.algorithms.objective import make_objective
from fedsim.algorithms.refinement import real_rows
from fedsim.models.generators import Evidence, GeneratorSpec, make_generator
from fedsim.models.generators.rows import class_shares, moments, pick_rows
from fedsim.seeding import rng
from fedsim.types import ClassStats

STATS = class_stats([(0, 0, 6), (0, 2, 2), (3, 0, 2), (5, 2, 2)])  # nobody holds classes 1 and 3


def pairs(stats: ClassStats) -> list[tuple[int, int]]:
    return list(zip(stats.client.tolist(), stats.label.tolist(), strict=True))


def test_the_buffer_keeps_the_newest_row_of_every_client_and_class():
    old = class_stats([(0, 0, 9), (1, 1, 9), (2, 2, 9)], seed=1)
    fresh = class_stats([(4, 3, 5), (0, 0, 3), (2, 1, 3)], seed=2)
    merged = merge_buffer(old, fresh, capacity=10)
    assert pairs(merged) == [(4, 3), (0, 0), (2, 1), (1, 1), (2, 2)]
    assert merged.count.tolist() == [5, 3, 3, 9, 9]
    assert torch.equal(merged.audio_mean[1], fresh.audio_mean[1])
    assert torch.equal(merged.audio_mean[3], old.audio_mean[1])
    assert not merged.output_mean  # outputs of earlier adapters are stale


@pytest.mark.parametrize(
    ("capacity", "kept"), [(0, []), (1, [(1, 1)]), (2, [(1, 1), (2, 2)]), (9, [(1, 1), (2, 2), (3, 3)])]
)
def test_the_buffer_is_bounded_and_keeps_the_newest(capacity, kept):
    buffer = None
    for row in [(3, 3, 9), (2, 2, 7), (1, 1, 2)]:
        buffer = merge_buffer(buffer, class_stats([row], seed=1), capacity=9)
    merged = merge_buffer(buffer, class_stats([(0, 0, 1)]), capacity=capacity)
    assert pairs(merged) == [(0, 0), *kept]


@pytest.mark.parametrize(("age", "kept"), [(1, [(3, 3)]), (2, [(3, 3), (2, 2)]), (9, [(3, 3), (2, 2), (1, 1)])])
def test_rows_leave_the_buffer_by_age(age, kept):
    buffer = None
    for number in (1, 2, 3):  # (0, 0) comes anew in every round
        fresh = class_stats([(0, 0, 5), (number, number, 9)], seed=number)
        buffer = merge_buffer(buffer, fresh, capacity=9, round_number=number, max_age=age)
    fresh = class_stats([(0, 0, 5)], seed=4)
    merged = merge_buffer(buffer, fresh, capacity=9, round_number=4, max_age=age)
    assert pairs(merged) == [(0, 0), *kept]
    assert merged.seen.tolist() == [4, *(label for _, label in kept)]
    assert torch.equal(merged.audio_mean[0], fresh.audio_mean[0])
    # A round without statistics doesn't merge; ages are counted in rounds all the same.
    assert pairs(merge_buffer(buffer, fresh, capacity=9, round_number=5 + age, max_age=age)) == [(0, 0)]


def test_without_a_limit_rows_carry_no_round():
    assert merge_buffer(STATS, class_stats([(9, 1, 4)]), capacity=9, round_number=7).seen is None


def test_a_buffer_that_is_empty_or_wholly_renewed_is_the_fresh_table():
    assert pairs(merge_buffer(None, STATS, capacity=5)) == pairs(STATS)
    assert pairs(merge_buffer(STATS, STATS, capacity=5)) == pairs(STATS)


def test_class_means_weight_by_count_and_fall_back_to_the_text():
    text = targets_of()["t5"]
    table, mean = class_means(STATS, "t5", text), STATS.output_mean["t5"]
    torch.testing.assert_close(table[0], (6 * mean[0] + 2 * mean[2]) / 8)
    torch.testing.assert_close(table[2], (mean[1] + mean[3]) / 2)
    assert torch.equal(table[[1, 3]], text[[1, 3]])
    assert torch.equal(text, targets_of()["t5"])


def test_sampled_rows_count_for_what_they_stand_for():
    sampled = replace(STATS, sampled_count=np.array([6.0, 9.0, 2.0, 3.0]))
    table, mean = class_means(sampled, "clip", targets_of()["clip"]), STATS.output_mean["clip"]
    torch.testing.assert_close(table[0], (6 * mean[0] + 2 * mean[2]) / 8)
    torch.testing.assert_close(table[2], (9 * mean[1] + 3 * mean[3]) / 12)
    assert class_shares(sampled).tolist() == [0.75, 0.75, 0.25, 0.25]
    assert real_rows(sampled, 1.0).weights.tolist() == [0.375, 0.375, 0.125, 0.125]
    centre, _ = moments(sampled)
    wanted = torch.tensor([0.375, 0.375, 0.125, 0.125]).view(4, 1, 1) * STATS.audio_mean
    torch.testing.assert_close(centre, wanted.sum(0))
    hits = np.bincount(pick_rows(sampled, np.full(4000, 2), rng(0, "x")), minlength=4)
    np.testing.assert_allclose(hits / 4000, [0, 0.75, 0, 0.25], atol=0.03)


def test_the_buffer_keeps_what_sampled_rows_stand_for():
    fresh = replace(STATS, sampled_count=np.array([6.0, 9.0, 2.0, 3.0]))
    merged = merge_buffer(class_stats([(0, 0, 9), (9, 1, 4)]), fresh, capacity=5)
    assert merged.weight.tolist() == [6, 9, 2, 3, 4]
    assert merged.count.tolist() == [6, 2, 2, 2, 4]


@pytest.mark.parametrize("from_nodes", [False, True])
def test_conditions_are_the_primary_heads_scaled_embeddings(from_nodes):
    objective = make_objective(targets_of())
    table = targets_of()["clip"]
    if from_nodes:
        table = class_means(STATS, "clip", table)
    wanted = (table - targets_of()["clip"].mean(0)) / targets_of()["clip"].var(0, unbiased=False).mean().sqrt()
    condition = conditions(objective, STATS, from_nodes=from_nodes)
    torch.testing.assert_close(condition, wanted)
    assert condition.shape == (C, 8)


def test_conditions_of_a_primary_head_with_tokens_are_their_mean():
    targets = targets_of({"t5": (3, 8)})
    condition = conditions(make_objective(targets), STATS, from_nodes=False)
    scale = targets["t5"].var(0, unbiased=False).mean().sqrt()
    torch.testing.assert_close(condition, (targets["t5"] - targets["t5"].mean(0)).mean(1) / scale)


def test_every_row_of_the_buffer_has_outputs_of_this_rounds_adapters():
    setting = make_objective(targets_of())
    fresh = class_stats([(0, 0, 6), (3, 0, 2), (5, 2, 2)], seed=3)
    known = merge_buffer(class_stats([(7, 2, 4), (8, 1, 4)], seed=4), fresh, capacity=9)
    rows = head_rows(setting, fresh, known)
    assert {head: list(x.shape) for head, x in rows.items()} == {"clip": [5, 8], "t5": [5, 8]}
    torch.testing.assert_close(rows["t5"][:3], fresh.output_mean["t5"].mean(1))  # a head with tokens by their mean
    torch.testing.assert_close(rows["clip"][:3], fresh.output_mean["clip"])
    torch.testing.assert_close(rows["clip"][3], fresh.output_mean["clip"][2])  # class 2, whose mean is one row
    torch.testing.assert_close(rows["t5"][4], targets_of()["t5"][1].mean(0))  # class 1 has no client this round


@pytest.mark.parametrize("kind", ["replay", "vae", "multimodal"])
def test_synthetic_rows_are_as_many_as_asked_for_every_class_with_statistics(kind):
    generator = make_generator(kind, GeneratorSpec(seed=0, hidden_dim=8, latent_dim=2, rows_per_class=4))
    _, objective, _ = world()
    condition = conditions(objective, STATS, from_nodes=True)
    evidence = Evidence(STATS, condition, heads=head_rows(objective, STATS, STATS))
    generator.fit(evidence, epochs=1, stream=rng(0, "fit"))
    labels, rows, shifts = draw_synthetic(generator, STATS, condition, per_class=3, stream=rng(0, "draw"))
    assert labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert rows.shape == (6, S, D)
    assert {head: list(x.shape) for head, x in shifts.items()} == (
        {"clip": [6, 8], "t5": [6, 8]} if kind == "multimodal" else {}
    )
    if kind == "replay":
        for label, row in zip(labels, rows, strict=True):
            assert any(torch.equal(row, mean) for mean in STATS.audio_mean[STATS.label == label])


@pytest.mark.parametrize("positive", [True, False])
def test_samples_stay_non_negative_where_the_encoder_is(positive):
    mean = torch.full((2, S, D), 0.01)
    if not positive:
        mean[0, 0, 0] = -0.01
    stats = ClassStats(np.arange(2), np.array([0, 1]), np.array([5, 5]), mean, torch.ones(2, S, D), {})
    generator = make_generator("gaussian", GeneratorSpec(seed=0))
    condition = torch.eye(2)
    generator.fit(Evidence(stats, condition), epochs=1, stream=rng(0, "fit"))
    _, rows, _ = draw_synthetic(generator, stats, condition, per_class=9, stream=rng(0, "draw"))
    assert bool((rows >= 0).all()) == positive


def test_losses_are_told_in_the_originals_form():
    lines = describe_epoch(
        "vae",
        ("dog", "rain"),
        {0: {"loss": 0.52, "recon": 0.34, "kl": 0.12, "sim": 0.06}, 1: {"loss": 1.0, "recon": 1.0, "kl": 0, "sim": 0}},
    )
    assert lines[0] == "Class 'dog': VAE Loss=0.5200 (Recon=0.3400, KL=0.1200, Sim=0.0600)"
    assert lines[1].startswith("Class 'rain': VAE Loss=1.0000")
    (gan,) = describe_epoch("gan", ("dog",), {0: {"loss": 0.7, "discriminator": 1.4, "d_real": 0.5, "d_fake": 0.4}})
    assert gan == "Class 'dog': GAN Loss=0.7000 (D=1.4000, D(real)=0.5000, D(fake)=0.4000)"
