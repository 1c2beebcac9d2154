"""One private Ray for all tests of this folder, with logical GPUs, and one prepared federation."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "federation"))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from processes import wait_for
from worlds import SERVER_STEP, tiny_config

from fedsim.federation.setup import Setup, prepare


@pytest.fixture(scope="session")
def setup() -> Setup:
    """Seven clients with unequal numbers of recordings, VAE and refinement on."""
    return prepare(tiny_config(*SERVER_STEP))


@pytest.fixture
def cluster(private_ray) -> None:
    """The session's Ray, with everything that earlier tests held given back."""
    wait_for(cpus=4, gpus=2)


@pytest.fixture(scope="session")
def private_ray() -> Iterator[None]:
    """A private Ray with 4 logical CPUs and 2 logical GPUs, whatever the machine has."""
    import ray

    assert not ray.is_initialized(), "another test left a Ray behind"
    folder = tempfile.mkdtemp(prefix="fs-", dir="/tmp")  # socket paths may have 107 characters
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
