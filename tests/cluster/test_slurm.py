"""`scripts/cluster/slurm.sh` on two "nodes" of this machine: srun and scontrol are made up, the rest is real."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import ROOT, environment, fedsim

CONFIG = """
experiment: {name: slurm, checkpoint_every: 1}
data: {name: synthetic, clips_per_class: 8, classes: [dog, rain, sneezing, chainsaw]}
federation: {num_clients: 8, global_rounds: 6, local_epochs: 60}
model:
  heads: {clip: [16]}
  audio_encoder: {name: logmel, segments: 4, dim: 32}
  text_encoder: {name: seeded}
  adapters: {clip: {preset: mlp, hidden: [16]}}
training: {batch_size: 4}
privacy: {min_count: 1}
resources: {client_actors: 4, client_cpus: 0.5, block_size: 1, placement: spread}
tracking: {enabled: false}
"""
SRUN = """#!/bin/bash
while [ "${1#-}" != "$1" ]; do if [ "$1" = -w ]; then node=$2; shift; fi; shift; done
case "$*" in hostname*) echo 127.0.0.$((node + 1)); exit ;; esac
echo "$node: $*" >>"$LOG"
case "$*" in *--head*) exec "$@" ;; *) exec "$@" --node-ip-address=127.0.0.$((node + 1)) ;; esac
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf '1\\n2\\n'; else echo "scontrol: $*" >>"$LOG"; fi
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(tmp_path: Path) -> subprocess.Popen[str]:
    """The batch script, as Slurm would start it."""
    fakes = tmp_path / "bin"
    fakes.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    (fakes / "fedsim").write_text(f'#!/bin/bash\nexec {sys.executable} -m fedsim "$@"\n')
    (fakes / "fedsim").chmod(0o755)
    (tmp_path / "my.yaml").write_text(CONFIG)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    more = {"FEDSIM_PORT": str(free_port()), "FEDSIM_TMP": "/tmp", "LOG": str(tmp_path / "log")}
    path = os.pathsep.join([str(fakes), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = environment(PATH=path, **slurm, **more)
    env.pop("RAY_AUTH_MODE", None)
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts/cluster/slurm.sh"), str(tmp_path / "my.yaml"), str(tmp_path / "run")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_a_job_that_is_preempted_goes_back_and_resumes_to_the_same_digest(tmp_path):
    calm_words = ["run", str(tmp_path / "my.yaml"), "--set", "resources.client_actors=0", "--output"]
    job = start(tmp_path)
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < end, "no second round"
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=100)
    log = (tmp_path / "log").read_text()
    assert job.returncode == 143, said
    assert "scontrol: requeue 4711" in log
    assert "ray start --head" in log.splitlines()[0]
    assert log.splitlines()[1].startswith("2: ray start --block --address=127.0.0.2:")
    done = len(metrics.read_text().splitlines())
    assert done < 6, "it was stopped too late"
    assert (tmp_path / "run" / "checkpoints" / f"round-{done}").is_dir()

    again = start(tmp_path)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    calm = fedsim([*calm_words, str(tmp_path / "calm")])
    assert calm.returncode == 0, calm.stderr
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "calm")]
    assert results[0]["digest"] == results[1]["digest"]
    assert not Path("/tmp/ray-4711").exists()
