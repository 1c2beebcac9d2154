"""Differential privacy of clients: bounded contributions, Gaussian noise on sums, and what it amounts to.

Of two federations that differ by one client with all its recordings, what the server keeps of a run can hardly be told
apart: client-level (epsilon, delta)-differential privacy, DP-FedAvg (McMahan, Ramage, Talwar and Zhang 2018,
algorithm 1, with a fixed denominator and uniform weights).

One client contributes g groups of numbers to a round's sums: its change of the adapter, clipped to the norm C_1, and
its statistics, brought to one scale by public constants and clipped to C_2. Divided by their norms they are one vector

    v_k = (change / C_1, statistics / C_2),    |v_k| <= sqrt(g),

so one client more or less moves the sum of the v_k by at most sqrt(g), and noise of standard deviation z sqrt(g) on
every coordinate makes the round *one* Gaussian mechanism of noise multiplier z (McMahan, Andrew et al. 2018, "A general
approach to adding differential privacy to iterative training procedures", section 3). Back in the sums' own units:
z sqrt(g) C_i on group i.

Rounds are composed by the Renyi accountant of Opacus (Mironov 2017; Mironov, Talwar and Zhang 2019), for Poisson
sampling: every client takes part in a round with probability q, independently. That is how cohorts are drawn when noise
is on; without sampling, q = 1.

Legend: K clients of a stack, g groups of numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.seeding import normal, rng
from fedsim.types import AdapterState

LEAST_COHORT = 20
"""Expected clients of a sampled cohort; one of so many is empty about once in 5e8 rounds."""


def clip_factors(tensors: Mapping[str, Tensor], limit: float, scales: Mapping[str, float] | None = None) -> Tensor:
    """What to multiply every client's numbers with [K], so that their joint norm is at most `limit`.

    Args:
        tensors: every client's numbers by name [K, ...].
        limit: the norm C.
        scales: public factors by name that are applied for the norm alone; None: 1.
    """
    # In name order, and along the last axis: a client's bits don't depend on names or neighbours.
    norms = [
        torch.linalg.vector_norm(tensors[name].flatten(1), dim=1) * (1.0 if scales is None else scales[name])
        for name in sorted(tensors)
    ]
    total = torch.linalg.vector_norm(torch.stack(norms, dim=1), dim=1)
    factors: Tensor = (limit / total).clamp(max=1.0)
    return factors


def noised(
    state: Mapping[str, Tensor], deviations: Mapping[str, float], *, seed: int, round_number: int, what: str
) -> AdapterState:
    """Sums with Gaussian noise: functions of (seed, round, what, name) alone.

    Raises:
        KeyError: a sum has no deviation: nothing leaves without noise by oversight.
    """
    made = {}
    for name, tensor in state.items():
        drawn = normal(rng(seed, "privacy noise", round_number, what, name), *tensor.shape)
        made[name] = tensor + deviations[name] * drawn.to(tensor.device)
    return made


def require_accountant() -> None:
    """Refuse noise whose epsilon nobody could tell.

    Raises:
        ConfigError: Opacus is missing.
    """
    if find_spec("opacus") is None:
        raise ConfigError(
            "privacy.noise_multiplier and privacy.target_epsilon need the accountant of opacus, which isn't installed: "
            "pip install 'fedsim-a2v[privacy]'"
        )


@dataclass(frozen=True)
class Accountant:
    """Epsilon of a run.

    Attributes:
        noise_multiplier: z.
        sample_rate: q, the share of the clients that a round takes, by Poisson sampling; 1: all of them.
        delta: of (epsilon, delta).
    """

    noise_multiplier: float
    sample_rate: float
    delta: float

    def epsilon(self, rounds: int) -> float:
        """Of all rounds so far, by Opacus's Renyi accountant."""
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(self.noise_multiplier, self.sample_rate, rounds)]
        with warnings.catch_warnings():  # an order at the end of its list: epsilon is an upper bound all the same
            warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
            # The bound may fall below 0 where there is much noise; epsilon can't.
            return max(0.0, float(accountant.get_epsilon(delta=self.delta)))


def noise_for(epsilon: float, *, sample_rate: float, delta: float, rounds: int) -> float:
    """The smallest noise multiplier that keeps a whole run within epsilon, by Opacus's search (0.01 below at most).

    Raises:
        ConfigError: no noise is enough.
    """
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=rounds,
                    accountant="rdp",
                    epsilon_tolerance=min(0.01, 0.01 * epsilon),
                )
            )
    except ValueError as error:
        raise ConfigError(
            f"privacy.target_epsilon is {epsilon:g}, which the accountant finds no noise for at delta {delta:g}; "
            "give a larger one, or a larger privacy.delta"
        ) from error
