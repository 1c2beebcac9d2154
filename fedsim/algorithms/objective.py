"""The loss of clients and of the refinement, and the scores that evaluation ranks classes by.

Legend: K clients, B batch, C classes, M heads, `*shape_m` output shape of head m.

    loss of a row of class c = sum over heads m of lambda_m * mean over elements of (A_m(E) - T_m[c])^2
                               + cosine_weight * (1 - cosine(A(E), T[c]))
                               + contrastive_weight * cross-entropy of cosine(A(E), T[.]) / temperature

with lambda_m = 1 / Var_c(T_m), so that a constant predictor (the mean target) scores 1.0 per head: the NMSE. Cosines
are taken after subtracting the mean target, because class names share a common component.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
        lengths: head -> their lengths [C].
        contrastive_weight: weight of the contrastive term, 0 leaves it out.
        temperature: of the contrastive term.
        cosine_weight: weight of 1 - cosine to the own target, 0 leaves it out.
    """

    targets: Mapping[str, Tensor]
    centre: Mapping[str, Tensor]
    weight: Mapping[str, float]
    directions: Mapping[str, Tensor]
    lengths: Mapping[str, Tensor]
    contrastive_weight: float
    temperature: float
    cosine_weight: float = 0.0

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
        """Loss of every row: head -> [K, B, *shape_m], labels [K, B] -> [K, B].

        With u = output - centre and T_c - centre = s_c d_c, s_c its length and d_c a unit vector, every term follows
        from |u|^2 and u.d: |output - T_c|^2 = |u|^2 - 2 s_c u.d_c + s_c^2. That is a third of the passes over memory.
        """
        total = torch.zeros(labels.shape, device=labels.device)
        for head, output in outputs.items():
            u = (output - self.centre[head]).flatten(2)
            square = torch.linalg.vecdot(u, u)
            own = torch.linalg.vecdot(u, _rows(self.directions[head], labels))
            length = self.lengths[head][labels]
            error = square - 2 * length * own + length * length
            total = total + error * (self.weight[head] / u.shape[-1])
            if self.cosine_weight:
                total = total + self.cosine_weight * (1 - own * torch.rsqrt(square + 1e-24))
            if self.contrastive_weight:
                logits = self.cosines(head, output) / self.temperature
                entropy = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
                total = total + self.contrastive_weight * entropy.view(labels.shape)
        return total

    def to(self, device: torch.device) -> Objective:
        """The same objective with its tensors on another device."""
        moved = [
            {head: tensor.to(device) for head, tensor in table.items()}
            for table in (self.targets, self.centre, self.directions, self.lengths)
        ]
        return replace(self, targets=moved[0], centre=moved[1], directions=moved[2], lengths=moved[3])


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table [C, E] by an index of any shape: [*index, E]."""
    return table.index_select(0, index.reshape(-1)).view(*index.shape, -1)


def make_objective(
    targets: Mapping[str, Tensor],
    *,
    contrastive_weight: float = 0.0,
    temperature: float = 0.07,
    cosine_weight: float = 0.0,
) -> Objective:
    """Build the objective from text targets.

    Args:
        targets: head -> [C, *shape_m] float32.
        contrastive_weight: weight of the contrastive term.
        temperature: of the contrastive term.
        cosine_weight: weight of 1 - cosine to the own target.

    Raises:
        ModelError: fewer than two classes, or targets of a head that are equal for all classes (nothing to learn).
    """
    centre, weight, directions, lengths = {}, {}, {}, {}
    for head, table in targets.items():
        centre[head] = table.mean(0)
        variance = float((table - centre[head]).double().square().mean())
        if len(table) < 2 or variance <= 0:
            raise ModelError(f"the text targets of head {head!r} don't differ between classes: nothing to learn")
        weight[head] = 1.0 / variance
        directions[head] = functional.normalize((table - centre[head]).flatten(1), dim=-1)
        lengths[head] = torch.linalg.vector_norm((table - centre[head]).flatten(1), dim=-1)
    return Objective(dict(targets), centre, weight, directions, lengths, contrastive_weight, temperature, cosine_weight)
