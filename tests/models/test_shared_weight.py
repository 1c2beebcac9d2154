"""Shared weights plus outer products: the same numbers as weights of every client's own, without ever making them."""

from __future__ import annotations

import pytest
import torch

from fedsim.models.adapters.shared_weight import SUM_GROUP, OuterProduct, SharedWeight, stacked_linear

K, N, D, OUT = 5, 3, 16, 32
FIRST = [0, 0, 2, 4]  # the first client that takes part in each step


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_and_dense(clients: int = K, first=FIRST, *, rows: int = N) -> tuple[SharedWeight, torch.Tensor]:
    """A stack after a few steps, of which clients have taken different numbers, and the same in float64."""
    shared = randn(D, OUT)
    weight, dense = SharedWeight(shared, clients), shared.double().expand(clients, D, OUT).clone()
    for step, at in enumerate(first):
        x, g = randn(clients - at, rows, D, seed=10 + step), randn(clients - at, rows, OUT, seed=20 + step)
        weight[at:].add_(OuterProduct(x, g), alpha=-0.1)
        dense[at:] -= 0.1 * x.double().mT @ g.double()
    return weight, dense


def assert_near(one: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(one.double(), wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", range(K))
def test_every_view_multiplies_by_the_weights_of_its_own_clients(start):
    weight, dense = weight_and_dense()
    view, own = weight[start:], dense[start:]
    x, g = randn(K - start, 7, D, seed=1), randn(K - start, 7, OUT, seed=2)
    assert view.shape == own.shape == (K - start, D, OUT)
    assert_near(view.product(x), x.double() @ own)
    assert_near(view.product_transposed(g), g.double() @ own.mT)
    assert_near(view.dense(), own)
    memory = torch.full(view.shape, torch.nan)
    assert view.dense(memory) is memory
    assert_near(memory, own)


def test_a_view_of_a_view_counts_from_the_view():
    weight, dense = weight_and_dense()
    assert_near(weight[1:][2:].dense(), dense[3:])
    weight[1:][2:].add_(OuterProduct(torch.ones(2, 1, D), torch.ones(2, 1, OUT)), alpha=3.0)
    dense[3:] += 3.0
    assert_near(weight.dense(), dense)


def test_steps_of_a_view_are_seen_by_the_whole_stack_and_change_no_memory():
    shared = randn(D, OUT)
    weight = SharedWeight(shared, K)
    weight[4:].add_(OuterProduct(torch.ones(1, 1, D), torch.ones(1, 1, OUT)), alpha=1.0)
    assert torch.equal(shared, randn(D, OUT))
    assert torch.equal(weight.dense()[:4], shared.expand(4, D, OUT))
    torch.testing.assert_close(weight.dense()[4], shared + 1)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("start", [0, 3])
def test_gradients_are_those_of_own_weights(biased, rows, start):
    weight, dense = weight_and_dense()
    x, bias = randn(K, rows, D, seed=1)[start:], randn(K, OUT, seed=2)[start:] if biased else None
    slope = randn(K, rows, OUT, seed=3)[start:]
    leaf = weight[start:].leaf()
    inputs = [x.clone().requires_grad_(), *([bias.clone().requires_grad_()] if biased else [])]
    out = stacked_linear(inputs[0], leaf, inputs[1] if biased else None)
    grads = torch.autograd.grad(out, [leaf.seen, *inputs], slope, allow_unused=True)[1:]

    own = dense[start:].clone().requires_grad_()
    reference = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = torch.baddbmm(reference[1].unsqueeze(1), reference[0], own) if biased else torch.bmm(reference[0], own)
    wanted_grads = torch.autograd.grad(wanted, [own, *reference], slope.double())
    assert_near(out, wanted)
    assert_near(leaf.gradient().dense(), wanted_grads[0])
    for grad, exact in zip(grads, wanted_grads[1:], strict=True):
        assert_near(grad, exact)


def test_a_weight_used_twice_gets_both_gradients_and_an_unused_one_none():
    weight, dense = weight_and_dense()
    x, y = randn(K, 2, D, seed=1), randn(K, 4, D, seed=2)
    leaf, unused = weight.leaf(), weight.leaf()
    loss = stacked_linear(x, leaf, None).square().sum() + stacked_linear(y, leaf, None).sum()
    torch.autograd.grad(loss, [leaf.seen, unused.seen], allow_unused=True)
    own = dense.clone().requires_grad_()
    exact = torch.autograd.grad((x.double() @ own).square().sum() + (y.double() @ own).sum(), own)[0]
    torch.testing.assert_close(leaf.gradient().dense().double(), exact, rtol=1e-5, atol=1e-3)
    nothing = unused.gradient()
    assert nothing.dense().shape == (K, D, OUT)
    assert not nothing.dense().any()
    assert nothing.norm().tolist() == [0.0] * K


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_norm_is_that_of_the_gradient_multiplied_out(rows):
    grad = OuterProduct(randn(K, rows, D), randn(K, rows, OUT, seed=1))
    exact = torch.linalg.vector_norm(torch.bmm(grad.x.double().mT, grad.g.double()).flatten(1), dim=1)
    torch.testing.assert_close(grad.norm().double(), exact, rtol=1e-5, atol=0)
    out = torch.full((K, D, OUT), torch.nan)
    assert grad.dense(out) is out
    assert torch.equal(out, grad.dense())


def test_rows_that_cancel_have_no_norm_and_no_negative_square():
    x, g = randn(K, 1, D), randn(K, 1, OUT, seed=1)
    norm = OuterProduct(torch.cat([x, -x], 1), torch.cat([g, g], 1)).norm()
    assert (norm >= 0).all()
    assert norm.max() < 1e-2


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_client_has_the_same_bits_alone_and_in_a_stack(rows, size):
    clients = 8
    x, g = randn(clients, rows, D, seed=1), randn(clients, rows, OUT, seed=2)

    def after_two_steps(some: slice) -> list[torch.Tensor]:
        weight = SharedWeight(randn(D, OUT), len(x[some]))
        for _ in range(2):
            weight.add_(OuterProduct(x[some], g[some]), alpha=-0.1)
        return [weight.product(x[some]), weight.product_transposed(g[some]), weight.dense()]

    together = after_two_steps(slice(None))
    for start in range(0, clients, size):
        some = slice(start, start + size)
        assert all(torch.equal(own, whole[some]) for own, whole in zip(after_two_steps(some), together, strict=True))


@pytest.mark.parametrize("clients", [1, SUM_GROUP, SUM_GROUP + 1, 3 * SUM_GROUP - 2])
def test_deltas_are_summed_in_groups_of_fixed_size(clients):
    first = [0, 0, clients // 3, clients - 1]
    weight, dense = weight_and_dense(clients, first)
    factors = torch.linspace(0.5, 40, clients)
    sums = weight.weighted_deltas(factors)
    deltas = factors.double().view(-1, 1, 1) * (dense - randn(D, OUT).double())
    assert len(sums) == -(-clients // SUM_GROUP)
    for group, part in enumerate(torch.split(deltas, SUM_GROUP)):
        torch.testing.assert_close(sums[group].double(), part.sum(0), rtol=1e-5, atol=1e-4)
