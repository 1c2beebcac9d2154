"""The bounded novelty loss by hand, and averaged weights and novelty as options of the learnt generators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_cgan import CONDITION, SMALL, C, table

from fedsim.models.generators import Evidence, GeneratorSpec
from fedsim.models.generators.centred import Centred
from fedsim.models.generators.cgan import Cgan
from fedsim.models.generators.gan import Gan
from fedsim.models.generators.novelty import Novelty
from fedsim.models.generators.vae import Vae
from fedsim.seeding import normal, rng

LEARNT = {"vae": Vae, "vae_plain": lambda spec: Centred(Vae(spec)), "gan": Gan, "cgan": Cgan}
OPTIONS = [{"ema": 0.9}, {"novelty_weight": 0.5}, {"novelty_weight": 0.5, "novelty": "cosine", "ema": 0.5}]


def fitted(kind: str, *, epochs: int = 2, **settings):
    generator = LEARNT[kind](GeneratorSpec(**{**SMALL, **settings}))
    report = generator.fit(Evidence(table(), CONDITION), epochs=epochs, stream=rng(0, "fit"))
    return generator, report


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return 1 - float(one @ other) / float(np.linalg.norm(one) * np.linalg.norm(other))


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_novelty_by_hand(kind):
    labels, rows = np.repeat([2, 5], 4), normal(rng(0, "rows"), 8, 3)
    rows[4:] += 1.0
    made, classes = torch.cat([rows[:2] + 0.05, 0.9 * rows[5:6] + 0.1, 9 * rows[6:7]]), np.array([2, 5, 5, 2])

    def distance(one, other):
        return cosine(one, other) if kind == "cosine" else float(np.linalg.norm(one - other))

    wanted = []
    for row, label in zip(made.numpy(), classes, strict=True):
        mine = rows.numpy()[labels == label]
        margin = np.mean([distance(a, b) for i, a in enumerate(mine) for j, b in enumerate(mine) if i != j])
        wanted.append(max(0.0, margin - min(distance(row, other) for other in mine)) / margin)
    found = Novelty(rows, labels, kind)(made, classes)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32), atol=1e-4, rtol=1e-3)
    assert sum(loss > 0 for loss in wanted) > 0


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_novelty_is_one_for_a_copy_nothing_far_away_and_pushes_away_in_between(kind):
    labels, rows = np.repeat([0, 1], 20), normal(rng(0, "rows"), 40, 6)
    novelty = Novelty(rows, labels, kind)
    near = (rows + 0.05 * normal(rng(0, "near"), 40, 6)).requires_grad_()
    losses = novelty(near, labels)
    assert float(novelty(rows, labels).detach().min()) > 0.999
    assert 0 < float(losses.detach().min()) <= float(losses.detach().max()) < 1
    (gradient,) = torch.autograd.grad(losses.sum(), near)
    further = near.detach() - 0.05 * gradient / gradient.norm(dim=1, keepdim=True)
    assert bool((novelty(further, labels) < losses).all())
    # Away from the row that it is near to, as seen from it.
    assert bool(((-gradient * (near.detach() - rows)).sum(1) > 0).all())
    far = (-100.0 * rows.mean(0) + 1000 * torch.ones(1, 6)).expand(40, -1).clone().requires_grad_()
    if kind == "l2":
        (gradient,) = torch.autograd.grad(novelty(far, labels).sum(), far)
        assert float(gradient.abs().max()) == 0.0


def test_novelty_looks_at_the_own_class_only_and_is_bounded_everywhere():
    rows = torch.cat([torch.zeros(3, 2), torch.ones(3, 2)]) + 0.1 * normal(rng(0, "rows"), 6, 2)
    novelty = Novelty(rows, np.repeat([0, 1], 3), "l2")
    assert float(novelty(rows[:1], np.array([0]))) > 0.999
    assert float(novelty(rows[:1], np.array([1]))) == 0.0
    for kind in ("l2", "cosine"):
        losses = Novelty(rows, np.repeat([0, 1], 3), kind)(3 * normal(rng(0, "x"), 500, 2), np.arange(500) % 2)
        assert float(losses.min()) >= 0
        assert float(losses.max()) <= 1


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_a_class_of_equal_rows_has_no_novelty_to_ask_for(kind):
    made = torch.ones(4, 3, requires_grad=True)
    losses = Novelty(torch.ones(4, 3), np.zeros(4, int), kind)(made, np.zeros(4, int))
    (gradient,) = torch.autograd.grad(losses.sum(), made)
    assert torch.equal(losses.detach(), torch.zeros(4))
    assert torch.equal(gradient, torch.zeros(4, 3))


@pytest.mark.parametrize("kind", LEARNT)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_resume_to_the_bit(kind, options):
    first, _ = fitted(kind, **options)
    second = LEARNT[kind](GeneratorSpec(**SMALL, **options))
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    reports = [g.fit(Evidence(table(clients=5), CONDITION), epochs=2, stream=rng(1, "fit")) for g in (first, second)]
    assert reports[0] == reports[1]
    one, other = first.state(), second.state()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(*(g.sample(CONDITION, C, stream=rng(0, "x")) for g in (first, second)))


@pytest.mark.parametrize(("kind", "prefix"), [("vae", "network.decoder."), ("gan", "maker."), ("cgan", "maker.")])
def test_an_average_changes_samples_and_nothing_of_the_training(kind, prefix):
    (off, plain), (on, report) = fitted(kind, ema=0.0), fitted(kind, ema=0.9)
    assert plain.epochs == report.epochs
    weights, averaged = off.state(), on.state()
    trained = [name for name in weights if name.startswith(prefix)]
    assert len(trained) == 6
    assert all(torch.equal(weights[name], averaged[name]) for name in trained)
    assert not torch.equal(*(g.sample(CONDITION, C, stream=rng(0, "x")) for g in (off, on)))
    assert kind == "cgan" or not any(name.startswith("average") for name in weights)
    # The average of the state is what samples are made with.
    name = trained[0].removeprefix(prefix)
    assert not torch.equal(averaged[f"average.network.{name}"], averaged[prefix + name])


def test_the_average_of_a_vae_is_that_of_its_decoder_after_every_step():
    # One batch per epoch: every fit is one step.
    generator, by_hand, weights = Vae(GeneratorSpec(**{**SMALL, "batch_size": 999}, ema=0.5)), None, []
    for step in range(1, 6):
        generator.fit(Evidence(table(), CONDITION), epochs=1, stream=rng(0, "fit", step))
        weights.append(generator.state()["network.decoder.0.weight"])
        by_hand = weights[0] if step == 1 else 0.5 * by_hand + 0.5 * weights[-1]
    torch.testing.assert_close(generator.state()["average.network.0.weight"], by_hand)


@pytest.mark.parametrize("kind", LEARNT)
@pytest.mark.parametrize("novelty", ["l2", "cosine"])
def test_novelty_is_reported_bounded_and_off_by_default(kind, novelty):
    _, report = fitted(kind, novelty_weight=0.5, novelty=novelty)
    for parts in report.epochs[-1].values():
        assert 0 <= parts["novelty"] <= 0.5
    _, plain = fitted(kind)
    assert all("novelty" not in parts for parts in plain.epochs[-1].values())


def nearest(generator, rows: torch.Tensor) -> float:
    """Mean distance of samples to the nearest class mean of their class."""
    stats = table()
    distances = []
    for c in range(C):
        x = generator.sample(CONDITION[c : c + 1], 500, stream=rng(0, "x", c)).flatten(1)
        distances.append(torch.cdist(x, rows[torch.from_numpy(stats.label == c)]).min(1).values.mean())
    return float(torch.stack(distances).mean())


def test_novelty_moves_samples_away_from_training_rows():
    rows = table().audio_mean.flatten(1)
    settings = {"epochs": 150, "rows": "means", "learning_rate": 3e-3, "loss_scaling": "legacy"}
    off, on = (fitted("vae", novelty_weight=weight, **settings)[0] for weight in (0.0, 2.0))
    assert nearest(on, rows) > 1.1 * nearest(off, rows)


@pytest.mark.parametrize(("kind", "share"), [("vae", None), ("gan", None), ("cgan", 0.99)])
def test_a_spec_leaves_the_average_to_the_kind(kind, share):
    for asked, wanted in ((None, share), (0.5, 0.5)):
        generator, _ = fitted(kind, epochs=1, ema=asked)
        assert (generator._average and generator._average._share) == wanted
