"""A node that has neither this package nor the driver's files: a raylet in a mount namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clusters import MEMORY, ROOT, cluster_of, environment, fedsim

from fedsim.cluster import shipping

NAMESPACE = ["unshare", "--mount"] if hasattr(os, "geteuid") and os.geteuid() == 0 else ["unshare", "-r", "--mount"]
HIDE = 'mount -t tmpfs none "$HIDDEN" && mount -t tmpfs none "$PACKAGE" && exec "$@"'
SETTINGS = {
    "data.name": "synthetic",
    "data.clips_per_class": 8,
    "data.classes": "[dog, rain, sneezing, chainsaw]",
    "federation.num_clients": 7,
    "federation.global_rounds": 3,
    "model.heads": "{clip: [16]}",
    "model.audio_encoder.name": "logmel",
    "model.audio_encoder.segments": 4,
    "model.audio_encoder.dim": 32,
    "model.adapters": "{clip: {preset: mlp, hidden: [16]}}",
    "privacy.min_count": 1,
    "resources.block_size": 1,
    "tracking.enabled": "false",
}


def can_hide() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


def run(folder: Path, driver: Path, *words: str, **settings: object) -> subprocess.CompletedProcess[str]:
    words = ("run", "--output", str(folder), *words)
    sets = [word for key, value in (SETTINGS | settings).items() for word in ("--set", f"{key}={value}")]
    return fedsim([*words, *sets], XDG_CACHE_HOME=str(driver / "cache"))


@contextmanager
def strange_node(address: str, hidden: Path, own: Path) -> Iterator[None]:
    """Two CPUs that see neither the folder `hidden` nor this package, with another fedsim on the path, and a cache."""
    (own / "fedsim").mkdir(parents=True)
    (own / "fedsim" / "__init__.py").write_text("raise ImportError('this is another fedsim')\n")
    # With the head's address a driver could take it for its own node.
    command = ["ray", "start", "--address", address, "--node-ip-address", "127.0.0.2", "--num-cpus", "2", "--block"]
    command += ["--object-store-memory", str(MEMORY["object_store_memory"])]
    env = environment(
        HIDDEN=str(hidden), PACKAGE=str(ROOT / "fedsim"), PYTHONPATH=str(own), XDG_CACHE_HOME=str(own / "cache")
    )
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    words = [*NAMESPACE, "sh", "-c", HIDE, "sh", *command]
    with (own / "log").open("w") as log:
        node = subprocess.Popen(words, env=env, cwd=own, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + 60
        while "To terminate" not in (text := (own / "log").read_text()) and "--block" not in text:
            assert node.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.1)
        try:
            yield
        finally:
            node.terminate()
            node.wait(timeout=30)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos  # beside other clusters of this machine the driver may take another raylet for its own
@pytest.mark.skipif(not can_hide(), reason="needs a mount namespace (root, or user namespaces)")
def test_code_and_embeddings_reach_a_node_that_has_neither(tmp_path, monkeypatch):
    driver, own = tmp_path / "driver", tmp_path / "own"
    driver.mkdir()
    calm = run(driver / "calm", driver, **{"resources.client_actors": 0})
    assert calm.returncode == 0, calm.stderr
    with cluster_of() as cluster, strange_node(cluster.address, driver, own):
        there = run(driver / "there", driver, "--address", cluster.address)
        assert there.returncode == 0, there.stdout + there.stderr
        half = {"resources.server_cpus": 0.5, "resources.client_cpus": 0.5}
        refused = run(driver / "refused", driver, "--address", cluster.address, **half)
        other = own / "something_else"
        other.mkdir()
        (other / "__init__.py").write_text("")
        job = {"runtime_env": {"py_modules": [str(other)]}, "metadata": {}}
        monkeypatch.setenv(shipping.JOB_ENVIRONMENT, json.dumps(job))
        bare = run(driver / "bare", driver, "--address", cluster.address)
    digests = [json.loads((driver / name / "result.json").read_text())["digest"] for name in ("calm", "there")]
    assert digests[0] == digests[1]
    assert "the embeddings aren't on node" in there.stdout + there.stderr
    kept = [path.name for path in (own / "cache" / "fedsim").iterdir() if path.is_dir()]
    assert kept == [path.name for path in (driver / "cache" / "fedsim").iterdir() if path.is_dir()]
    assert refused.returncode == 2
    last = (refused.stdout + refused.stderr).strip().splitlines()[-1]
    assert f"doesn't see the run directory {driver / 'refused'}" in last
    assert "Traceback" not in refused.stdout + refused.stderr
    # Without what the driver ships the node has nothing to run: the test would see it.
    assert bare.returncode != 0
    assert "this is another fedsim" in bare.stdout + bare.stderr


def test_a_job_that_brings_modules_is_left_alone(monkeypatch):
    monkeypatch.delenv(shipping.JOB_ENVIRONMENT, raising=False)
    (shipped,) = shipping.code_for_nodes()["py_modules"]
    assert (Path(shipped) / "cluster" / "shipping.py").is_file()
    monkeypatch.setenv(shipping.JOB_ENVIRONMENT, json.dumps({"runtime_env": {"working_dir": "gcs://x.zip"}}))
    assert shipping.code_for_nodes()["py_modules"] == [shipped]
    monkeypatch.setenv(shipping.JOB_ENVIRONMENT, json.dumps({"runtime_env": {"py_modules": ["gcs://y.zip"]}}))
    assert shipping.code_for_nodes() == {}


def test_a_node_keeps_what_it_was_sent_under_the_same_name(tmp_path, setup):
    from dataclasses import replace

    from worlds import tiny_config

    from fedsim.data.store import open_store

    away = replace(
        setup,
        store_path=tmp_path / "elsewhere" / setup.store_path.name,
        config=tiny_config(f"data.cache_dir={tmp_path / 'own'}"),
    )
    assert shipping.with_store_here(away) is None
    here = shipping.keep_store(away, shipping.pack_store(setup))
    assert here.store_path == tmp_path / "own" / setup.store_path.name
    assert (open_store(here.store_path).rows == open_store(setup.store_path).rows).all()
    assert shipping.with_store_here(away).store_path == here.store_path
