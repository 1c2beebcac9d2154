"""Clipping, noise and the accountant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from fedsim.algorithms import privacy
from fedsim.algorithms.privacy import Accountant, clip_factors, noise_for, noised, require_accountant
from fedsim.errors import ConfigError


def test_a_clipped_client_is_at_most_as_long_as_the_norm_and_a_short_one_stays():
    torch.manual_seed(0)
    stack = {"a": torch.randn(3, 2, 4), "b": torch.randn(3, 5)}
    stack = {name: t * torch.tensor([0.01, 1.0, 50.0]).view(-1, *(1,) * (t.ndim - 1)) for name, t in stack.items()}
    factors = clip_factors(stack, 1.5)
    joint = torch.cat([t.flatten(1) for t in stack.values()], dim=1).norm(dim=1)
    torch.testing.assert_close(factors * joint, torch.tensor([joint[0], 1.5, 1.5]))
    assert factors[0] == 1
    scaled = clip_factors(stack, 1.5, {"a": 0.5, "b": 3.0})
    joint = torch.cat([stack["a"].flatten(1) * 0.5, stack["b"] * 3.0], dim=1).norm(dim=1)
    torch.testing.assert_close(scaled, (1.5 / joint).clamp(max=1))


def test_a_client_of_zeros_is_not_clipped():
    assert clip_factors({"a": torch.zeros(2, 3)}, 1.0).tolist() == [1.0, 1.0]


def test_a_client_s_factor_does_not_depend_on_its_neighbours():
    stack = {"a": torch.randn(9, 7, 16), "b": torch.randn(9, 33)}
    together = clip_factors(stack, 0.3)
    for k in range(9):
        assert torch.equal(clip_factors({name: t[k : k + 1] for name, t in stack.items()}, 0.3), together[k : k + 1])


def test_noise_has_the_deviation_asked_for_and_is_a_function_of_seed_round_and_name():
    sums = {"a": torch.full((200, 100), 5.0), "b": torch.zeros(20_000)}
    made = noised(sums, {"a": 2.0, "b": 0.5}, seed=1, round_number=3, what="sums")
    assert float((made["a"] - 5).std()) == pytest.approx(2.0, rel=0.02)
    assert float(made["b"].std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(np.corrcoef(made["a"].flatten()[:20_000], made["b"])[0, 1])) < 0.03
    alone = noised({"b": sums["b"]}, {"b": 0.5}, seed=1, round_number=3, what="sums")
    assert torch.equal(alone["b"], made["b"])
    for seed, number, what in ((2, 3, "sums"), (1, 4, "sums"), (1, 3, "changes")):
        assert not torch.equal(
            noised(sums, {"a": 1.0, "b": 0.5}, seed=seed, round_number=number, what=what)["b"], made["b"]
        )


def test_no_sum_leaves_without_noise_by_oversight():
    with pytest.raises(KeyError, match="new"):
        noised({"new": torch.zeros(1)}, {"a": 1.0}, seed=0, round_number=1, what="sums")


@pytest.mark.parametrize(("multiplier", "rate"), [(1.0, 0.1), (2.0, 1.0), (0.8, 0.02)])
def test_epsilon_is_the_library_s_own(multiplier, rate):
    by_hand = RDPAccountant()
    for done in range(1, 16):
        by_hand.step(noise_multiplier=multiplier, sample_rate=rate)
        if done in (1, 15):
            expected = by_hand.get_epsilon(delta=1e-3)
            assert Accountant(multiplier, rate, 1e-3).epsilon(done) == pytest.approx(expected, rel=1e-12)


def test_epsilon_without_sampling_is_the_gaussian_mechanism_s():
    """By the formulas: Renyi divergence T a / (2 z^2) at order a, converted by Balle et al. 2020, theorem 21."""
    z, rounds, delta = 3.0, 15, 1e-3
    orders = np.array(RDPAccountant.DEFAULT_ALPHAS)
    bound = rounds * orders / (2 * z**2) + np.log((orders - 1) / orders) - np.log(delta * orders) / (orders - 1)
    assert Accountant(z, 1.0, delta).epsilon(rounds) == pytest.approx(bound.min(), rel=1e-9)
    assert compute_rdp(q=1.0, noise_multiplier=z, steps=rounds, orders=2.0) == pytest.approx(rounds / z**2)


def test_much_noise_costs_nothing_and_is_no_warning():
    assert Accountant(1000.0, 1.0, 0.1).epsilon(1) == 0


@pytest.mark.parametrize(("epsilon", "rate"), [(8.0, 1.0), (1.0, 0.1)])
def test_noise_is_enough_for_the_epsilon_asked_for_and_hardly_more(epsilon, rate):
    multiplier = noise_for(epsilon, sample_rate=rate, delta=1e-3, rounds=20)
    assert 0.98 * epsilon < Accountant(multiplier, rate, 1e-3).epsilon(20) <= epsilon


def test_an_epsilon_out_of_reach_is_refused():
    with pytest.raises(ConfigError, match=r"target_epsilon is 1e-09.*larger"):
        noise_for(1e-9, sample_rate=1.0, delta=1e-30, rounds=20)


def test_a_missing_accountant_is_said(monkeypatch):
    monkeypatch.setattr(privacy, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"fedsim-a2v\[privacy\]"):
        require_accountant()
