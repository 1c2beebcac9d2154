"""Server optimisers: the cohort's average change as a pseudo-gradient, and what the server makes of it.

With old state x_t and the aggregator's state x_t + Delta_t, plain FedAvg takes x_{t+1} = x_t + Delta_t. The others step
along Delta_t, so each goes with any aggregator:

- `momentum` is FedAvgM (Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution for federated
  visual classification", section 4): v_t = beta1 v_{t-1} + Delta_t, x_{t+1} = x_t + eta v_t, v_{-1} = 0.
- `adam` and `yogi` are FedAdam and FedYogi (Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2):
  m_t = beta1 m_{t-1} + (1 - beta1) Delta_t, x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau), without bias correction;
  FedAdam v_t = beta2 v_{t-1} + (1 - beta2) Delta_t^2,
  FedYogi v_t = v_{t-1} - (1 - beta2) Delta_t^2 sign(v_{t-1} - Delta_t^2);
  m_{-1} = 0, v_{-1} = tau^2 (the paper asks for at least that), beta2 = 0.99 as in its experiments.

Every coordinate is stepped by itself: tensors of the adapters and of trained encoder layers alike.

To add one, write a class with the member of `ServerOptimizer`, a line in `SERVER_OPTIMIZERS`, and its name in the
configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.types import AdapterState

BETA2 = 0.99
FIRST, SECOND = "first.", "second."


class ServerOptimizer(Protocol):
    """How the server moves once the cohort's updates are aggregated."""

    def step(
        self, old: AdapterState, averaged: AdapterState, moments: AdapterState
    ) -> tuple[AdapterState, AdapterState]:
        """One step; arguments are left as they are.

        Args:
            old: tensors that the round began with.
            averaged: tensors after aggregation, of the same names and shapes.
            moments: what the last step returned beside its tensors; empty before the first.

        Returns:
            The new tensors, and the moments by name: `first.NAME`, and `second.NAME` where there are two.
        """
        ...


@dataclass(frozen=True)
class TakeOver:
    """`none`: the aggregated tensors as they are."""

    def step(
        self, old: AdapterState, averaged: AdapterState, moments: AdapterState
    ) -> tuple[AdapterState, AdapterState]:
        """The very tensors of `averaged`."""
        return averaged, moments


@dataclass(frozen=True)
class Momentum:
    """`momentum`: FedAvgM (Hsu, Qi and Brown 2019, section 4); the momentum is a sum, so steps grow by 1 / (1 - beta1).

    Attributes:
        learning_rate: eta, above 0; 1 is FedAvgM as published.
        momentum: beta1, 0 up to below 1; 0 with eta 1 is plain averaging, up to rounding.
    """

    learning_rate: float
    momentum: float

    def step(
        self, old: AdapterState, averaged: AdapterState, moments: AdapterState
    ) -> tuple[AdapterState, AdapterState]:
        """Set v = beta1 v + Delta; x = x + eta v."""
        new, kept = {}, {}
        for name, start in old.items():
            first = self.momentum * _moment(moments, FIRST + name, start, 0.0) + (averaged[name] - start)
            new[name], kept[FIRST + name] = start + self.learning_rate * first, first
        return new, kept


@dataclass(frozen=True)
class Adaptive:
    """`adam` and `yogi`: Reddi et al. 2021, Algorithm 2.

    Attributes:
        second: v_t from v_{t-1} and Delta_t^2.
        learning_rate: eta, above 0: where changes are large against tau, about the step of every coordinate.
        momentum: beta1, 0 up to below 1.
        adaptivity: tau, above 0: coordinates that change by much less are stepped in proportion, not alike.
    """

    second: Callable[[Tensor, Tensor], Tensor]
    learning_rate: float
    momentum: float
    adaptivity: float

    def step(
        self, old: AdapterState, averaged: AdapterState, moments: AdapterState
    ) -> tuple[AdapterState, AdapterState]:
        """Set m = beta1 m + (1 - beta1) Delta; v by `second`; x = x + eta m / (sqrt(v) + tau)."""
        new, kept = {}, {}
        for name, start in old.items():
            delta = averaged[name] - start
            first = self.momentum * _moment(moments, FIRST + name, start, 0.0) + (1 - self.momentum) * delta
            second = self.second(_moment(moments, SECOND + name, start, self.adaptivity**2), delta.square())
            new[name] = start + self.learning_rate * first / (second.sqrt() + self.adaptivity)
            kept[FIRST + name], kept[SECOND + name] = first, second
        return new, kept


def adam_second(second: Tensor, square: Tensor) -> Tensor:
    """FedAdam: v = beta2 v + (1 - beta2) Delta^2, an average of squares."""
    return BETA2 * second + (1 - BETA2) * square


def yogi_second(second: Tensor, square: Tensor) -> Tensor:
    """FedYogi: v = v - (1 - beta2) Delta^2 sign(v - Delta^2), which falls slowly after large changes."""
    return second - (1 - BETA2) * square * torch.sign(second - square)


def _moment(moments: AdapterState, name: str, like: Tensor, first_value: float) -> Tensor:
    """A moment where its tensor is; before the first step, `first_value` everywhere."""
    return moments[name].to(like.device) if moments else torch.full_like(like, first_value)


SERVER_OPTIMIZERS: Mapping[str, Callable[[float, float, float], ServerOptimizer]] = {
    "none": lambda rate, momentum, adaptivity: TakeOver(),
    "momentum": lambda rate, momentum, adaptivity: Momentum(rate, momentum),
    "adam": lambda rate, momentum, adaptivity: Adaptive(adam_second, rate, momentum, adaptivity),
    "yogi": lambda rate, momentum, adaptivity: Adaptive(yogi_second, rate, momentum, adaptivity),
}


def make_server_optimizer(
    name: str, *, learning_rate: float | None = None, momentum: float = 0.9, adaptivity: float = 1e-3
) -> ServerOptimizer:
    """Build a server optimiser by name.

    Args:
        name: a key of `SERVER_OPTIMIZERS`.
        learning_rate: eta, above 0; None: 1 for momentum, 0.01 for adam and yogi.
        momentum: beta1, 0 up to below 1.
        adaptivity: adam, yogi: tau, above 0.

    Raises:
        ConfigError: unknown name.
    """
    if name not in SERVER_OPTIMIZERS:
        raise ConfigError(f"unknown server optimiser {name!r}; known: {', '.join(SERVER_OPTIMIZERS)}")
    rate = learning_rate or (0.01 if name in ("adam", "yogi") else 1.0)
    return SERVER_OPTIMIZERS[name](rate, momentum, adaptivity)
