"""Synthetic rows in local training: a client draws recordings of its own classes from its generator.

A row is the mean of a class at the client plus deviation * residual, the residual from the client's own network or
from the one that all share (see `models.generators.residual_vae`): x = mean + deviation * (r^(z) + sqrt(v) eps). To b
recordings of a batch come round(share * b) rows, of those recordings' classes in turn, new ones in every step; each
counts in the loss as a recording does. A class with one recording gets rows around that recording.

Legend: K clients of a stack, B recordings of a batch, A synthetic rows of a batch, M (client, class) pairs, E = S * D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.batches import Batch
from fedsim.algorithms.client_generator import ClassMeans, normal_rows
from fedsim.models.generators.residual_vae import draw_rows


def most_rows(share: float, batch_size: int) -> int:
    """Synthetic rows of a full batch: A."""
    return int(share * batch_size + 0.5)


@dataclass(frozen=True)
class StackGenerator:
    """What the clients of a stack draw rows from; a row is a function of (seed, purpose, round, client, step) alone.

    Attributes:
        client: ids [K].
        pairs: (client, class) pairs [M], ascending: place in the stack * num_classes + class.
        mean: mean embedding of every pair [M, E].
        least: lowest value of a client's rows [K]: 0 where none of its means is negative (encoders that end in a
            ReLU), else minus infinity.
        params: networks, a stack of K or of 1 that all share.
        deviation: scale of the residuals [E].
        num_classes: C.
        seed, purpose, round_number: name the stream.
        share: synthetic rows per recording.
        batch_size: B.
    """

    client: np.ndarray
    pairs: Tensor
    mean: Tensor
    least: Tensor
    params: Mapping[str, Tensor]
    deviation: Tensor
    num_classes: int
    seed: int
    purpose: str
    round_number: int
    share: float = 0.0
    batch_size: int = 0

    def draw(self, first: int, labels: Tensor, step: int) -> Tensor:
        """Rows [K', A, E] for clients `first` and up, of classes [K', A] that they hold."""
        active, (count, rows) = self.client[first:], labels.shape
        size, latents = self.mean.shape[1], self.params["decoder.0.weight"].shape[1]
        normal = normal_rows(self.seed, self.purpose, self.round_number, active, step, rows * (latents + size))
        normal = normal.view(count, rows, latents + size).to(self.mean.device)
        z, noise = normal[..., :latents].contiguous(), normal[..., latents:]
        params = {
            name: p.expand(count, *p.shape[1:]) if len(p) < len(self.client) else p[first:]
            for name, p in self.params.items()
        }
        owner = torch.arange(first, first + count, device=self.mean.device).unsqueeze(1)
        pair = torch.searchsorted(self.pairs, owner * self.num_classes + labels)
        with torch.no_grad():
            residual = draw_rows(params, z, noise)
        return torch.maximum(self.mean[pair] + residual * self.deviation, self.least[first:].view(-1, 1, 1))

    def enlarge(self, batch: Batch, step: int) -> Batch:
        """A batch with its synthetic rows behind the recordings."""
        real, most = batch.rows.long().unsqueeze(1), most_rows(self.share, self.batch_size)
        if not most:
            return batch
        made = (self.share * real + 0.5).long()
        number = torch.arange(most, device=real.device)
        # Evenly spaced recordings lend their classes.
        like = torch.minimum((2 * number + 1) * real // (2 * made).clamp(min=1), real - 1)
        labels, mask = batch.labels.gather(1, like), (number < made).to(batch.mask)
        rows = self.draw(batch.first, labels, step).view(*labels.shape, *batch.inputs.shape[2:])
        return Batch(
            first=batch.first,
            inputs=torch.cat([batch.inputs, rows], dim=1),
            lengths=torch.cat([batch.lengths, batch.lengths.gather(1, like)], dim=1),
            labels=torch.cat([batch.labels, labels], dim=1),
            mask=torch.cat([batch.mask, mask], dim=1),
            rows=batch.rows + mask.sum(1),
        )


def least_values(means: ClassMeans, *, clients: int, num_classes: int) -> Tensor:
    """The lowest value that rows of every client may have [K]: 0 or minus infinity."""
    floor = np.full(clients, np.inf)
    np.minimum.at(floor, means.pairs // num_classes, means.mean.amin(1).cpu().numpy())
    return torch.from_numpy(np.where(floor >= 0, 0.0, -np.inf).astype(np.float32)).to(means.mean.device)
