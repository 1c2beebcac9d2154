"""Draws clients per second against the clients of a round, fedsim and the others, from the results of the benchmarks.

    python scripts/plot_benchmarks.py [FOLDER]

Reads scale.json (bench_scale.py --out) and peers-*.json (bench_peers.py --out) in docs/benchmarks, or in FOLDER, and
writes clients_per_second.png beside them; what is missing there is missing in the picture.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
PANELS = {
    "W": "W: 40 vectors of 512 a client, adapter 512 → 1024 → 768",
    "W-small": "W-small: 20 vectors of 64 a client, adapter 64 → 64 → 32",
}
# Colours of Okabe and Ito, which colour-blind people can tell apart; markers tell the rest.
FEDSIM = {
    (2, 1): ("fedsim, two actors", "#D55E00"),
    (0, 2): ("fedsim, two threads", "#0072B2"),
    (0, 1): ("fedsim, one thread", "#56B4E9"),
}
PEERS = {
    "pfl-2": ("pfl-research, two processes", "#009E73", "s"),
    "pfl": ("pfl-research", "#009E73", "D"),
    "plain": ("plain PyTorch loop", "#000000", "o"),
    "flower": ("Flower", "#CC79A7", "^"),
    "naive-ray": ("a Ray actor per client", "#8A6D00", "v"),
}
LABEL_GAP, LABEL_ROOM = 0.04, 0.5
"""Least distance of two labels as a share of the axis; what is added to the right for them as a share of the data."""


@dataclass(frozen=True)
class Series:
    """Clients/s of one system, by clients of a round."""

    label: str
    colour: str
    marker: str
    line: str
    speed: dict[int, float]


def read(folder: Path, work: str) -> Iterator[Series]:
    """All systems that have done a work."""
    scale = json.loads((folder / "scale.json").read_text())["results"] if (folder / "scale.json").exists() else []
    ours = [result for result in scale if result["case"] == "throughput" and result["work"] == work]
    for way, (label, colour) in FEDSIM.items():
        done = [result for result in ours if (result["actors"], result["threads"]) == way]
        yield Series(label, colour, "o", "-", speeds(done))
    files = [json.loads(file.read_text()) for file in sorted(folder.glob("peers-*.json"))]
    theirs = [result for file in files if file["work"] == work for result in file["results"]]
    for system, (label, colour, marker) in PEERS.items():
        done = [result for result in theirs if result["system"] == system]
        yield Series(label, colour, marker, ":", speeds(done))


def speeds(results: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Clients/s by cohort, of the results that have one."""
    found = {r["cohort"]: r["clients_per_second"] for r in results if "clients_per_second" in r}
    return dict(sorted(found.items()))


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights pushed apart until neighbours are (nearly) `gap` apart, in the same order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for _ in range(100):
        for below, above in pairwise(order):
            push = max(0.0, gap - (moved[above] - moved[below])) / 2
            moved[below], moved[above] = moved[below] - push, moved[above] + push
    return moved


def draw(axes: Any, title: str, systems: Sequence[Series]) -> None:
    """One panel: lines and points, and each label at the last point of its series."""
    for system in systems:
        axes.plot(
            list(system.speed),
            list(system.speed.values()),
            color=system.colour,
            marker=system.marker,
            linestyle=system.line,
            linewidth=2,
            markersize=6,
        )
    axes.set(xscale="log", yscale="log", xlabel="clients of a round")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", length=0)
    cohorts = [cohort for system in systems for cohort in system.speed]
    decades = range(math.ceil(math.log10(min(cohorts))), math.floor(math.log10(max(cohorts))) + 1)
    axes.set_xticks([10**decade for decade in decades])
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(tick)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** LABEL_ROOM)
    lasts = [max(system.speed) for system in systems]
    for last in sorted(set(lasts)):
        name(axes, [system for system, its in zip(systems, lasts, strict=True) if its == last], last)


def tick(value: float, _: int) -> str:
    """The text at a tick."""
    return f"{value / 1e6:g} million" if value >= 1e6 else f"{value:,.0f}" if value >= 1 else f"{value:g}"


def name(axes: Any, systems: Sequence[Series], last: int) -> None:
    """Names and speeds beside the last points of series that end at the same number of clients."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    heights = [math.log10(system.speed[last]) for system in systems]
    for system, height in zip(systems, spread(heights, LABEL_GAP * math.log10(high / low)), strict=True):
        speed = float(f"{system.speed[last]:.3g}")
        at = last * (right / left) ** 0.02, 10**height
        axes.text(*at, f"{system.label}  {speed:,.0f}", va="center", fontsize=9.5, color=system.colour)


def main() -> None:
    """Draws both panels."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    found = {work: [system for system in read(folder, work) if system.speed] for work in PANELS}
    if not any(found.values()):
        sys.exit(f"{folder} holds neither scale.json nor peers-*.json with clients per second of {' or '.join(PANELS)}")
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 6), dpi=100, layout="constrained")
    for axes, (work, title) in zip(panels, PANELS.items(), strict=True):
        if found[work]:
            draw(axes, title, found[work])
        else:
            axes.set_axis_off()
    panels[0].set_ylabel("clients per second")
    figure.savefig(folder / "clients_per_second.png")
    print(folder / "clients_per_second.png")


if __name__ == "__main__":
    main()
