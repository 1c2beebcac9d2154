"""Quality of synthetic rows: values by hand, Gaussians with known distances, and what is left out."""

from __future__ import annotations

import logging
import math
import time
from statistics import median

import numpy as np
import pytest
import torch

from fedsim.algorithms import generator_quality as module
from fedsim.algorithms.generator_quality import (
    class_mean_nmse,
    correlation_error,
    coverage,
    diversity,
    frechet,
    frechet_diagonal,
    generator_quality,
    paired,
    precision,
    tstr_top1,
)

NAMES = {
    "nmse", "frechet_diagonal", "frechet", "correlation_error", "diversity", "coverage", "precision", "tstr_top1",
    "missing_classes",
}  # fmt: skip


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def exactly(rows: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """The rows made to have exactly this mean and (unbiased) covariance."""
    centred = rows - rows.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(centred.T.cov()), centred.T, upper=False).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def classes(num_classes: int, rows: int, width: int, *, seed: int, apart: float = 5.0):
    """Unit Gaussians around class means that don't depend on the seed: rows [n, 1, width] and labels [n]."""
    labels = torch.arange(num_classes).repeat_interleave(rows)
    means = apart * normal(0, num_classes, width)
    return (means[labels] + normal(seed, len(labels), width)).unsqueeze(1).float(), labels


def test_class_mean_nmse_by_hand():
    zero, four = torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([[3.0], [5.0]]).double()
    # Class means 0 and 4 lie 2 from their mean; synthetic means are off by 1 and 0.
    assert class_mean_nmse([(zero, zero + 1), (four, four)]) == pytest.approx((1 / 2) / 4)
    assert class_mean_nmse([(zero, zero + 2), (four, four - 2)]) == pytest.approx(1.0)  # the grand mean for both
    assert class_mean_nmse([(zero, four)]) is None
    assert class_mean_nmse([(zero, zero), (zero, four)]) is None


def test_frechet_between_known_gaussians():
    mean, one = torch.tensor([1.0, -2.0, 0.5]).double(), torch.eye(3).double()
    root = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 3.0]]).double()
    covariance = root @ root
    real = exactly(normal(1, 40, 3), 0 * mean, one)
    made = exactly(normal(2, 50, 3), mean, covariance)
    # Against a unit covariance tr(R S)^(1/2) is the trace of the root of S.
    wanted = 5.25 + 3 + float(covariance.trace()) - 2 * 6.0
    assert frechet([(real, made)]) == pytest.approx(wanted)
    assert frechet([(made, real)]) == pytest.approx(wanted)
    deviations = covariance.diagonal().sqrt()
    assert frechet_diagonal([(real, made)]) == pytest.approx(5.25 + float((deviations - 1).square().sum()))
    diagonal = exactly(normal(3, 30, 3), mean, torch.diag(torch.tensor([4.0, 9.0, 0.25]).double()))
    assert frechet([(real, diagonal)]) == pytest.approx(5.25 + 1 + 4 + 0.25)
    assert frechet_diagonal([(real, diagonal)]) == pytest.approx(5.25 + 1 + 4 + 0.25)


def test_frechet_is_that_of_a_matrix_root_and_defined_for_singular_covariances():
    from scipy.linalg import sqrtm

    a, b = normal(1, 30, 5) @ normal(2, 5, 5), normal(3, 25, 5) @ normal(4, 5, 5) + 1
    root = np.real(sqrtm(a.T.cov().numpy() @ b.T.cov().numpy()))
    wanted = float((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()) - 2 * root.trace()
    assert frechet([(a, b)]) == pytest.approx(wanted)
    few = normal(5, 3, 20)
    assert frechet([(few, few)]) == pytest.approx(0.0, abs=1e-9)
    assert frechet([(few, few + 2)]) == pytest.approx(4 * 20)
    assert frechet([(few[:1], few)]) is None
    assert frechet([(few[:1], few), (few, few + 2)]) == pytest.approx(4 * 20)  # of the class that has enough


def test_frechet_looks_along_the_main_axes_of_the_real_rows():
    rows = normal(1, 200, 60) * torch.cat([torch.full((32,), 3.0), torch.full((28,), 1e-3)])
    labels = torch.zeros(200, dtype=torch.int64)
    along, across = torch.zeros(60).double(), torch.zeros(60).double()
    along[0], across[40] = 2.0, 2.0
    assert generator_quality(rows, labels, rows + along, labels)["frechet"] == pytest.approx(4.0, rel=1e-3)
    assert generator_quality(rows, labels, rows + across, labels)["frechet"] < 0.01
    assert generator_quality(rows, labels, rows + across, labels)["frechet_diagonal"] == pytest.approx(4.0)
    # As many coordinates as axes: nothing is left out.
    narrow = rows[:, 20:52]
    assert generator_quality(narrow, labels, narrow + across[20:52], labels)["frechet"] == pytest.approx(4.0)
    # More coordinates than rows takes the other way to the axes.
    found = generator_quality(rows[:50], labels[:50], rows[:50] + along, labels[:50])["frechet"]
    assert found == pytest.approx(4.0, rel=1e-2)


def test_correlation_error_by_hand():
    real = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double()  # correlation 1
    none = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()  # correlation 0
    # |S - R| = sqrt(2) where the two differ in both off-diagonal entries, |R| = 2.
    assert correlation_error([(real, none)]) == pytest.approx(math.sqrt(2) / 2)
    assert correlation_error([(real, real * torch.tensor([3.0, 0.1]))]) == pytest.approx(0.0, abs=1e-3)
    assert correlation_error([(real, real * torch.tensor([1.0, -1.0]))]) == pytest.approx(math.sqrt(8) / 2)


@pytest.mark.parametrize("width", [6, 300])  # fewer and more coordinates than rows
def test_correlation_error_of_a_copy_and_of_shuffled_coordinates(width):
    mixing = normal(1, 3, width)

    def rows(seed: int, n: int) -> torch.Tensor:
        return normal(seed, n, 3) @ mixing + 0.3 * normal(seed + 100, n, width)

    real = [rows(seed, 200) + 5 * seed for seed in (1, 2)]  # means of classes must not count as correlation
    copy = [rows(seed, 200) - seed for seed in (3, 4)]
    stream = np.random.default_rng(0)
    shuffled = [
        torch.stack([column[torch.from_numpy(stream.permutation(200))] for column in part.T], dim=1) for part in copy
    ]
    assert correlation_error(list(zip(real, copy, strict=True))) < 0.15
    assert correlation_error(list(zip(real, shuffled, strict=True))) > 0.7
    matrices = [torch.cat([p - p.mean(0) for p in side]).T.corrcoef() for side in (real, shuffled)]
    wanted = float((matrices[1] - matrices[0]).norm() / matrices[0].norm())
    assert correlation_error(list(zip(real, shuffled, strict=True))) == pytest.approx(wanted)


def test_diversity_is_a_ratio_of_variances():
    real = normal(1, 20, 4)
    assert diversity([(real, 3 * real + 1), (5 * real, 15 * real)]) == pytest.approx(9.0)
    assert diversity([(real, real[:1].expand(7, -1))]) == pytest.approx(0.0, abs=1e-12)
    assert diversity([(real[:1], real)]) is None
    assert diversity([(real[:1].expand(7, -1), real)]) is None


def test_precision_and_coverage_of_identical_and_of_far_sets():
    real = 100 + normal(1, 12, 6)
    assert coverage([(real, real)]) == precision([(real, real)]) == 1.0
    assert coverage([(real, real + 50)]) == precision([(real, real + 50)]) == 0.0
    same = real[:1].expand(4, -1)  # balls without extent hold what is equal
    assert coverage([(same, same[:1])]) == precision([(same, same[:1])]) == 1.0
    assert coverage([(real[:1], real)]) is None
    assert precision([(real[:1], real), (real, real)]) == 1.0


def test_precision_and_coverage_by_hand():
    line = torch.arange(7.0).double().unsqueeze(1)  # the fifth nearest is 6 - i away at the left end, 3 in the middle
    made = torch.tensor([[-4.5], [8.9], [30.0]]).double()
    # Balls: 0+-5, 1+-4, 2+-3, 3+-3, 4+-3, 5+-4, 6+-5.
    assert precision([(line, made)]) == pytest.approx(2 / 3)
    assert coverage([(line, made)]) == pytest.approx(3 / 7)  # the balls of 0, of 5 (up to 9) and of 6
    # Three rows have two other ones: k is 2. Balls: 0+-2, 1+-1, 2+-2.
    assert precision([(line[:3], torch.tensor([[3.5], [-3.0]]).double())]) == pytest.approx(1 / 2)
    assert coverage([(line[:3], torch.tensor([[2.0]]).double())]) == 1.0


def test_classifier_trained_on_synthetic_rows():
    real, labels = classes(4, 10, 30, seed=1)
    made, made_labels = classes(4, 16, 30, seed=2)
    assert tstr_top1(paired(real, labels, made, made_labels)) == 1.0
    assert tstr_top1(paired(real, labels, made, (made_labels + 1) % 4)) == 0.0
    assert tstr_top1(paired(real, labels, made, 0 * made_labels)) is None


@pytest.mark.slow
@pytest.mark.parametrize("width", [20, 400])
def test_classifier_is_that_of_scikit_learn(width):
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    (real, labels), (made, made_labels) = (
        classes(5, 40, width, seed=seed, apart=0.4 if width < 40 else 0.1) for seed in (1, 2)
    )
    made[:, :, 3] = 7.0  # a constant coordinate
    scaler = StandardScaler().fit(made.flatten(1).numpy())
    peer = RidgeClassifier(alpha=width).fit(scaler.transform(made.flatten(1).numpy()), made_labels.numpy())
    wanted = peer.score(scaler.transform(real.flatten(1).numpy()), labels.numpy())
    assert tstr_top1(paired(real, labels, made, made_labels)) == pytest.approx(wanted)
    assert 0.3 < wanted < 1.0


def test_all_of_them_from_embeddings_with_segments():
    real, labels = classes(3, 9, 24, seed=1)
    made, made_labels = classes(3, 16, 24, seed=2)
    found = generator_quality(real.view(-1, 4, 6), labels, made.view(-1, 4, 6), made_labels)
    assert found.keys() == NAMES
    assert found == generator_quality(real, labels, made, made_labels)
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    assert found["nmse"] < 0.05
    assert 0.5 < found["diversity"] < 2.0
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))
    mixed = generator_quality(real, labels, made[order], made_labels[order])
    assert mixed == pytest.approx(found, rel=1e-5)


def test_what_is_not_defined_is_left_out():
    real, labels = classes(3, 6, 5, seed=1)
    made, made_labels = classes(2, 6, 5, seed=2)
    assert generator_quality(real, labels, made, made_labels)["missing_classes"] == 1.0
    one = generator_quality(real[:6], labels[:6], made[:6], made_labels[:6])
    assert one.keys() == NAMES - {"nmse", "tstr_top1"}
    single = generator_quality(real[::6], labels[::6], made, made_labels)  # one recording of every class
    assert single.keys() == {"nmse", "tstr_top1", "missing_classes"}
    repeated = generator_quality(real, labels, made[::6].repeat_interleave(6, 0), made_labels)
    assert repeated.keys() == NAMES - {"correlation_error"}
    assert repeated["diversity"] == pytest.approx(0.0, abs=1e-12)
    assert generator_quality(real, labels, made, made_labels + 9) == {"missing_classes": 3.0}
    flat = generator_quality(torch.full_like(real, 0.1), labels, torch.full_like(made, 0.1), made_labels)
    assert flat.keys() == {"frechet", "frechet_diagonal", "coverage", "precision", "tstr_top1", "missing_classes"}


def test_constant_coordinates_change_nothing_of_correlations():
    real, labels = classes(2, 9, 5, seed=1)
    made, made_labels = classes(2, 9, 5, seed=2)
    wanted = generator_quality(real, labels, made, made_labels)
    wider = [torch.cat([x, torch.full_like(x[..., :2], 0.1)], dim=2) for x in (real, made)]
    found = generator_quality(wider[0], labels, wider[1], made_labels)
    assert found["correlation_error"] == pytest.approx(wanted["correlation_error"])
    assert found["frechet"] == pytest.approx(wanted["frechet"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_announced(bad, caplog):
    real, labels = classes(2, 4, 5, seed=1)
    made = real.clone()
    made[3, 0, 1] = bad
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        assert generator_quality(real, labels, made, labels) == {}
    assert "aren't finite" in caplog.text


def test_inputs_are_left_as_they_are_and_no_global_stream_is_used():
    real, labels = classes(2, 4, 50, seed=1)
    made, made_labels = classes(2, 8, 50, seed=2)
    kept, state = (real.clone(), made.clone()), torch.get_rng_state()
    generator_quality(real, labels, made, made_labels)
    assert torch.equal(kept[0], real)
    assert torch.equal(kept[1], made)
    assert torch.equal(state, torch.get_rng_state())


def test_it_takes_a_fraction_of_a_second():
    torch.set_num_threads(1)
    (real, labels), (made, made_labels) = classes(10, 8, 2048, seed=1), classes(10, 64, 2048, seed=2)
    spent = []
    for _ in range(3):
        start = time.process_time()
        generator_quality(real, labels, made, made_labels)
        spent.append(time.process_time() - start)
    assert median(spent) < 1.0  # seconds of CPU; about 0.2 on an idle core
