"""Pictures of a finished run: confusion matrix, embeddings in two dimensions, learning curves, the generator's quality.

Figures are matplotlib objects drawn by Agg; pyplot and its global state are not used. Legend for shapes: C classes,
n real rows, m synthetic rows, E width of a flattened audio embedding.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedsim.federation.tracker import FinalReport

log = logging.getLogger(__name__)

MAX_POINTS = 2000
"""Rows of each kind in the picture of the embeddings; evenly spaced ones where there are more."""

Panel = tuple[str, str, Mapping[str, str]]
"""Title, unit, and the metric's name by the curve's label."""

PANELS: Sequence[Panel] = (
    ("held-out accuracy", "top-1", {"averaged": "eval/top1_averaged", "refined": "eval/top1"}),
    ("client loss", "loss", {"train": "train/loss"}),
    ("generator loss", "loss", {"generator": "server/generator_loss"}),
    ("refinement loss", "loss", {"refinement": "server/adapter_finetuning_loss"}),
)

QUALITY_PANELS: Sequence[Panel] = (
    ("class means", "NMSE", {"NMSE": "generator/nmse"}),
    (
        "Fréchet distance to held-out recordings", "squared units",
        {"diagonal": "generator/frechet_diagonal", "full, main axes": "generator/frechet"},
    ),
    ("within-class correlations", "relative error", {"error": "generator/correlation_error"}),
    ("within-class variance", "synthetic / real", {"diversity": "generator/diversity"}),
    ("neighbourhoods", "share", {"coverage": "generator/coverage", "precision": "generator/precision"}),
    ("trained on synthetic, tested on real", "top-1", {"accuracy": "generator/tstr_top1"}),
)  # fmt: skip


def try_plots(report: FinalReport) -> None:
    """`write_plots`, where a failure is a warning."""
    try:
        write_plots(report)
    except Exception:  # a picture is not worth a finished run
        log.warning("plots of %s could not be drawn", report.run_dir, exc_info=True)


def write_plots(report: FinalReport) -> list[Path]:
    """Draw all pictures into `run_dir/plots/*.png`, each written atomically.

    Returns:
        The files, in the order confusion_matrix, embeddings (only where there are real rows), learning_curves,
        generator_quality (only where it was measured).
    """
    figures = {"confusion_matrix": confusion_matrix(report.confusion, report.class_names)}
    if len(report.real):
        figures["embeddings"] = embeddings(
            report.real, report.real_label, synthetic=report.synthetic, synthetic_label=report.synthetic_label,
            class_names=report.class_names,
        )  # fmt: skip
    figures["learning_curves"] = learning_curves(report.history)
    if any(name.startswith("generator/") for entry in report.history for name in entry.get("metrics") or {}):
        figures["generator_quality"] = generator_quality(report.history)
    folder, paths = report.run_dir / "plots", []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path, partial = folder / f"{name}.png", folder / f"{name}.png.tmp"
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
        paths.append(path)
    return paths


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Any:
    """Confusion matrix: colour is the share of the true class, the numbers are counts (up to 20 classes).

    Args:
        counts: [C, C], rows are true classes, columns predicted ones; rows without recordings stay white.
        class_names: names of the C classes.

    Returns:
        A matplotlib Figure.
    """
    num_classes = len(class_names)
    side = float(np.clip(2.6 + 0.42 * num_classes, 4.5, 14.0))
    figure = _figure(side + 1.2, side, layout="compressed")  # the layout for axes of fixed aspect
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if num_classes <= 20 else 7
    axes.set_xticks(range(num_classes), class_names, fontsize=size, **_slanted(num_classes))
    axes.set_yticks(range(num_classes), class_names, fontsize=size)
    if num_classes <= 20:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.6 else "#222222"
            axes.text(column, row, f"{counts[row, column]:g}", ha="center", va="center", color=colour, fontsize=size)
    total = counts.sum()
    accuracy = f"top-1 {100 * np.trace(counts) / total:.1f} % of {total:g}" if total else "no recordings"
    axes.set(title=f"Held-out recordings: {accuracy}", xlabel="predicted", ylabel="true")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.03)
    return figure


def embeddings(
    real: np.ndarray,
    real_label: np.ndarray,
    *,
    synthetic: np.ndarray,
    synthetic_label: np.ndarray,
    class_names: Sequence[str],
) -> Any:
    """Real and synthetic audio embeddings on the two main axes of the real ones (PCA).

    Args:
        real: [n, E], n at least 1.
        real_label: class numbers [n].
        synthetic: [m, E], m may be 0.
        synthetic_label: class numbers [m].
        class_names: names of the C classes; one colour each.

    Returns:
        A matplotlib Figure: real rows filled, synthetic rows hollow.
    """
    real, real_label = _thin(real, real_label)
    synthetic, synthetic_label = _thin(synthetic, synthetic_label)
    mean, directions, shares = _principal_axes(real)
    many = len(class_names) > 20
    figure = _figure(10 if many else 8.6, 6)
    axes = figure.subplots()
    colours = _colours(len(class_names))
    for number, name in enumerate(class_names):
        points = (real[real_label == number] - mean) @ directions.T
        drawn = (synthetic[synthetic_label == number] - mean) @ directions.T
        if len(points) or len(drawn):
            axes.scatter(*points.T, s=22, color=colours[number], alpha=0.75, linewidths=0, label=name)
            axes.scatter(*drawn.T, s=34, facecolors="none", edgecolors=[colours[number]], linewidths=1.1)
    handles, labels = axes.get_legend_handles_labels()
    handles += [_marker(filled=True), *([_marker(filled=False)] if len(synthetic) else [])]
    labels += ["real", *(["synthetic"] if len(synthetic) else [])]
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7 if many else 9,
                  ncols=2 if many else 1)  # fmt: skip
    axes.set(
        title=f"Audio embeddings: {len(real)} real, {len(synthetic)} synthetic",
        xlabel=f"first axis ({100 * shares[0]:.0f} % of the real variance)",
        ylabel=f"second axis ({100 * shares[1]:.0f} %)",
    )
    _plain(axes)
    return figure


def learning_curves(history: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy before and after refinement, losses, and seconds per phase, over rounds.

    Args:
        history: the objects of metrics.jsonl; missing, null and non-finite values are left out, and so is a panel
            without any value.

    Returns:
        A matplotlib Figure.
    """
    phases = list(dict.fromkeys(phase for entry in history for phase in entry.get("seconds") or {}))
    return _curves(history, PANELS, phases)


def generator_quality(history: Sequence[Mapping[str, Any]]) -> Any:
    """How near the generator's rows are to held-out recordings, over evaluated rounds.

    Args:
        history: as for `learning_curves`.

    Returns:
        A matplotlib Figure.
    """
    return _curves(history, QUALITY_PANELS, ())


def _curves(history: Sequence[Mapping[str, Any]], wanted: Sequence[Panel], phases: Sequence[str]) -> Any:
    """The wanted panels that have values, and the seconds of the phases."""
    rounds = np.array([entry["round"] for entry in history], dtype=float)
    curves = [
        (title, unit, {label: _series(history, key) for label, key in keys.items()}) for title, unit, keys in wanted
    ]
    panels = [panel for panel in curves if any(np.isfinite(values).any() for values in panel[2].values())]
    count = len(panels) + bool(phases)
    columns = 2 if count in (2, 4) else min(max(count, 1), 3)
    rows = max(math.ceil(count / columns), 1)
    figure = _figure(4.6 * columns, 3.5 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (title, unit, lines) in zip(axes, panels, strict=False):
        _draw_lines(ax, rounds, lines)
        ax.set(title=title, xlabel="round", ylabel=unit)
    if phases:
        _draw_seconds(axes[len(panels)], rounds, history, phases)
    for ax in axes[count:]:
        ax.set_axis_off()
    if not count:
        axes[0].text(0.5, 0.5, "no finite values were recorded", ha="center", va="center")
    return figure


def _draw_lines(axes: Any, rounds: np.ndarray, lines: Mapping[str, np.ndarray]) -> None:
    marker = "o" if len(rounds) <= 40 else None
    for (label, values), colour in zip(lines.items(), _colours(max(len(lines), 2)), strict=False):
        known = np.isfinite(values)  # rounds without evaluation leave no hole in the line
        if not known.any():
            continue
        axes.plot(rounds[known], values[known], marker=marker, markersize=3.5, linewidth=1.6, color=colour, label=label)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    _plain(axes)
    _whole_rounds(axes, rounds)


def _draw_seconds(axes: Any, rounds: np.ndarray, history: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> None:
    stack = [
        np.nan_to_num([_number((entry.get("seconds") or {}).get(phase)) for entry in history], posinf=0.0, neginf=0.0)
        for phase in phases
    ]
    bottom = np.zeros(len(rounds))
    for phase, values, colour in zip(phases, stack, _colours(len(phases)), strict=True):
        axes.bar(rounds, values, bottom=bottom, width=0.85, color=colour, label=phase)
        bottom = bottom + values
    axes.set(title="seconds per phase", xlabel="round", ylabel="s")
    axes.set_ylim(0, max(float(bottom.max()), 1e-3) * 1.05)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=min(len(phases), 4))
    _plain(axes)
    _whole_rounds(axes, rounds)


def _principal_axes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [E], two main directions [2, E] and their shares of the variance [2]; zeros where there are too few rows."""
    rows = np.asarray(rows, dtype=np.float64)
    mean = rows.mean(axis=0)
    _, scale, directions = np.linalg.svd(rows - mean, full_matrices=False)
    variances = np.zeros(max(2, len(scale)))
    variances[: len(scale)] = scale**2
    main = np.zeros((2, rows.shape[1]))
    main[: min(2, len(directions))] = directions[:2]
    # Singular vectors have no sign of their own; the largest entry is made positive so that pictures compare.
    main *= np.where(np.take_along_axis(main, np.abs(main).argmax(axis=1)[:, None], axis=1) < 0, -1.0, 1.0)
    return mean, main, variances[:2] / max(variances.sum(), 1e-12)


def _thin(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    index = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_POINTS)).astype(int))
    return np.asarray(rows)[index], np.asarray(labels)[index]


def _series(history: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([_number((entry.get("metrics") or {}).get(key)) for entry in history], dtype=float)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 20:
        return list(colormaps["tab10" if count <= 10 else "tab20"](np.arange(count)))
    return list(colormaps["gist_rainbow"](np.linspace(0, 1, count)))


def _marker(*, filled: bool) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", marker="o", color="#666666", markerfacecolor="#666666" if filled else "none")


def _slanted(num_labels: int) -> dict[str, Any]:
    return {"rotation": 45 if num_labels <= 20 else 90, "ha": "right", "va": "center", "rotation_mode": "anchor"}


def _figure(width: float, height: float, *, layout: Literal["constrained", "compressed"] = "constrained") -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _whole_rounds(axes: Any, rounds: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if len(rounds):
        axes.set_xlim(rounds.min() - 0.6, rounds.max() + 0.6)
