"""The values of a round as MLflow gets them, under names that it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedsim.federation.run_directory import round_record
from fedsim.tracking.store import clean_key
from fedsim.types import RoundResult


def round_metrics(result: RoundResult) -> dict[str, float]:
    """The metrics of one round as MLflow gets them, see `record_metrics`."""
    return record_metrics(round_record(result))


def record_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one line of metrics.jsonl as MLflow gets them.

    `metrics` as they are, and `time/<phase>_s`, `bytes/up`, `bytes/down`, `clients/lost`, for every kind of
    fault that the round survived how many (`faults/killed`), `round`. Non-finite values
    (null) are left out: SQLite stores infinities as 1.8e308 and charts draw NaN as 0. `round` is the last one, so that
    a round that it names is there as a whole.
    """
    values = {
        **record["metrics"],
        **{f"time/{phase}_s": seconds for phase, seconds in record.get("seconds", {}).items()},
        "bytes/up": record.get("bytes_up"),
        "bytes/down": record.get("bytes_down"),
        "clients/lost": len(record.get("lost", ())),
        **{f"faults/{kind}": n for kind, n in Counter(f["kind"] for f in record.get("faults", ())).items()},
        "round": record["round"],
    }
    return {clean_key(name): float(value) for name, value in values.items() if value is not None}
