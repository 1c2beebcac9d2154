"""A residual generator trained on clients: its rows, noise and loss, sums over stacks, and what clients learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clients import training

from fedsim.algorithms import client_generator
from fedsim.algorithms.aggregation import tree_sum
from fedsim.algorithms.batches import ClientRows
from fedsim.algorithms.client_generator import PREFIX, WEIGHT, ClientGenerators, averaged, residuals
from fedsim.models.adapters import stack
from fedsim.models.generators import Evidence
from fedsim.models.generators.residual_vae import ResidualVae, decode, init, loss_rows
from fedsim.seeding import rng
from fedsim.types import ClassStats, PooledCovariance

S, D, C, HIDDEN, LATENT = 2, 8, 3, 16, 4
SIZE = S * D
POOLED = PooledCovariance(
    torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(1)), torch.linspace(0.5, 2.0, SIZE), 100.0
)
NETWORK = init(POOLED, hidden_dim=HIDDEN, latent_dim=LATENT, seed=0)
HOW = training(optimizer="AdamW", learning_rate=0.01, batch_size=4, local_epochs=2)


def clients_with(counts: list[list[int]], *, seed: int = 0) -> tuple[ClientRows, torch.Tensor]:
    """Clients with so many recordings of every class, ordered by their number; correlated embeddings [n, S, D]."""
    torch.manual_seed(seed)
    mixing, means = torch.randn(SIZE, SIZE) / 2, 4 * torch.randn(C, SIZE)
    labels = [np.repeat(np.arange(C), own) for own in counts]
    flat = np.concatenate(labels)
    x = (means[flat] + torch.randn(len(flat), SIZE) @ mixing).view(-1, S, D)
    totals = np.array([len(own) for own in labels])
    assert (np.diff(totals) >= 0).all()
    data = ClientRows(
        client=10 + np.arange(len(counts)),
        counts=totals,
        rows=np.arange(len(flat)),
        inputs=x,
        lengths=torch.zeros(len(flat), dtype=torch.int64),
        labels=torch.from_numpy(flat),
    )
    return data, x


UNEQUAL = [[1, 1, 0], [0, 3, 0], [2, 1, 1], [4, 0, 2], [0, 9, 1], [5, 5, 5]]
"""The first has nothing to train on, the third less than its size says."""


def train(data: ClientRows, x: torch.Tensor, *, how=HOW, network=NETWORK, round_number: int = 1):
    trainer = ClientGenerators(how, min_count=2)
    deviation = torch.full((SIZE,), 2.0)
    return trainer.train(data, x, network=network, deviation=deviation, seed=0, round_number=round_number)[0]


def test_residuals_are_taken_from_the_clients_own_class_mean_and_stretched():
    data, x = clients_with([[1, 3, 0], [2, 2, 1]])
    deviation = torch.arange(1.0, SIZE + 1)
    chosen, place = residuals(data, x, deviation, min_count=2)
    assert chosen.client.tolist() == [10, 11]
    assert place.tolist() == [0, 1]
    assert chosen.counts.tolist() == [3, 4]
    rows = x.flatten(1)
    own = rows[1:4]
    wanted = (own - own.mean(0)) * (3 / 2) ** 0.5 / deviation
    torch.testing.assert_close(chosen.inputs[chosen.rows[:3]], wanted)
    first, second = chosen.inputs[chosen.rows[3:5]]
    torch.testing.assert_close(first, -second)
    torch.testing.assert_close(first, (rows[4] - rows[5]) / 2 * 2**0.5 / deviation)
    # From three recordings on: class 1 of the first client alone.
    assert residuals(data, x, deviation, min_count=3)[0].client.tolist() == [10]
    assert residuals(data, x, deviation, min_count=4)[1].tolist() == []


def test_residuals_have_the_spread_of_the_classes_however_few_the_recordings():
    data, x = clients_with([[2, 2, 2]] * 4000)
    chosen, _ = residuals(data, x, torch.ones(SIZE), min_count=2)
    torch.manual_seed(0)
    mixing = torch.randn(SIZE, SIZE) / 2
    covariance = mixing.T @ mixing
    assert (torch.cov(chosen.inputs.T) - covariance).norm() < 0.05 * covariance.norm()


def test_clients_are_put_in_the_order_of_what_is_left_to_train_on():
    chosen, place = residuals(*clients_with(UNEQUAL), torch.ones(SIZE), min_count=2)
    assert place.tolist() == [2, 1, 3, 4, 5]
    assert chosen.counts.tolist() == [2, 3, 6, 9, 15]
    assert chosen.client.tolist() == [12, 11, 13, 14, 15]


def test_a_stack_adds_up_what_its_clients_do_alone_bit_for_bit(monkeypatch):
    data, x = clients_with(UNEQUAL)
    together = train(data, x)
    ends = np.cumsum(data.counts)
    alone = []
    for k, some in enumerate(data.split(1)):
        own = train(some, x[ends[k] - data.counts[k] : ends[k]])
        assert (float(own[WEIGHT]) == 0) == (k == 0)
        alone.append(own)
    assert together.keys() == {WEIGHT, *(PREFIX + name for name in NETWORK)}
    for name, total in together.items():
        assert torch.equal(total, tree_sum(torch.stack([own[name] for own in alone]))), name
    monkeypatch.setattr(client_generator, "STACK_BYTES", 1)  # one client at a time
    assert all(torch.equal(total, together[name]) for name, total in train(data, x).items())
    assert together[WEIGHT].tolist() == [2 + 3 + 6 + 9 + 15]


def test_clients_with_nothing_to_train_on_leave_the_network_as_it_was():
    data, x = clients_with([[1, 1, 0], [1, 0, 1]])
    sums = train(data, x)
    assert not any(total.any() for total in sums.values())
    assert averaged(NETWORK, sums) is NETWORK
    assert averaged(NETWORK, {}) is NETWORK


def test_averaging_is_weighted_by_recordings():
    sums = {PREFIX + "a": torch.tensor([6.0]), WEIGHT: torch.tensor([4.0])}
    assert averaged({"a": torch.tensor([1.0])}, sums)["a"].tolist() == [2.5]


def test_noise_is_normal_and_a_function_of_client_step_and_round():
    noise = client_generator.normal_rows(0, "client-generator", 1, np.arange(200), 3, 1002)
    assert noise.shape == (200, 1002)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert abs(float((noise**4).mean()) - 3) < 0.1
    assert float(torch.corrcoef(noise[:, :2].T)[0, 1].abs()) < 0.25
    assert torch.equal(noise[17:18], client_generator.normal_rows(0, "client-generator", 1, np.array([17]), 3, 1002))
    for seed, round_number, step in ((1, 1, 3), (0, 2, 3), (0, 1, 4)):
        assert not torch.equal(
            noise, client_generator.normal_rows(seed, "client-generator", round_number, np.arange(200), step, 1002)
        )


def random_network() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: 0.3 * torch.randn(tensor.shape) for name, tensor in NETWORK.items()}


def test_the_loss_is_minus_the_evidence_bound_per_number():
    params = stack(random_network())
    r, noise = torch.randn(1, 5, SIZE), torch.randn(1, 5, LATENT)

    def half(name, x):
        hidden = torch.nn.functional.gelu(x @ params[f"{name}.0.weight"] + params[f"{name}.0.bias"].unsqueeze(1))
        direct = x @ params[f"{name}.linear.weight"] + params[f"{name}.1.bias"].unsqueeze(1)
        return hidden @ params[f"{name}.1.weight"] + direct

    mu, log_variance = half("recognition", r).chunk(2, dim=-1)
    posterior = torch.distributions.Normal(mu, (log_variance / 2).exp())
    z = mu + (log_variance / 2).exp() * noise
    torch.testing.assert_close(decode(params, z), half("decoder", z))
    likelihood = torch.distributions.Normal(half("decoder", z), (params["log_noise"] / 2).exp().unsqueeze(1))
    bound = likelihood.log_prob(r).sum(-1) - torch.distributions.kl_divergence(
        posterior, torch.distributions.Normal(0.0, 1.0)
    ).sum(-1)
    constant = 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(loss_rows(params, r, noise), -bound / SIZE - constant, rtol=1e-4, atol=1e-5)


def test_a_network_starts_as_the_gaussian_of_the_pooled_covariance():
    scale = POOLED.variance.sqrt()
    params = stack(NETWORK)
    z = torch.randn(1, 50_000, LATENT)
    r = decode(params, z)[0] + (params["log_noise"] / 2).exp() * torch.randn(50_000, SIZE)
    wanted = POOLED.factor @ POOLED.factor.T + POOLED.residual.diag()
    assert (torch.cov((r * scale).T) - wanted).norm() < 0.03 * wanted.norm()
    # Its recognition half is the posterior: the bound lies within the posterior's neglected correlations of the truth.
    loss = loss_rows(params, r[:2000].unsqueeze(0), torch.randn(1, 2000, LATENT)).mean()
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(SIZE), wanted / scale.outer(scale))
    exact = -gaussian.log_prob(r[:2000]).mean() / SIZE - 0.5 * np.log(2 * np.pi)
    assert exact - 0.01 < loss < exact + 0.1


@pytest.mark.slow
def test_clients_together_learn_the_spread_within_classes():
    data, x = clients_with([[24, 24, 24]] * 8)
    how = training(optimizer="AdamW", learning_rate=5e-3, batch_size=24, local_epochs=10)
    # Nothing is known of how coordinates go together: the clients have to find out.
    ignorant = PooledCovariance(torch.zeros(SIZE, 1), torch.full((SIZE,), 4.0), 1.0)
    network = init(ignorant, hidden_dim=64, latent_dim=16, seed=0)
    for round_number in range(1, 41):
        network = averaged(network, train(data, x, how=how, network=network, round_number=round_number))
    generator = ResidualVae()
    generator.take(network, torch.full((SIZE,), 2.0))
    stats = ClassStats(
        np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64), torch.zeros(1, S, D), None, {}
    )
    chosen, _ = residuals(data, x, torch.ones(SIZE), min_count=2)
    covariance = torch.cov(chosen.inputs[chosen.rows].T)
    pooled = PooledCovariance(torch.zeros(SIZE, 1), covariance.diagonal(), 500.0)
    generator.fit(Evidence(stats, torch.ones(1, 2), pooled), epochs=1, stream=rng(0, "x"))
    made = generator.sample(torch.ones(1, 2), 20_000, stream=rng(0, "y")).flatten(1)
    assert (torch.cov(made.T) - covariance).norm() < 0.15 * covariance.norm()
    assert float(made.mean(0).norm() / covariance.trace().sqrt()) < 0.1
