"""The environment of all tests, set before anything of fedsim, Ray, MLflow or transformers is imported."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_CACHE = tempfile.mkdtemp(prefix="fedsim-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

os.environ |= {
    "RAY_AUTH_MODE": "disabled",  # else the first ray.init writes a token into the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "XDG_CACHE_HOME": _CACHE,
}
_DATA_BESIDE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "data"
if _DATA_BESIDE_CHECKOUT.is_dir():
    os.environ.setdefault("FEDSIM_DATA", str(_DATA_BESIDE_CHECKOUT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data (esc10, yamnet, text_minilm); tests that need it skip without it."""
    folder = os.environ.get("FEDSIM_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set FEDSIM_DATA to a folder that holds esc10, yamnet and text_minilm")
    return Path(folder)


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    """The command line takes over fedsim's log records and Python's warnings; no test begins with what another left."""
    logger = logging.getLogger("fedsim")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield
    logging.captureWarnings(False)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data sets but those made here, and no log on the screen."""
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    logging.getLogger("fedsim").setLevel(logging.CRITICAL + 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers a file's tests stay together, for its fixtures; so do all of Ray, for its private one."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "ray" if item.get_closest_marker("ray") else str(item.path)
            item.add_marker(pytest.mark.xdist_group(group))
