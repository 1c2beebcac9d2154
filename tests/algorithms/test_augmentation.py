"""Synthetic rows in the batches of local training: how many, of which classes, around which means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_client_generator import NETWORK, POOLED, SIZE, C, clients_with

from fedsim.algorithms.augmentation import StackGenerator, least_values, most_rows
from fedsim.algorithms.batches import ClientRows, training_batches
from fedsim.algorithms.client_generator import class_means
from fedsim.models.adapters import stack

B = 4
DEVIATION = POOLED.variance.sqrt()


def generator_of(data: ClientRows, x: torch.Tensor, *, share: float = 1.0, own: bool = False, **kwargs):
    means = class_means(data, x, num_classes=C)
    parts = dict(
        client=data.client,
        pairs=torch.from_numpy(means.pairs),
        mean=means.mean,
        least=least_values(means, clients=len(data), num_classes=C),
        params=stack(NETWORK, len(data) if own else 1),
        deviation=DEVIATION,
        num_classes=C,
        seed=0,
        purpose="augmentation",
        round_number=1,
        share=share,
        batch_size=B,
    )
    return StackGenerator(**(parts | kwargs))


COUNTS = [[0, 1, 1], [2, 0, 1], [3, 3, 3]]


def batches_of(data: ClientRows, **kwargs):
    return list(training_batches(data, seed=0, round_number=1, epochs=1, batch_size=B, **kwargs))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 2.0])
def test_to_every_batch_come_as_many_rows_as_its_share_of_the_recordings(share):
    data, x = clients_with(COUNTS)
    generator = generator_of(data, x, share=share)
    for step, batch in enumerate(batches_of(data)):
        larger = generator.enlarge(batch, step)
        real = batch.mask.sum(1)
        made = torch.tensor([float(int(share * n + 0.5)) for n in real.tolist()])
        assert torch.equal(larger.rows, real + made)
        assert torch.equal(larger.mask.sum(1), larger.rows)
        assert larger.inputs.shape[1] == B + most_rows(share, B)
        assert torch.equal(larger.inputs[:, :B], batch.inputs)
        for k, labels in enumerate(larger.labels):
            own = set(batch.labels[k, : int(real[k])].tolist())
            assert set(labels[larger.mask[k] > 0].tolist()) <= own, "a client makes rows of its own classes"
    first = generator_of(data, x, share=1.0).enlarge(batches_of(data)[0], 0)
    whole = [k for k in range(len(data)) if first.mask[k, :B].all()]
    assert whole
    for k in whole:
        assert torch.equal(first.labels[k, :B].sort()[0], first.labels[k, B:].sort()[0])


def test_rows_lie_around_the_means_of_their_class_with_the_spread_of_the_network():
    data, x = clients_with([[40, 0, 2]])
    generator = generator_of(data, x - 100)  # no mean is positive: nothing is clamped
    means = class_means(data, x - 100, num_classes=C)
    labels = torch.tensor([[0, 2] * 200])
    rows = torch.cat([generator.draw(0, labels, step)[0] for step in range(100)])
    labels = labels[0].repeat(100)
    wanted = POOLED.factor @ POOLED.factor.T + POOLED.residual.diag()
    for place, label in enumerate((0, 2)):
        mine = rows[labels == label]
        assert (mine.mean(0) - means.mean[place]).abs().max() < 0.1
        assert (torch.cov(mine.T) - wanted).norm() < 0.05 * wanted.norm()
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("own", [False, True])
def test_a_clients_rows_do_not_depend_on_its_neighbours(own):
    data, x = clients_with(COUNTS)
    ends = np.cumsum(data.counts)
    together = [generator_of(data, x, own=own).enlarge(batch, step) for step, batch in enumerate(batches_of(data))]
    for k, some in enumerate(data.split(1)):
        generator = generator_of(some, x[ends[k] - data.counts[k] : ends[k]], own=own)
        for step, batch in enumerate(batches_of(some)):
            alone, stacked = generator.enlarge(batch, step), together[step]
            assert torch.equal(alone.inputs[0], stacked.inputs[k - stacked.first])
            assert torch.equal(alone.labels[0], stacked.labels[k - stacked.first])


def test_rows_are_new_in_every_step_round_and_client():
    data, x = clients_with([[4, 0, 0], [4, 0, 0]])
    labels = torch.zeros(2, 4, dtype=torch.int64)
    first = generator_of(data, x).draw(0, labels, 0)
    means = class_means(data, x, num_classes=C).mean
    assert not torch.equal(first[0] - means[0], first[1] - means[1])
    for other in (
        generator_of(data, x).draw(0, labels, 1),
        generator_of(data, x, round_number=2).draw(0, labels, 0),
        generator_of(data, x, seed=1).draw(0, labels, 0),
        generator_of(data, x, purpose="other").draw(0, labels, 0),
    ):
        assert not torch.equal(first, other)
    assert torch.equal(first, generator_of(data, x).draw(0, labels, 0))


def test_where_no_mean_is_negative_no_row_is():
    data, x = clients_with([[3, 0, 0], [0, 3, 0]])
    x[:3] = x[:3].abs()
    x[3:] = -x[3:].abs()
    rows = generator_of(data, x, deviation=10 * DEVIATION).draw(0, torch.tensor([[0] * 50, [1] * 50]), 0)
    assert rows[0].min() == 0
    assert rows[1].min() < -1
    assert rows.shape == (2, 50, SIZE)
