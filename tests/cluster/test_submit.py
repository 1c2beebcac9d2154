"""`scripts/cluster/submit.sh`: a real `ray job submit` to a real head with its dashboard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import ROOT, cluster_of, environment, fedsim
from test_slurm import CONFIG


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_a_submitted_run_ends_with_the_digest_of_the_run_here_and_is_resumed(tmp_path, monkeypatch):
    (tmp_path / "my.yaml").write_text(CONFIG)
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "fedsim").write_text(f'#!/bin/bash\nexec {sys.executable} -m fedsim "$@"\n')
    (scripts / "fedsim").chmod(0o755)
    path = os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])  # the entrypoint runs on the head, which has fedsim
    few = ["--set", "federation.global_rounds=2"]
    calm = fedsim(
        [
            "run",
            str(tmp_path / "my.yaml"),
            "--set",
            "resources.client_actors=0",
            *few,
            "--output",
            str(tmp_path / "calm"),
        ]
    )
    assert calm.returncode == 0, calm.stderr
    # The usual port of the agent, which starts jobs, is taken where another Ray runs on this machine.
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": 0}
    with cluster_of(head=head) as cluster:
        url = f"http://{cluster.head_node.webui_url}"
        words = [
            "bash",
            str(ROOT / "scripts/cluster/submit.sh"),
            str(tmp_path / "my.yaml"),
            str(tmp_path / "job"),
            *few,
        ]
        env = environment(RAY_API_SERVER_ADDRESS=url, PATH=path)
        end = time.monotonic() + 90  # until the head's agent, which starts jobs, has come up too
        job = subprocess.run(words, env=env, capture_output=True, text=True, timeout=150)
        while "No available agent" in job.stderr and time.monotonic() < end:
            time.sleep(2)
            job = subprocess.run(words, env=env, capture_output=True, text=True, timeout=150)
        assert job.returncode == 0, job.stdout + job.stderr
        again = subprocess.run(words, env=env, capture_output=True, text=True, timeout=150)
    digests = [json.loads((tmp_path / name / "result.json").read_text())["digest"] for name in ("calm", "job")]
    assert digests[0] == digests[1]
    assert "succeeded" in job.stdout + job.stderr
    # The finished run isn't run a second time.
    assert "round 1" not in again.stdout
    assert len((tmp_path / "job" / "metrics.jsonl").read_text().splitlines()) == 2
