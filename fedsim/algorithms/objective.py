"""The loss of clients and of the refinement, and the scores that evaluation ranks classes by.

Legend: K clients, B batch, C classes, M heads, `*shape_m` output shape of head m.

    loss of a row of class c = sum over heads m of lambda_m * mean over elements of (A_m(E) - T_m[c])^2
                               + contrastive_weight * cross-entropy of cosine(A(E), T[.]) / temperature

with lambda_m = 1 / Var_c(T_m), so that a constant predictor (the mean target) scores 1.0 per head: the NMSE. Cosines
are taken after subtracting the mean target, because class names share a common component.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.errors import ModelError


@dataclass(frozen=True)
class Objective:
    """Targets of all heads and what follows from them.

    Attributes:
        targets: head -> [C, *shape_m].
        centre: head -> mean target [*shape_m].
        weight: head -> lambda_m = 1 / Var_c(T_m).
        directions: head -> centred targets as unit vectors [C, E_m], E_m = product of shape_m.
        contrastive_weight: weight of the contrastive term, 0 leaves it out.
        temperature: of the contrastive term.
    """

    targets: Mapping[str, Tensor]
    centre: Mapping[str, Tensor]
    weight: Mapping[str, float]
    directions: Mapping[str, Tensor]
    contrastive_weight: float
    temperature: float

    @property
    def primary(self) -> str:
        """The head whose nearest class text is "the" accuracy: the first one."""
        return next(iter(self.targets))

    def nmse_rows(self, head: str, outputs: Tensor, wanted: Tensor) -> Tensor:
        """lambda_m * mean squared error of every row: outputs, wanted [..., *shape_m] -> [...]."""
        axes = tuple(range(outputs.ndim - self.targets[head].ndim + 1, outputs.ndim))
        return self.weight[head] * (outputs - wanted).square().mean(axes)

    def cosines(self, head: str, outputs: Tensor) -> Tensor:
        """Centred cosine of every row to every class target: [K, B, *shape_m] -> [K, B, C]."""
        directions = self.directions[head]
        rows = functional.normalize((outputs - self.centre[head]).flatten(2), dim=-1)
        return torch.bmm(rows, directions.T.expand(rows.shape[0], -1, -1))

    def loss_rows(self, outputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Loss of every row: head -> [K, B, *shape_m], labels [K, B] -> [K, B]."""
        total = torch.zeros(labels.shape, device=labels.device)
        for head, output in outputs.items():
            total = total + self.nmse_rows(head, output, self.targets[head][labels])
            if self.contrastive_weight:
                logits = self.cosines(head, output) / self.temperature
                entropy = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
                total = total + self.contrastive_weight * entropy.view(labels.shape)
        return total

    def to(self, device: torch.device) -> Objective:
        """The same objective with its tensors on another device."""
        moved = [
            {head: tensor.to(device) for head, tensor in table.items()}
            for table in (self.targets, self.centre, self.directions)
        ]
        return Objective(moved[0], moved[1], self.weight, moved[2], self.contrastive_weight, self.temperature)


def make_objective(
    targets: Mapping[str, Tensor], *, contrastive_weight: float = 0.0, temperature: float = 0.07
) -> Objective:
    """Build the objective from text targets.

    Args:
        targets: head -> [C, *shape_m] float32.
        contrastive_weight: weight of the contrastive term.
        temperature: of the contrastive term.

    Raises:
        ModelError: fewer than two classes, or targets of a head that are equal for all classes (nothing to learn).
    """
    centre, weight, directions = {}, {}, {}
    for head, table in targets.items():
        centre[head] = table.mean(0)
        variance = float((table - centre[head]).double().square().mean())
        if len(table) < 2 or variance <= 0:
            raise ModelError(f"the text targets of head {head!r} don't differ between classes: nothing to learn")
        weight[head] = 1.0 / variance
        directions[head] = functional.normalize((table - centre[head]).flatten(1), dim=-1)
    return Objective(dict(targets), centre, weight, directions, contrastive_weight, temperature)
