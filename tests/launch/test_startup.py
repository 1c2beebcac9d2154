"""What a run in this process loads before its first round is over: nothing heavy but torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = (
    "mlflow", "ray", "matplotlib", "scipy", "sklearn", "transformers", "soundfile", "pandas", "sympy", "torch._dynamo",
    "diffusers", "optuna", "huggingface_hub",
)  # fmt: skip
CODE = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1] / "federation")!r})
from worlds import tiny_config
from fedsim.cli import session
from fedsim.federation.experiment import Experiment

def stop(self, status):
    print("loaded", *[name for name in {HEAVY!r} if name in sys.modules])
    raise SystemExit(0)

Experiment.finish = stop
session.run(tiny_config("federation.global_rounds=1"), output=Path(sys.argv[1]))
"""


def test_the_first_round_in_this_process_loads_nothing_heavy(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "run")], capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded"]
