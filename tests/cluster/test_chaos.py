"""Whole runs of the command line that something is done to: `scripts/chaos.py`, each fault once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("fault", ["client", "hang", "memory", "server", "driver", "node", "join"])
def test_a_run_ends_with_the_digest_of_the_calm_run(fault):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "chaos.py"), fault],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 1 | 1 |" in done.stdout
    assert "| 0 | 1 of 1 |" in done.stdout
