"""The pooled within-class covariance: clients' sums, the factor against the one computed centrally, and its merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.algorithms.aggregation import tree_sum
from fedsim.algorithms.batches import ClientRows
from fedsim.algorithms.client_model import AdapterModel
from fedsim.algorithms.objective import make_objective
from fedsim.algorithms.statistics import evaluate_stack
from fedsim.algorithms.within_class import estimate, merged, next_basis
from fedsim.models.adapters import HeadSpec, make_adapter, stack
from fedsim.types import PooledCovariance

S, D, C, RANK = 2, 16, 3, 4
SIZE = S * D
COUNTS = [1, 3, 4, 6, 9, 11]
"""Recordings of the clients, by number of batches of 4."""


def recordings(seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Rows of three classes that spread along a few axes: embeddings [N, S, D], labels [N]."""
    torch.manual_seed(seed)
    labels = np.random.default_rng(seed).integers(0, C, sum(COUNTS))
    axes = torch.linalg.qr(torch.randn(SIZE, RANK)).Q * torch.tensor([8.0, 4.0, 2.0, 1.0])
    means = 5 * torch.randn(C, SIZE)
    rows = means[labels] + torch.randn(len(labels), RANK) @ axes.T + 0.05 * torch.randn(len(labels), SIZE)
    return rows.view(-1, S, D), labels


def of_clients(clients: list[int], *, seed: int = 0) -> ClientRows:
    rows, labels = recordings(seed)
    ends = np.cumsum(COUNTS)
    own = [np.arange(ends[k] - COUNTS[k], ends[k]) for k in clients]
    return ClientRows(
        client=np.array(clients),
        counts=np.array([COUNTS[k] for k in clients]),
        rows=np.concatenate(own),
        inputs=rows,
        lengths=torch.zeros(len(rows), dtype=torch.int64),
        labels=torch.from_numpy(labels),
    )


def sums_of(clients: list[int], basis: torch.Tensor, *, min_count: int = 2) -> dict[str, torch.Tensor]:
    targets = {"clip": torch.randn(C, 16, generator=torch.Generator().manual_seed(0))}
    objective = make_objective(targets)
    spec = {"clip": HeadSpec(preset="mlp", shape=(16,), hidden=(16,), width=16, num_heads=2)}
    adapter = make_adapter((S, D), spec, centre=objective.centre, scale={"clip": 1.0})
    params = {name: t.repeat(len(clients), *(1,) * (t.ndim - 1)) for name, t in stack(adapter.init(0)).items()}
    found = evaluate_stack(
        AdapterModel(adapter),
        params,
        of_clients(clients),
        objective=objective,
        batch_size=4,
        stats_min_count=min_count,
        basis=basis,
    )
    return {name: tree_sum(total) for name, total in found.sums.items()}


def central(clients: list[int], *, min_count: int = 2) -> tuple[torch.Tensor, int]:
    """Within-class scatter [E, E] by the definition, in float64, and its degrees of freedom."""
    rows, labels = recordings()
    ends, scatter, freedom = np.cumsum(COUNTS), torch.zeros(SIZE, SIZE, dtype=torch.float64), 0
    for k in clients:
        mine = np.arange(ends[k] - COUNTS[k], ends[k])
        for label in range(C):
            own = rows[mine[labels[mine] == label]].flatten(1).double()
            if len(own) >= min_count:
                d = own - own.mean(0)
                scatter, freedom = scatter + d.T @ d, freedom + len(own) - 1
    return scatter, freedom


EVERYONE = list(range(len(COUNTS)))


def basis_of(known: PooledCovariance | None, *, rank: int = RANK, round_number: int = 1) -> torch.Tensor:
    return next_basis(known, size=SIZE, rank=rank, seed=0, round_number=round_number)


@pytest.mark.parametrize("min_count", [1, 2, 4])
def test_sums_of_clients_are_those_of_the_definition(min_count):
    basis = basis_of(None)
    scatter, freedom = central(EVERYONE, min_count=min_count)
    sums = sums_of(EVERYONE, basis, min_count=min_count)
    torch.testing.assert_close(sums["product"].double(), scatter @ basis.double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums["diagonal"].double(), scatter.diagonal(), rtol=1e-4, atol=1e-3)
    assert sums["freedom"].tolist() == [freedom]


def test_a_client_adds_the_same_bits_alone_as_among_others():
    basis = basis_of(None)
    together, alone = sums_of(EVERYONE, basis), [sums_of([k], basis) for k in EVERYONE]
    for name, total in together.items():
        assert torch.equal(total, tree_sum(torch.stack([own[name] for own in alone])))


def test_the_factor_of_many_clients_is_the_one_computed_centrally():
    known = None
    for round_number in range(1, 12):
        basis = basis_of(known, round_number=round_number)
        known = estimate(sums_of(EVERYONE, basis), basis)
    scatter, freedom = central(EVERYONE)
    values, vectors = torch.linalg.eigh(scatter / freedom)
    wanted = (vectors[:, -RANK:] * values[-RANK:]) @ vectors[:, -RANK:].T
    found = known.factor.double() @ known.factor.double().T
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    assert known.freedom == freedom
    torch.testing.assert_close(known.variance.double(), scatter.diagonal() / freedom, rtol=1e-4, atol=1e-4)
    # Longest first, and an axis points where its largest coordinate is positive.
    torch.testing.assert_close(known.factor.square().sum(0).double(), values[-RANK:].flip(0), rtol=1e-4, atol=0)
    assert (known.factor.gather(0, known.factor.abs().argmax(0, keepdim=True)) > 0).all()


def test_one_round_of_as_many_axes_as_numbers_gives_the_covariance_itself():
    basis = basis_of(None, rank=10 * SIZE)
    assert torch.equal(basis, torch.eye(SIZE))
    found = estimate(sums_of(EVERYONE, basis), basis)
    scatter, freedom = central(EVERYONE)
    covariance = found.factor @ found.factor.T + found.residual.diag()
    assert (covariance - scatter / freedom).norm() < 1e-4 * (scatter / freedom).norm()


def test_the_first_round_already_finds_most_of_the_spread():
    basis = basis_of(None, rank=2 * RANK)
    found, (scatter, freedom) = estimate(sums_of(EVERYONE, basis), basis), central(EVERYONE)
    covariance = found.factor @ found.factor.T + found.residual.diag()
    assert (covariance - scatter / freedom).norm() < 0.02 * (scatter / freedom).norm()


def test_without_two_recordings_of_a_class_there_is_nothing_to_estimate():
    basis = basis_of(None)
    sums = sums_of([0], basis)
    assert all(not total.any() for total in sums.values())
    assert estimate(sums, basis) is None


def test_recordings_that_are_all_equal_have_a_covariance_of_zero():
    none = {"product": torch.zeros(SIZE, RANK), "diagonal": torch.zeros(SIZE), "freedom": torch.ones(1)}
    found = estimate(none, basis_of(None))
    assert not found.factor.any()
    assert not found.residual.any()
    torch.testing.assert_close(basis_of(found).T @ basis_of(found), torch.eye(RANK), atol=1e-5, rtol=0)


def test_a_basis_keeps_the_known_axes_and_fills_up_with_random_ones():
    factor = torch.zeros(SIZE, RANK)
    factor[3, 0], factor[5, 1] = 2.0, 1.0
    known = PooledCovariance(factor, torch.ones(SIZE), 7.0)
    first, second = (basis_of(known, round_number=n) for n in (1, 2))
    for basis in (first, second):
        torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), atol=1e-5, rtol=0)
        torch.testing.assert_close(basis[3, 0].abs(), torch.tensor(1.0))
        torch.testing.assert_close(basis[5, 1].abs(), torch.tensor(1.0))
    assert not torch.equal(first[:, 2:], second[:, 2:])
    assert torch.equal(first, basis_of(known, round_number=1))


def covariance(*, seed: int, freedom: float) -> PooledCovariance:
    torch.manual_seed(seed)
    return PooledCovariance(torch.randn(SIZE, RANK), torch.rand(SIZE), freedom)


def test_rounds_are_merged_by_freedom_and_memory():
    old, new = covariance(seed=0, freedom=20.0), covariance(seed=1, freedom=10.0)
    both = merged(old, new, memory=0.5)
    assert both.freedom == 20.0
    torch.testing.assert_close(both.variance, 0.5 * old.variance + 0.5 * new.variance)
    whole = 0.5 * (old.factor @ old.factor.T + new.factor @ new.factor.T)
    values, vectors = torch.linalg.eigh(whole)
    best = (vectors[:, -RANK:] * values[-RANK:]) @ vectors[:, -RANK:].T
    torch.testing.assert_close(both.factor @ both.factor.T, best, atol=1e-4, rtol=1e-4)


def test_the_whole_population_needs_no_memory_and_an_empty_round_changes_nothing():
    old, new = covariance(seed=0, freedom=20.0), covariance(seed=1, freedom=10.0)
    assert merged(old, new, memory=0) is new
    assert merged(None, new, memory=0.7) is new
    assert merged(old, None, memory=0) is old
    assert merged(None, None, memory=0.7) is None
