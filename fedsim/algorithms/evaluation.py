"""Evaluation on held-out recordings: nearest class text, margins, and NMSE.

Cosines are taken after subtracting the mean target. NMSE of a head is its mean squared error over the variance of the
targets: a constant predictor (the mean target) scores 1.00.

Legend: N held-out recordings, C classes, K clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.objective import Objective
from fedsim.models.adapters import Adapter, stack
from fedsim.types import AdapterState

CHUNK = 64


@dataclass(frozen=True)
class Evaluation:
    """Scores on the held-out recordings.

    Attributes:
        metrics: "top1", "top5", "balanced_accuracy", "margin", "cosine" of the primary head, "top1_<head>" and
            "nmse_<head>" of every head.
        confusion: counts [C, C], rows true, columns predicted, of the primary head.
    """

    metrics: Mapping[str, float]
    confusion: np.ndarray


def evaluate(
    adapter: Adapter, params: AdapterState, embeddings: Tensor, labels: Tensor, *, objective: Objective
) -> Evaluation:
    """Score unstacked adapter tensors on audio embeddings [N, S, D] with labels [N].

    Top-5 is over at most C classes; a recording's margin is the cosine to its class text minus the best other one.
    """
    num_classes = len(objective.targets[objective.primary])
    squared: dict[str, list[Tensor]] = {head: [] for head in objective.targets}
    scores: dict[str, list[Tensor]] = {head: [] for head in objective.targets}
    stacked = stack(params)
    with torch.no_grad():
        for x, y in zip(torch.split(embeddings, CHUNK), torch.split(labels, CHUNK), strict=True):
            for head, output in adapter.forward(stacked, x.unsqueeze(0)).items():
                wanted = objective.targets[head][y].unsqueeze(0)
                squared[head].append(objective.nmse_rows(head, output, wanted)[0])
                scores[head].append(objective.cosines(head, output)[0])
    metrics = {}
    for head in objective.targets:
        metrics[f"nmse_{head}"] = float(torch.cat(squared[head]).double().mean())
        metrics[f"top1_{head}"] = float((torch.cat(scores[head]).argmax(1) == labels).double().mean())
    cosine = torch.cat(scores[objective.primary])
    return Evaluation(metrics | _ranking(cosine, labels), _confusion(cosine.argmax(1), labels, num_classes))


def _ranking(cosine: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores from cosines [N, C]."""
    right = cosine.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = cosine.scatter(1, labels.unsqueeze(1), -torch.inf)
    hits = cosine.argmax(1) == labels
    top = cosine.topk(min(5, cosine.shape[1]), dim=1).indices
    recalls = [hits[labels == label].double().mean() for label in torch.unique(labels)]
    return {
        "top1": float(hits.double().mean()),
        "top5": float((top == labels.unsqueeze(1)).any(1).double().mean()),
        "balanced_accuracy": float(torch.stack(recalls).mean()),
        "cosine": float(right.double().mean()),
        "margin": float((right - others.max(1).values).double().mean()),
    }


def _confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    flat = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.view(num_classes, num_classes).cpu().numpy()


def client_accuracies(confusion: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """Accuracy each client would see on held-out recordings of its own class mix [K].

    Args:
        confusion: counts [C, C] of the evaluated adapter.
        class_counts: training recordings of every client and class [K, C].
    """
    recall = np.diag(confusion) / np.maximum(confusion.sum(1), 1)
    mix = class_counts / class_counts.sum(1, keepdims=True)
    accuracies: np.ndarray = mix @ recall
    return accuracies


def worst_tenth(values: np.ndarray) -> float:
    """Mean of the worst 10 % of the values, at least one of them."""
    return float(np.sort(values)[: max(1, len(values) // 10)].mean())
