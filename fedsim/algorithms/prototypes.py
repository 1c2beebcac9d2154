"""FedProto: the mean outputs of all clients, class by class, as a regulariser of each.

Tan et al. 2022, "FedProto: federated prototype learning across heterogeneous clients". The prototype of class c and
head m is the count-weighted mean of the clients' mean outputs,

    P_m[c] = sum over clients of n_kc mu_kc^m / sum over clients of n_kc,

and the loss of a client's row of class c becomes

    l + weight * sum over heads m of lambda_m * mean over elements of (A_m(E) - P_m[c])^2,

on the scale of the objective's own error (lambda_m = 1 / Var_c(T_m)). Prototypes are those of earlier rounds; one of a
class of which nobody has told anything yet pulls nothing, and one of a class absent from a round stays as it was.

Legend: K clients, B batch, C classes, `*shape_m` output shape of head m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.generation import class_means
from fedsim.algorithms.objective import Objective
from fedsim.algorithms.row_sample import settle_counts
from fedsim.types import AdapterState, ClassStats

PREFIX, KNOWN = "prototype.", "prototype_known"


@dataclass(frozen=True)
class PrototypeLoss:
    """The objective and the pull towards prototypes.

    Attributes:
        objective: the loss without them.
        prototypes: P by head [C, *shape_m].
        known: 1 for classes that have one, else 0 [C].
        weight: of the pull.
    """

    objective: Objective
    prototypes: Mapping[str, Tensor]
    known: Tensor
    weight: float

    def loss_rows(self, outputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Loss of every row: head -> [K, B, *shape_m], labels [K, B] -> [K, B]."""
        pull = torch.zeros(labels.shape, device=labels.device)
        for head, output in outputs.items():
            u = (output - self.prototypes[head][labels]).flatten(2)
            pull = pull + torch.linalg.vecdot(u, u) * (self.objective.weight[head] / u.shape[-1])
        return self.objective.loss_rows(outputs, labels) + self.weight * self.known[labels] * pull


def with_prototypes(objective: Objective, told: Mapping[str, Tensor], weight: float) -> Objective | PrototypeLoss:
    """What clients minimise, from what they are told; the objective alone where that holds no prototypes."""
    if KNOWN not in told:
        return objective
    prototypes = {head: told[PREFIX + head].to(target.device) for head, target in objective.targets.items()}
    device = objective.targets[objective.primary].device
    return PrototypeLoss(objective, prototypes, told[KNOWN].to(device), weight)


def next_prototypes(told: Mapping[str, Tensor], stats: ClassStats, num_classes: int) -> AdapterState:
    """Prototypes after a round, by "prototype.HEAD" [C, *shape_m], and "prototype_known" [C].

    Args:
        told: what clients were told in the round; without prototypes before the first statistics.
        stats: the round's class statistics, or a sample of them.
        num_classes: C.
    """
    if not len(stats):
        return {name: tensor for name, tensor in told.items() if name == KNOWN or name.startswith(PREFIX)}
    stats = settle_counts(stats)
    known = told.get(KNOWN, torch.zeros(num_classes)).clone()
    known[torch.from_numpy(np.unique(stats.label))] = 1.0
    tables = {}
    for head, means in stats.output_mean.items():
        earlier = told.get(PREFIX + head, torch.zeros(num_classes, *means.shape[1:]))
        tables[PREFIX + head] = class_means(stats, head, earlier)
    return {**tables, KNOWN: known}
