"""Stacked optimisers and clipping against torch's own, client by client and step by step."""

from __future__ import annotations

import pytest
import torch

from fedsim.algorithms.optimizers import clip_, make_optimizer
from fedsim.models.adapters.shared_weight import OuterProduct, SharedWeight

K = 3
# Names as adapters have them. Sizes in multiples of 16, see the test of bits.
SHAPES = {"layer.weight": (4, 8), "b": (16,), "gate": (2, 1, 8)}
SETTINGS = [
    {"name": "AdamW", "weight_decay": 0.0, "momentum": 0.0},
    {"name": "AdamW", "weight_decay": 0.1, "momentum": 0.0},
    {"name": "SGD", "weight_decay": 0.0, "momentum": 0.0},
    {"name": "SGD", "weight_decay": 0.1, "momentum": 0.0},
    {"name": "SGD", "weight_decay": 0.0, "momentum": 0.9},
    {"name": "SGD", "weight_decay": 0.1, "momentum": 0.9},
]


def randn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(K, *shape, generator=generator) for name, shape in SHAPES.items()}


def new_state(name: str, shape: torch.Size) -> torch.Tensor:
    """Memory as a buffer has it: whatever was there before."""
    return torch.full(shape, torch.nan)


def torch_optimizer(params: list[torch.Tensor], *, name: str, weight_decay: float, momentum: float):
    if name == "AdamW":
        return torch.optim.AdamW(params, lr=0.02, weight_decay=weight_decay)
    return torch.optim.SGD(params, lr=0.02, weight_decay=weight_decay, momentum=momentum)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_client_of_a_stack_steps_like_torch(settings):
    params = randn(0)
    optimizer = make_optimizer(**settings, state=new_state, learning_rate=0.02)
    alone = [{name: p[k].clone().requires_grad_() for name, p in params.items()} for k in range(K)]
    references = [torch_optimizer(list(own.values()), **settings) for own in alone]
    for step in range(12):
        # Client 0 has 4 steps, client 1 has 8, client 2 has 12: those that are through are sliced away.
        first, grads = step // 4, randn(100 + step)
        optimizer.step(
            {name: p[first:] for name, p in params.items()},
            {name: g[first:] for name, g in grads.items()},
            first,
            clients=K,
        )
        for k in range(first, K):
            for name, p in alone[k].items():
                p.grad = grads[name][k].clone()
            references[k].step()
        for k in range(K):
            for name, p in alone[k].items():
                torch.testing.assert_close(params[name][k], p.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_stack_steps_like_its_clients_alone_bit_for_bit(settings):
    together = randn(0)
    optimizer = make_optimizer(**settings, state=new_state, learning_rate=0.02)
    alone = [{name: p[k : k + 1].clone() for name, p in together.items()} for k in range(K)]
    own = [make_optimizer(**settings, state=new_state, learning_rate=0.02) for _ in alone]
    for step in range(5):
        grads = randn(step)
        optimizer.step(together, grads, 0, clients=K)
        for k in range(K):
            own[k].step(alone[k], {name: g[k : k + 1] for name, g in grads.items()}, 0, clients=1)
    for k in range(K):
        assert all(torch.equal(together[name][k], alone[k][name][0]) for name in SHAPES)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_adamw_takes_outer_products_for_gradients_and_refuses_strided_parameters(settings):
    x, g = torch.randn(K, 2, 4), torch.randn(K, 2, 8)
    params = [{"layer.weight": torch.ones(K, 4, 8)} for _ in range(2)]
    for own, grad in zip(params, (OuterProduct(x, g), x.mT @ g), strict=True):
        make_optimizer(**settings, state=new_state, learning_rate=0.02).step(own, {"layer.weight": grad}, 0, clients=K)
    torch.testing.assert_close(params[0], params[1])
    # Rows of flat updates: torch's fused kernel would write past them, without a word.
    strided = {"layer.weight": torch.zeros(K, 50)[:, :32].unflatten(1, (4, 8))}
    with pytest.raises(AssertionError):
        make_optimizer(**settings, state=new_state, learning_rate=0.02).step(
            strided, {"layer.weight": x.mT @ g}, 0, clients=K
        )


def test_parameters_without_numbers_are_passed_over():
    for name in ("AdamW", "SGD"):
        optimizer = make_optimizer(name, learning_rate=0.1, weight_decay=0.0, momentum=0.0, state=new_state)
        params = {"w": torch.ones(K, 4), "none": torch.ones(K, 0)}
        optimizer.step(params, {"w": torch.ones(K, 4), "none": torch.ones(K, 0)}, 0, clients=K)
        assert (params["w"] < 1).all()


@pytest.mark.parametrize("first", [0, 1])
def test_sgd_adds_outer_products_to_shared_weights(first):
    x, g = torch.randn(K - first, 2, 4), torch.randn(K - first, 2, 8)
    weight = SharedWeight(torch.ones(4, 8), K)
    optimizer = make_optimizer("SGD", learning_rate=0.02, weight_decay=0.0, momentum=0.0, state=new_state)
    optimizer.step({"layer.weight": weight[first:]}, {"layer.weight": OuterProduct(x, g)}, first, clients=K)
    wanted = torch.ones(K, 4, 8)
    wanted[first:] -= 0.02 * x.mT @ g
    torch.testing.assert_close(weight.dense(), wanted)


@pytest.mark.parametrize("max_norm", [0.5, 4.0, 1e9])
def test_clipping_is_torchs_for_every_client(max_norm):
    grads = randn(3)
    for name in grads:
        grads[name][0] *= 0.01  # far below the norm
        grads[name][2] *= 50
    clipped = {name: g.clone() for name, g in grads.items()}
    clip_(clipped, max_norm)
    for k in range(K):
        own = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
        for parameter, name in zip(own, SHAPES, strict=True):
            parameter.grad = grads[name][k].clone()
        torch.nn.utils.clip_grad_norm_(own, max_norm)
        for parameter, name in zip(own, SHAPES, strict=True):
            torch.testing.assert_close(clipped[name][k], parameter.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_outer_products_are_clipped_as_if_multiplied_out(max_norm):
    generator = torch.Generator().manual_seed(0)
    product = OuterProduct(torch.randn(K, 3, 4, generator=generator), torch.randn(K, 3, 8, generator=generator))
    product.g[0] *= 1e-3
    factored = {"layer.weight": product, "b": torch.randn(K, 5, generator=generator)}
    dense = {"layer.weight": product.dense(), "b": factored["b"].clone()}
    clip_(factored, max_norm)
    clip_(dense, max_norm)
    torch.testing.assert_close(factored["layer.weight"].dense(), dense["layer.weight"])
    torch.testing.assert_close(factored["b"], dense["b"])


@pytest.mark.parametrize("order", [1, -1])
def test_gradients_that_share_memory_are_clipped_once(order):
    # Autograd gives one tensor to all terms of a sum: a token's bias, a layer's bias and the layer's output.
    same = torch.full((K, 1, 8), 3.0)
    names = {"last.weight": OuterProduct(torch.ones(K, 1, 4), same), "last.bias": same.squeeze(1), "token_bias": same}
    grads = dict(list(names.items())[::order])
    norm = (4 * 8 * 9 + 2 * 8 * 9) ** 0.5
    clip_(grads, 1.0)
    for grad in (grads["last.weight"].g, grads["last.bias"], grads["token_bias"]):
        torch.testing.assert_close(grad, torch.full_like(grad, 3.0 / norm))


def test_clipping_does_not_depend_on_the_order_of_names():
    # A checkpoint gives tensors back in another order; a resumed run must have the same bits.
    generator = torch.Generator().manual_seed(0)
    grads = {f"w{n}": torch.randn(K, 7, generator=generator) * 10 ** (n % 3) for n in range(12)}
    for seed in range(20):
        names = [f"w{n}" for n in torch.randperm(12, generator=generator.manual_seed(seed)).tolist()]
        one, other = {name: g.clone() for name, g in grads.items()}, {name: grads[name].clone() for name in names}
        clip_(one, 1.0)
        clip_(other, 1.0)
        assert all(torch.equal(one[name], other[name]) for name in grads)


def test_clipping_leaves_zero_gradients_at_zero():
    grads = {"w": torch.zeros(2, 3)}
    clip_(grads, 1.0)
    assert not grads["w"].any()
