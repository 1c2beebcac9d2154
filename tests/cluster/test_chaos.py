"""Whole runs of the command line that something is done to: `scripts/storm.py` and `scripts/chaos.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_hosts import can_make_hosts

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]


def script(name: str, *words: str) -> str:
    """What a script prints; it must end well."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *words],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_storm_of_25_faults_changes_nothing():
    shown = script("storm.py", "--faults", "25", "--seed", "0")
    assert "\n25 faults in " in shown
    assert "\nevery round once, in metrics.jsonl and in MLflow: True\n" in shown
    assert "\ndigest equal to the calm run's: True\n" in shown


@pytest.mark.skipif(not can_make_hosts(), reason="hosts in network namespaces need root and iproute2")
@pytest.mark.parametrize("fault", ["link", "host"])
def test_a_run_on_two_hosts_survives(fault):
    assert "| 1 | 1 |" in script("chaos.py", fault)


def test_a_run_survives_an_actor_that_is_killed_for_memory():
    shown = script("chaos.py", "memory")
    assert "| 1 | 1 |" in shown
    assert "out of memory" in shown
