"""`cgan`: the discriminator and its penalties by hand, residuals around class means, collapse, the averaged weights."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsim.models.generators import Evidence, GeneratorSpec
from fedsim.models.generators.cgan import Cgan
from fedsim.models.generators.networks import Average, perceptron
from fedsim.models.generators.projection import ProjectionJudge, SpectralLinear, mode_seeking, slope_penalty
from fedsim.seeding import normal, rng
from fedsim.types import ClassStats

C, S, D, V = 3, 2, 3, 4
SIZE = S * D
CONDITION = torch.randn(C, V, generator=torch.Generator().manual_seed(0))
SMALL = {"seed": 1, "hidden_dim": 16, "latent_dim": 4, "learning_rate": 1e-3, "rows_per_class": 32}


def table(*, clients: int = 4, spread: float | None = 0.5) -> ClassStats:
    """Statistics of clients with different counts, every class on all of them."""
    stream = np.random.default_rng(0)
    label = np.tile(np.arange(C), clients)
    mean = 3.0 * normal(stream, C * clients, S, D)
    variance = None if spread is None else torch.full_like(mean, spread)
    return ClassStats(np.repeat(np.arange(clients), C), label, stream.integers(1, 9, C * clients), mean, variance, {})


def fitted(stats: ClassStats | None = None, *, epochs: int = 2, **settings) -> Cgan:
    generator = Cgan(GeneratorSpec(**{**SMALL, **settings}))
    generator.fit(Evidence(stats or table(), CONDITION), epochs=epochs, stream=rng(0, "fit"))
    return generator


def judge(*, spectral: bool) -> ProjectionJudge:
    return ProjectionJudge(SIZE, V, 16, rng(0, "judge"), spectral=spectral)


@pytest.mark.parametrize("spectral", [True, False])
def test_a_score_is_psi_plus_the_projection_of_the_condition(spectral):
    d, x, v = judge(spectral=spectral), normal(rng(0, "x"), C, SIZE), CONDITION
    with torch.no_grad():
        weights = {name: weight.double() for name, weight in d.named_parameters()}
        if spectral:
            for _ in range(500):
                d.iterate()
            weights = {n: w / torch.linalg.matrix_norm(w, 2) if w.ndim == 2 else w for n, w in weights.items()}
        h = functional.leaky_relu(x.double() @ weights["first.weight"].T + weights["first.bias"], 0.2)
        h = functional.leaky_relu(h @ weights["second.weight"].T + weights["second.bias"], 0.2)
        unit = v.double() / v.double().norm(dim=1, keepdim=True)
        wanted = (h @ weights["psi.weight"].T).squeeze(1) + weights["psi.bias"]
        wanted = wanted + ((unit @ weights["condition.weight"].T) * h).sum(1)
        torch.testing.assert_close(d(x, v).double(), wanted, atol=1e-4, rtol=1e-4)


def test_a_discriminator_with_spectral_norm_has_a_bounded_slope_and_one_without_has_not():
    x = (10 * normal(rng(0, "x"), 50, SIZE)).requires_grad_()
    v = 100 * CONDITION[torch.arange(50) % C]
    slopes = []
    for spectral in (True, False):
        d = judge(spectral=spectral)
        with torch.no_grad():
            for weight in d.parameters():
                weight *= 30.0
        for _ in range(50):
            d.iterate()
        (slope,) = torch.autograd.grad(d(x, v).sum(), x)
        slopes.append(float(slope.norm(dim=1).max()))
    assert slopes[0] <= 2.01
    assert slopes[1] > 100


def test_power_iteration_finds_the_largest_singular_value_and_its_gradient():
    layer = SpectralLinear(5, 7, rng(0, "x"))
    early = abs(float(layer.singular().detach()) - float(torch.linalg.matrix_norm(layer.weight.detach(), 2)))
    for _ in range(500):
        layer.iterate()
    left, values, right = torch.linalg.svd(layer.weight.detach())
    torch.testing.assert_close(layer.singular().detach(), values[0])
    assert early < 0.1 * float(values[0])
    (gradient,) = torch.autograd.grad(layer.singular(), layer.weight)
    torch.testing.assert_close(gradient, torch.outer(left[:, 0], right[0]), atol=1e-4, rtol=1e-3)


def test_the_singular_vectors_come_from_the_stream_and_move_once_a_step():
    before = torch.random.get_rng_state()
    one, same, other = (SpectralLinear(5, 7, rng(seed, "x")) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.vector, same.vector)
    assert not torch.equal(one.vector, other.vector)
    # A step of D per batch: 3 classes of 32 rows in batches of 48 are two.
    generator = fitted(epochs=1, batch_size=48, learning_rate=1e-12)
    state, by_hand = generator.state(), Cgan(GeneratorSpec(**SMALL))
    by_hand._build(S, D, V, torch.device("cpu"))
    for _ in range(2):
        by_hand._judge.iterate()
    torch.testing.assert_close(state["judge.second.vector"], by_hand._judge.second.vector)


def test_the_slope_penalty_by_hand():
    x = normal(rng(0, "x"), 4, 3).requires_grad_()
    factor = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    penalty = slope_penalty((factor * x.square()).sum(1), x)
    torch.testing.assert_close(penalty, 0.5 * (2 * factor * x).square().sum(1))
    # 1/2 sum (2 f x)^2 has the slope 4 f x^2 in f: the penalty can be trained on.
    (gradient,) = torch.autograd.grad(penalty.sum(), factor)
    torch.testing.assert_close(gradient, (4 * factor * x.square()).sum(0))


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 1e6])
def test_mode_seeking_is_bounded(scale):
    z, again = normal(rng(0, "z"), 9, 4), normal(rng(0, "again"), 9, 4)
    loss = mode_seeking(scale * z, scale * again, z, again)
    torch.testing.assert_close(loss, torch.full((9,), max(0.0, 1 - scale)), atol=1e-5, rtol=0)


def test_mode_seeking_pushes_draws_apart_and_survives_equal_ones():
    z, again = normal(rng(0, "z"), 1, 2), normal(rng(0, "again"), 1, 2)
    made = torch.tensor([[0.01, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(mode_seeking(made, torch.zeros(1, 2), z, again).sum(), made)
    assert gradient[0, 0] < 0  # further away from the other one is less
    same = torch.zeros(1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(mode_seeking(same, torch.zeros(1, 2), z, z).sum(), same)
    assert torch.isfinite(gradient).all()


def test_class_means_are_carried_by_the_statistics():
    stats = table()
    generator = fitted(stats, epochs=1)
    for c in range(C):
        mine = stats.label == c
        wanted = torch.from_numpy(np.average(stats.audio_mean[mine], axis=0, weights=stats.count[mine])).float()
        # After six steps G's own mean is anywhere; a sample's isn't: 128 pairs know it to less than 0.1 deviations.
        x = generator.sample(CONDITION[c : c + 1], 20_000, stream=rng(0, "x"))
        assert float(((x.mean(0) - wanted) / x.std(0)).abs().max()) < 0.25
        raw = generator._make(generator._average.network, CONDITION[[c] * 5000], rng(0, "x"))[0]
        assert float((raw.mean(0) / raw.std(0)).abs().max()) > 0.25
    # Other means, same deviations around them: the residuals, and so the weights, stay the same.
    shift = 100.0 * torch.arange(C)[torch.from_numpy(stats.label)].view(-1, 1, 1)
    moved = fitted(replace(stats, audio_mean=stats.audio_mean + shift), epochs=1)
    for c in range(C):
        samples = [g.sample(CONDITION[c : c + 1], 50, stream=rng(0, "x")) for g in (generator, moved)]
        torch.testing.assert_close(samples[1] - samples[0], torch.full((50, S, D), 100.0 * c), atol=2e-3, rtol=0)


@pytest.mark.parametrize("settings", [{"discriminator": "r1"}, {"mode_seeking": 0.0}, {"ema": 0.0}, {"rows": "means"}])
def test_options_resume_to_the_bit_and_change_something(settings):
    first, second = fitted(**settings), Cgan(GeneratorSpec(**SMALL, **settings))
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    for generator in (first, second):
        generator.fit(Evidence(table(clients=5), CONDITION), epochs=2, stream=rng(1, "fit"))
    one, other = first.state(), second.state()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = fitted()
    samples = [g.sample(CONDITION, C, stream=rng(0, "x")) for g in (fitted(**settings), plain)]
    assert not torch.equal(*samples)


def test_a_collapsed_generator_is_reported(caplog):
    generator = Cgan(GeneratorSpec(**{**SMALL, "learning_rate": 1e-12}))
    with caplog.at_level(logging.WARNING):
        assert generator.fit(Evidence(table(), CONDITION), epochs=1, stream=rng(0, "fit")).metrics["diversity"] > 0.1
        assert not caplog.records
        with torch.no_grad():
            for network in (generator._maker, generator._average.network):
                for weight in network.parameters():
                    weight.zero_()
        report = generator.fit(Evidence(table(), CONDITION), epochs=1, stream=rng(0, "fit"))
    assert report.metrics["diversity"] < 0.01
    assert "the GAN has collapsed" in caplog.text


def test_one_mean_per_class_without_spread_is_repeated_and_announced(caplog):
    stats = table(clients=1, spread=None)
    with caplog.at_level(logging.WARNING):
        generator = fitted(stats)
    assert "no spread around it: it repeats class means" in caplog.text
    torch.testing.assert_close(generator.sample(CONDITION, C, stream=rng(0, "x")), stats.audio_mean)


def test_an_average_is_the_plain_mean_first_and_then_an_exponential_one():
    network = perceptron([2, 3], rng(0, "x"))
    average, kept, by_hand = Average(network, 0.75), [], torch.zeros(3, 2)
    for step in range(1, 9):
        with torch.no_grad():
            network[0].weight += normal(rng(0, "step", step), 3, 2)
        average.update(network)
        kept.append(network[0].weight.detach().clone())
        by_hand = torch.stack(kept).mean(0) if step <= 4 else 0.75 * by_hand + 0.25 * kept[-1]
        torch.testing.assert_close(average.network[0].weight.detach(), by_hand)
        if step == 3:
            state, average = average.state(), Average(network, 0.75)
            average.load(state)
    off = Average(network, 0.0)
    off.update(network)
    assert torch.equal(off.network[0].weight, network[0].weight)
