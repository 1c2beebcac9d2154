"""One migrated MLflow database per session, copied by every test that needs a store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recorded import make_run_dir

from fedsim.federation.tracker import FinalReport
from fedsim.tracking.calls import open_client
from fedsim.tracking.store import default_uri
from fedsim.types import LostClient, RoundResult


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow")
    open_client(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def store(template_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a fresh store; the working directory is elsewhere, so that nothing can land in it unseen."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(template_database, tmp_path / "mlflow.db")
    return default_uri(tmp_path, None)


@pytest.fixture
def run_dir(store: str, tmp_path: Path) -> Path:
    """A run directory that shall have an MLflow run in the store."""
    return make_run_dir(tmp_path / "run", store)


@pytest.fixture
def make_result() -> Callable[..., RoundResult]:
    def make(number: int, **metrics: float) -> RoundResult:
        return RoundResult(
            round_number=number,
            cohort_size=10,
            lost=(LostClient(3, "actor died"), LostClient(4, "actor died")),
            metrics={"eval/top1": 0.1 * number, "train/loss": 1.0 / number} | metrics,
            seconds={"train": 2.0, "refine": 0.5},
            bytes_up=1000 * number,
            bytes_down=50,
        )

    return make


@pytest.fixture
def make_report(tmp_path: Path) -> Callable[..., FinalReport]:
    def make(num_classes: int = 3, rows: int = 6, synthetic: int = 4, adapter_dir: Path | None = None) -> FinalReport:
        stream = np.random.default_rng(0)
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        (run_dir / "config.yaml").write_text("experiment: {name: x}\n")
        return FinalReport(
            run_dir=run_dir,
            class_names=tuple(f"class {number}" for number in range(num_classes)),
            confusion=stream.integers(0, 5, (num_classes, num_classes)),
            real=stream.normal(size=(num_classes * rows, 8)).astype(np.float32),
            real_label=np.repeat(np.arange(num_classes), rows),
            synthetic=stream.normal(size=(num_classes * synthetic, 8)).astype(np.float32),
            synthetic_label=np.repeat(np.arange(num_classes), synthetic),
            history=[
                {"round": 1, "metrics": {"eval/top1": None, "train/loss": float("nan")}, "seconds": {"train": 1.0}},
                {"round": 2, "metrics": {"eval/top1": 0.5, "eval/top1_averaged": 0.4}, "seconds": {"train": 1.0}},
            ],
            adapter_dir=adapter_dir,
        )

    return make
