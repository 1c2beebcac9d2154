"""A short form of `scripts/soak.py`: many small rounds of the command line, and nothing that grows with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, MIDDLE = 150, 75
GROWTH = 1.05
"""Of memory from the middle to the end; a leak of a kilobyte per weight and round would be more."""
IN_A_ROUND = 4
"""Objects of Ray that one round holds for a moment: all looks may have met it at one. A leak of one a round adds 37."""


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param((), marks=pytest.mark.ray), ("--in-process",)], ids=["ray", "in process"])
def test_many_rounds_take_what_few_take(tmp_path, how):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "soak.py"), "--rounds", str(ROUNDS), "--interval", "0.25",
         "--save", str(tmp_path / "found.json"), *how],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["left"], found["lacks"]) == ([], None)
    later = [look for look in found["looks"] if look["round"] > MIDDLE]
    assert len(later) >= 4
    middle, end = later[: len(later) // 2], later[len(later) // 2 :]
    # The least of some looks: in mid-round there are updates, and files that are open for a moment.
    for name in ("memory written", "descriptors", "threads", "processes"):
        before, after = (min(look.get(name, 0) for look in looks) for looks in (middle, end))
        assert after <= before * (GROWTH if "memory" in name else 1), (name, before, after, done.stdout)
    middle, end = (min(look.get("objects", 0) for look in looks) for looks in (middle, end))
    assert end <= middle + IN_A_ROUND, (middle, end, done.stdout)
    assert max(look["folders in /tmp"] for look in later) == (0 if how else 1)
