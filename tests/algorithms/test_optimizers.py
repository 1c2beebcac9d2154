"""Stacked optimisers and clipping against torch's own, client by client and step by step."""

from __future__ import annotations

import pytest
import torch

from fedsim.algorithms.optimizers import clip_, make_optimizer

K = 3
SHAPES = {"w": (4, 5), "b": (5,), "gate": (2, 1, 3)}
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


def torch_optimizer(params: list[torch.Tensor], *, name: str, weight_decay: float, momentum: float):
    if name == "AdamW":
        return torch.optim.AdamW(params, lr=0.02, weight_decay=weight_decay)
    return torch.optim.SGD(params, lr=0.02, weight_decay=weight_decay, momentum=momentum)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_client_of_a_stack_steps_like_torch(settings):
    params = randn(0)
    optimizer = make_optimizer(**settings, params=params, learning_rate=0.02)
    alone = [{name: p[k].clone().requires_grad_() for name, p in params.items()} for k in range(K)]
    references = [torch_optimizer(list(own.values()), **settings) for own in alone]
    for step in range(12):
        # Client 0 has 4 steps, client 1 has 8, client 2 has 12: those that are through are sliced away.
        first, grads = step // 4, randn(100 + step)
        optimizer.step(
            {name: p[first:] for name, p in params.items()}, {name: g[first:] for name, g in grads.items()}, first
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
    optimizer = make_optimizer(**settings, params=together, learning_rate=0.02)
    alone = [{name: p[k : k + 1].clone() for name, p in together.items()} for k in range(K)]
    own = [make_optimizer(**settings, params=params, learning_rate=0.02) for params in alone]
    for step in range(5):
        grads = randn(step)
        optimizer.step(together, grads, 0)
        for k in range(K):
            own[k].step(alone[k], {name: g[k : k + 1] for name, g in grads.items()}, 0)
    for k in range(K):
        assert all(torch.equal(together[name][k], alone[k][name][0]) for name in SHAPES)


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
