"""Privacy of a round: what a client does before it sends, and the server before it reads.

The methods stand in `algorithms.class_sums`, `algorithms.privacy` and `algorithms.secure_sum`; here they meet the
configuration. A client clips and masks (`Sending`); the server opens the cohort's sums, adds noise, makes class
statistics of them, and counts epsilon (`Receiving`).

Legend: K clients of a stack, P numbers of a message.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.aggregation import Joined, tree_sum_
from fedsim.algorithms.class_sums import (
    COUNT,
    OUTPUT,
    ROUNDS,
    SQUARES,
    TOTAL,
    class_sum_shapes,
    class_table,
    remembered,
)
from fedsim.algorithms.local_training import weighted_deltas
from fedsim.algorithms.optimizers import StackParams
from fedsim.algorithms.privacy import LEAST_COHORT, Accountant, clip_factors, noise_for, noised, require_accountant
from fedsim.algorithms.sampling import sample_cohort
from fedsim.algorithms.secure_sum import MASKED_WEIGHT, masked, opened, ring_of
from fedsim.config.schema import Config
from fedsim.errors import ConfigError, QuorumError
from fedsim.federation.parts import Parts
from fedsim.models.adapters.shared_weight import multiplied_out
from fedsim.types import AdapterState, Broadcast, ClassStats, Learnt, flatten_state, unflatten_state

log = logging.getLogger(__name__)

LARGE_DELTA = 0.01
LEAST_SECURE = 3
"""Clients of a secure sum: of two, either can take itself off."""


def sums_wanted(config: Config, parts: Parts) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the class sums that clients send; none where they send a row per class, or no statistics."""
    settings, privacy = config.feda2v, config.privacy
    if privacy.statistics != "sums" or not settings.global_model_train:
        return {}
    heads = parts.adapter.specs if settings.global_model_train_from_nodes_adapters else {}
    return class_sum_shapes(
        len(parts.objective.targets[parts.objective.primary]),
        tuple(parts.adapter.input_shape),
        {head: tuple(spec.shape) for head, spec in heads.items()},
        squares=privacy.share_variances,
    )


def public_scales(config: Config, parts: Parts) -> dict[str, float]:
    """Factors by which statistics come to one scale: about 1 for each recording. Nothing of a client enters them."""
    size = float(np.prod(parts.adapter.input_shape))
    length = config.privacy.embedding_norm or size**0.5
    scales = {COUNT: 1.0, TOTAL: 1 / length, SQUARES: 1 / length**2}
    for head, table in parts.objective.targets.items():
        norms = table.flatten(1).norm(dim=1)
        scales[OUTPUT + head] = 1 / float(norms.mean())
    return scales


class Sending:
    """What clients do to their contributions before they are added up: bound them, and mask them.

    Args:
        config: the run's configuration.
        parts: what computes.
    """

    def __init__(self, config: Config, parts: Parts) -> None:
        self._privacy, self._clips = config.privacy, config.privacy.adds_noise
        self._scales = public_scales(config, parts) if self._clips else {}

    @property
    def apart(self) -> bool:
        """Whether every client's own change is looked at, or the stack's sum is enough."""
        return self._clips or self._privacy.secure_sums

    def sum(
        self,
        params: StackParams,
        sums: Mapping[str, Tensor],
        weights: np.ndarray,
        clients: np.ndarray,
        broadcast: Broadcast,
    ) -> tuple[AdapterState, AdapterState]:
        """Sums over a stack: of weighted changes, and of what else clients add up. `params` and `sums` are used up.

        Args:
            params: the trained stack.
            sums: what else clients add up [K, ...] by name.
            weights: of the changes [K].
            clients: their ids [K].
            broadcast: what they started from.
        """
        if not self.apart:
            return weighted_deltas(params, broadcast.adapter, weights), summed(sums)
        own = weights
        changes = {name: p - broadcast.adapter[name] for name, p in multiplied_out(params).items()}
        if self._clips:
            weights = weights * clip_factors(changes, self._privacy.clip_update).cpu().numpy()
            sums = _scaled(sums, clip_factors(sums, self._privacy.clip_statistics, self._scales)) if sums else sums
        changes = _scaled(changes, torch.from_numpy(weights.astype(np.float32)))
        if broadcast.ring is None:
            return summed(changes), summed(sums)
        sums = {**sums, MASKED_WEIGHT: torch.from_numpy(own.astype(np.float32)).unsqueeze(1)}
        return _masked_sums(changes, sums, clients, broadcast)


def _scaled(stack: Mapping[str, Tensor], factors: Tensor) -> AdapterState:
    """Every client's numbers [K, ...] times its factor [K]."""
    return {name: t * factors.to(t.device).view(-1, *(1,) * (t.ndim - 1)) for name, t in stack.items()}


def summed(sums: Mapping[str, Tensor]) -> AdapterState:
    """Clients' numbers [K, ...] added up along the fixed tree; they are used up."""
    return {name: tree_sum_(total).cpu().clone() for name, total in sums.items()}


def _masked_sums(
    changes: AdapterState, sums: Mapping[str, Tensor], clients: np.ndarray, broadcast: Broadcast
) -> tuple[AdapterState, AdapterState]:
    """The sums of a stack's messages, each of one vector [P], still masked, int64."""
    assert broadcast.ring is not None
    first, rest = ({name: t[0].cpu() for name, t in some.items()} for some in (changes, sums))
    total = np.zeros(sum(t.numel() for t in (*first.values(), *rest.values())), dtype=np.uint64)
    for k, client in enumerate(clients.tolist()):
        parts = [flatten_state({name: t[k] for name, t in some.items()}) for some in (changes, sums)]
        values = torch.cat(parts).numpy()
        total += masked(client, values, broadcast.ring, seed=broadcast.seed, round_number=broadcast.round_number)
    flat, split = torch.from_numpy(total.view(np.int64)), sum(t.numel() for t in first.values())
    return unflatten_state(flat[:split], first), unflatten_state(flat[split:], rest)


@dataclass(frozen=True)
class _Noise:
    """Standard deviations by name, and what they amount to; `changes` None where clients send none."""

    changes: float | None
    sums: Mapping[str, float]
    accountant: Accountant


class Receiving:
    """What the server does to the cohort's sums before anything is made of them.

    Args:
        config: the run's configuration.
        parts: what computes.
        num_clients: of the population.
        cohort_size: clients of a round, on average where there is noise.

    Raises:
        ConfigError: secure sums of too few; noise with cohorts that may be empty, without an accountant, or with an
            epsilon out of reach.
    """

    def __init__(self, config: Config, parts: Parts, *, num_clients: int, cohort_size: int) -> None:
        self._config, self._targets, self._num_clients = config, parts.objective.targets, num_clients
        self._cohort_size, self._secure = cohort_size, config.privacy.secure_sums
        if self._secure and cohort_size < LEAST_SECURE:
            raise ConfigError(
                f"privacy.secure_sums is true with cohorts of {cohort_size}: the sum of so few tells what one of them "
                f"has sent; let at least {LEAST_SECURE} clients take part in a round"
            )
        self.wanted = sums_wanted(config, parts)
        self._noise = self._make_noise(public_scales(config, parts)) if config.privacy.adds_noise else None

    def _make_noise(self, scales: Mapping[str, float]) -> _Noise:
        require_accountant()
        privacy, rounds = self._config.privacy, self._config.federation.global_rounds
        rate = self._cohort_size / self._num_clients
        if rate < 1 and self._cohort_size < LEAST_COHORT:
            raise ConfigError(
                f"federation.cohort_size is {self._cohort_size} with privacy noise, which draws every cohort's size "
                f"around it; give at least {LEAST_COHORT}, so that none is empty, or leave it out for all clients"
            )
        delta = privacy.delta or self._num_clients**-1.1
        if delta > LARGE_DELTA:
            log.warning(
                "privacy.delta is %.3g: a promise that may fail so often is worth little; give a smaller one", delta
            )
        multiplier = privacy.noise_multiplier
        if privacy.target_epsilon is not None:
            multiplier = noise_for(privacy.target_epsilon, sample_rate=rate, delta=delta, rounds=rounds)
        accountant = Accountant(multiplier, rate, delta)
        log.info(
            "noise multiplier %.4g: epsilon %.4g after %d rounds at delta %.3g", multiplier, accountant.epsilon(rounds),
            rounds, delta,
        )  # fmt: skip
        trains, measures = self._config.federation.local_epochs > 0, bool(self.wanted)
        each = multiplier * (trains + measures) ** 0.5
        sums = {name: each * privacy.clip_statistics / scale for name, scale in scales.items()}
        return _Noise(each * privacy.clip_update if trains else None, sums, accountant)

    @property
    def adds_noise(self) -> bool:
        """Whether a round's sums are worth less than those of all rounds, even of the same clients."""
        return self._noise is not None

    def sample_cohort(self, stream: np.random.Generator) -> np.ndarray:
        """A round's clients: so many, or, with noise, every client with the same chance, as the accountant assumes."""
        size = self._cohort_size
        if self._noise is not None:
            # The number first, then which: the same as a coin for every client (Poisson sampling).
            size = int(stream.binomial(self._num_clients, self._noise.accountant.sample_rate))
        return sample_cohort(self._num_clients, size, stream)

    def ring(self, cohort: np.ndarray, round_number: int) -> np.ndarray | None:
        """Who shares masks with whom; None without masks."""
        if not self._secure:
            return None
        return ring_of(cohort, seed=self._config.experiment.seed, round_number=round_number)

    def require_everyone(self, num_lost: int, round_number: int) -> None:
        """Refuse to open a secure sum that somebody is missing from.

        Raises:
            QuorumError: clients were lost.
        """
        if self._secure and num_lost:
            raise QuorumError(
                f"round {round_number}: {num_lost} clients were lost, and the masks that others share with them can't "
                "be taken off the sum (privacy.secure_sums); resume the run from its last checkpoint"
            )

    def read(self, joined: Joined, sums: AdapterState, round_number: int) -> tuple[Joined, AdapterState]:
        """The cohort's sums without masks and with noise; as they are where there is neither."""
        if self._secure:
            changes, others = _opened(joined.delta_sum), _opened(sums)
            joined, sums = Joined(changes, float(others.pop(MASKED_WEIGHT))), others
        if (noise := self._noise) is None:
            return joined, sums
        seed, changes = self._config.experiment.seed, joined.delta_sum
        if noise.changes is not None:
            each = dict.fromkeys(changes, noise.changes)
            changes = noised(changes, each, seed=seed, round_number=round_number, what="changes")
        # The denominator is known beforehand: that of those who happened to come would be one more thing to tell.
        joined = replace(joined, delta_sum=changes, weight_sum=float(self._cohort_size))
        return joined, noised(sums, noise.sums, seed=seed, round_number=round_number, what="sums")

    def learn(self, known: Learnt, learnt: Learnt, sums: AdapterState) -> Learnt:
        """What is known after a round, with its class sums; earlier ones count where the encoder stays as it is."""
        if not self.wanted or not sums:
            return learnt
        frozen = self._config.model.audio_encoder.trainable == "none"
        return replace(learnt, class_sums=remembered(known.class_sums if frozen else {}, sums))

    def stats(self, learnt: Learnt, sums: AdapterState) -> ClassStats | None:
        """Class statistics from sums; None where clients send their own.

        With noise a class counts from twice the standard deviation of its count on: below, its mean would be noise.
        """
        if not self.wanted or not learnt.class_sums:
            return None
        noise = 0.0 if self._noise is None else 2 * self._noise.sums[COUNT]
        in_all = noise * float(learnt.class_sums[ROUNDS]) ** 0.5
        return class_table(learnt.class_sums, sums, self._targets, least=max(1.0, in_all), least_now=max(1.0, noise))

    def metrics(self, round_number: int) -> dict[str, float]:
        """Epsilon of the run so far; nothing without noise."""
        return {} if self._noise is None else {"privacy/epsilon": self._noise.accountant.epsilon(round_number)}

    def guarantee(self, rounds: int) -> dict[str, object]:
        """What is promised after so many rounds, for result.json."""
        if self._noise is None:
            return {"epsilon": None, "guarantee": "none: no noise was added (privacy.noise_multiplier is 0)"}
        accountant = self._noise.accountant
        epsilon = accountant.epsilon(rounds)
        sampled = (
            "" if accountant.sample_rate == 1 else f", cohorts by Poisson sampling at {accountant.sample_rate:.4g}"
        )
        return {
            "epsilon": epsilon,
            "delta": accountant.delta,
            "noise_multiplier": accountant.noise_multiplier,
            "sample_rate": accountant.sample_rate,
            "guarantee": f"epsilon {epsilon:.4g} at delta {accountant.delta:.3g} for each client over {rounds} rounds"
            + sampled,
        }


def _opened(state: Mapping[str, Tensor]) -> AdapterState:
    return {name: torch.from_numpy(opened(tensor.numpy())) for name, tensor in state.items()}
