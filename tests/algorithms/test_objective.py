"""The loss against its definition written out in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
from clients import SHAPES, C
from torch.nn import functional

from fedsim.algorithms.objective import make_objective

K, B = 3, 7
WEIGHTS = [(0.0, 0.0), (1.0, 0.0), (0.0, 0.3), (0.7, 0.5)]


def targets_of(*, offset: float = 0.0, spread: float = 1.0) -> dict[str, torch.Tensor]:
    """Class targets around a common point, as the names of classes are."""
    generator = torch.Generator().manual_seed(0)
    return {head: offset + spread * torch.randn(C, *shape, generator=generator) for head, shape in SHAPES.items()}


def rows_of(targets, *, noise: float):
    """Outputs at some distance from the mean target (in standard deviations), and labels."""
    generator = torch.Generator().manual_seed(1)
    outputs = {
        head: table.mean(0) + noise * table.std() * torch.randn(K, B, *table.shape[1:], generator=generator)
        for head, table in targets.items()
    }
    return outputs, torch.randint(0, C, (K, B), generator=generator)


def definition(targets, outputs, labels, *, cosine_weight: float, contrastive_weight: float, temperature: float):
    """Loss of every row [K, B], as the module's text has it."""
    total = torch.zeros(labels.shape, dtype=torch.float64)
    for head, table in targets.items():
        table, centre = table.double(), table.double().mean(0)
        variance = (table - centre).square().mean()
        out = outputs[head]
        total = total + (out - table[labels]).square().flatten(2).mean(2) / variance
        cosines = functional.cosine_similarity(
            (out - centre).flatten(2).unsqueeze(2), (table - centre).flatten(1).expand(K, 1, C, -1), dim=3
        )
        total = total + cosine_weight * (1 - cosines.gather(2, labels.unsqueeze(2)).squeeze(2))
        entropy = functional.cross_entropy((cosines / temperature).flatten(0, 1), labels.flatten(), reduction="none")
        total = total + contrastive_weight * entropy.view(labels.shape)
    return total


@pytest.mark.parametrize(("cosine_weight", "contrastive_weight"), WEIGHTS)
@pytest.mark.parametrize("noise", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("world", [{}, {"offset": 5.0, "spread": 0.3}, {"spread": 1e-3}], ids=str)
def test_loss_and_gradients_are_the_definitions(cosine_weight, contrastive_weight, noise, world):
    terms = {"cosine_weight": cosine_weight, "contrastive_weight": contrastive_weight, "temperature": 0.3}
    targets = targets_of(**world)
    outputs, labels = rows_of(targets, noise=noise)
    ours = {head: out.clone().requires_grad_() for head, out in outputs.items()}
    exact = {head: out.double().requires_grad_() for head, out in outputs.items()}
    loss = make_objective(targets, **terms).loss_rows(ours, labels)
    wanted = definition(targets, exact, labels, **terms)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=2e-5)
    row_weights = torch.linspace(0.5, 2, K * B).view(K, B)  # rows don't count alike, as under a mask
    grads = torch.autograd.grad((loss * row_weights).sum(), list(ours.values()))
    wanted_grads = torch.autograd.grad((wanted * row_weights).sum(), list(exact.values()))
    for grad, exact_grad in zip(grads, wanted_grads, strict=True):
        size = float(exact_grad.abs().max())
        torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-4, atol=2e-5 * size)


def test_every_term_and_every_head_counts():
    targets = targets_of()
    outputs, labels = rows_of(targets, noise=1.0)
    losses = [
        make_objective(targets, cosine_weight=cosine, contrastive_weight=contrastive).loss_rows(outputs, labels)
        for cosine, contrastive in WEIGHTS
    ]
    assert all((one - other).abs().min() > 1e-3 for n, one in enumerate(losses) for other in losses[:n])
    parts = [
        make_objective({head: targets[head]}, cosine_weight=0.7).loss_rows({head: outputs[head]}, labels)
        for head in SHAPES
    ]
    whole = make_objective(targets, cosine_weight=0.7).loss_rows(outputs, labels)
    torch.testing.assert_close(whole, sum(parts))


@pytest.mark.parametrize("world", [{}, {"offset": 5.0, "spread": 0.3}, {"spread": 1e-3}], ids=str)
def test_a_constant_predictor_scores_one_per_head_and_a_perfect_one_nothing(world):
    targets = targets_of(**world)
    objective = make_objective(targets, cosine_weight=1.0)
    labels = torch.arange(C).unsqueeze(0)
    constant = {head: table.mean(0).expand(1, C, *table.shape[1:]) for head, table in targets.items()}
    error = make_objective(targets).loss_rows(constant, labels)
    assert float(error.mean()) == pytest.approx(len(SHAPES), rel=1e-5)
    # It points nowhere, so its cosine is 0 (and costs 1 per head), and its gradient is finite.
    leaves = {head: out.clone().requires_grad_() for head, out in constant.items()}
    loss = objective.loss_rows(leaves, labels)
    assert float(loss.detach().mean()) == pytest.approx(2 * len(SHAPES), rel=1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.sum(), list(leaves.values())))
    perfect = {head: table.unsqueeze(0) for head, table in targets.items()}
    assert objective.loss_rows(perfect, labels).abs().max() < 1e-5


def test_leading_axes_keep_their_places():
    targets = targets_of()
    outputs, labels = rows_of(targets, noise=1.0)
    objective = make_objective(targets, cosine_weight=0.5, contrastive_weight=0.5)
    whole = objective.loss_rows(outputs, labels)
    for k in range(K):
        alone = objective.loss_rows({h: out[k : k + 1] for h, out in outputs.items()}, labels[k : k + 1])
        assert torch.equal(whole[k], alone[0])


def test_all_tensors_move_to_another_device():
    moved = make_objective(targets_of()).to(torch.device("meta"))
    for table in (moved.targets, moved.centre, moved.directions, moved.lengths):
        assert {tensor.device.type for tensor in table.values()} == {"meta"}
        assert list(table) == list(SHAPES)
