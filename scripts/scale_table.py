"""What bench_scale.py has found, as a Markdown table and as plain values for a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

COLUMNS = {
    "clients/s": ("clients_per_second", 1),
    "CPU per client, ms": ("cpu_seconds_per_client", 1e3),
    "peak PSS, MB": ("peak_pss_mb", 1),
    "peak RSS, MB": ("peak_rss_mb", 1),
    "share of peak, %": ("share", 100),
}


@dataclass(frozen=True)
class Finding:
    """A figure, and the bound to keep: at most `most`, or at least `least`."""

    name: str
    value: float
    unit: str = ""
    most: float | None = None
    least: float | None = None

    def __str__(self) -> str:
        shown = f"{self.name} {self.value:{'.0f' if abs(self.value) >= 100 else '.3g'}}{self.unit}"
        if self.most is None and self.least is None:
            return shown
        bound = f"≤ {self.most:g}" if self.least is None else f"≥ {self.least:g}"
        return f"{shown} ({bound}{self.unit}: {'yes' if self.kept else 'NO'})"

    @property
    def kept(self) -> bool:
        """Whether the bound was kept; True without one."""
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, on what, the figures (or an `error`), and what to read from them."""

    case: str
    on: dict[str, Any]
    figures: dict[str, Any]
    findings: tuple[Finding, ...]

    @classmethod
    def failed(cls, case: str, error: Exception, **on: Any) -> Row:
        """A line without figures."""
        return cls(case, on, {"error": str(error)}, ())

    def plain(self) -> dict[str, Any]:
        """All of it, for the file."""
        findings = [asdict(finding) | {"kept": finding.kept} for finding in self.findings]
        return {"case": self.case} | self.on | self.figures | {"findings": findings}


def trained_by(on: dict[str, Any]) -> str:
    """Actors, or threads of the one process."""
    actors, threads = on.get("actors"), on.get("threads")
    if actors:
        return f"{actors} actor{'s' * (actors > 1)}"
    return f"{threads} thread{'s' * (threads > 1)}" if threads else ""


def table(rows: list[Row]) -> str:
    """A Markdown table with aligned columns."""
    lines = [["case", "work", "clients", "trained by", *COLUMNS, "findings"]]
    for row in rows:
        figures = [f"{scale * row.figures[key]:.4g}" if key in row.figures else "" for key, scale in COLUMNS.values()]
        clients = f"{row.on['cohort']:,}" if "cohort" in row.on else ""
        on = [row.on.get("work", ""), clients, trained_by(row.on)]
        lines.append([row.case, *on, *figures, row.figures.get("error") or ", ".join(map(str, row.findings))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
