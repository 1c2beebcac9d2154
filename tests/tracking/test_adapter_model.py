from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from recorded import make_run_dir, recorded

import fedsim
from fedsim.models.adapters import HeadSpec, make_adapter
from fedsim.models.saved import save_adapter
from fedsim.tracking import MlflowTracker, RunHandle, create_run
from fedsim.tracking.adapter_model import log_adapter_model
from fedsim.tracking.calls import open_client


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    shapes = {"clip": (6,), "t5": (3, 4)}
    specs = {head: HeadSpec("mlp", shape, hidden=(5,), width=4, num_heads=1) for head, shape in shapes.items()}
    adapter = make_adapter(
        (2, 8), specs, centre={head: torch.zeros(shape) for head, shape in shapes.items()},
        scale=dict.fromkeys(shapes, 1.0),
    )  # fmt: skip
    save_adapter(tmp_path / "adapter", adapter, adapter.init(0), info={})
    return tmp_path / "adapter"


@pytest.fixture
def handle(store: str) -> RunHandle:
    return create_run(store, experiment="e", run_name="r", params={}, tags={})


@pytest.fixture
def tracking_uri(store: str) -> object:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    yield store
    mlflow.set_tracking_uri(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of SQLAlchemy
def test_the_logged_model_computes_what_the_adapter_does(
    handle: RunHandle, adapter_dir: Path, tracking_uri: str
) -> None:
    address = log_adapter_model(handle, adapter_dir)
    model = mlflow.pyfunc.load_model(address)
    rows = np.random.default_rng(0).normal(size=(5, 2, 8)).astype(np.float32)
    expected = fedsim.load_adapter(adapter_dir)(torch.from_numpy(rows))
    table = pd.DataFrame({"embedding": list(rows.reshape(5, 16))})
    flat = model.unwrap_python_model().predict(None, rows.reshape(5, 16))
    for outputs in (model.predict(rows), model.predict(table), flat):
        assert {head: value.shape for head, value in outputs.items()} == {"clip": (5, 6), "t5": (5, 3, 4)}
        for head, value in outputs.items():
            np.testing.assert_array_equal(value, expected[head].numpy())
    with pytest.raises(Exception, match="shape"):
        model.predict(rows[:, :, :7])


def test_the_model_belongs_to_the_run_has_a_signature_and_no_pickle(
    handle: RunHandle, adapter_dir: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    log_adapter_model(handle, adapter_dir, step=4)
    assert time.monotonic() - start < 10
    client = open_client(handle.uri)
    [model] = client.search_logged_models([handle.experiment_id])
    assert (model.name, model.source_run_id, str(model.status)) == ("adapter", handle.run_id, "READY")
    assert [(out.model_id, out.step) for out in client.get_run(handle.run_id).outputs.model_outputs] == [
        (model.model_id, 4)
    ]
    folder = Path(model.artifact_location.removeprefix("file://"))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "pyfunc_model.py", "artifacts/adapter/adapter.safetensors"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pt", ".pth", ".pickle"))]
    assert mlflow.models.Model.load(str(folder)).signature.inputs.inputs[0].shape == (-1, 2, 8)
    assert "safetensors==" in (folder / "requirements.txt").read_text()


def test_logging_the_model_is_quiet_and_names_the_version_of_fedsim(handle: RunHandle, adapter_dir: Path) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("mlflow").addHandler(handler)
    try:
        log_adapter_model(handle, adapter_dir)
    finally:
        logging.getLogger("mlflow").removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    [model] = open_client(handle.uri).search_logged_models([handle.experiment_id])
    folder = Path(model.artifact_location.removeprefix("file://"))
    assert f"fedsim-a2v=={fedsim.__version__}" in (folder / "requirements.txt").read_text()


def test_no_active_run_or_tracking_address_is_left_behind(handle: RunHandle, adapter_dir: Path) -> None:
    before = mlflow.get_tracking_uri()
    log_adapter_model(handle, adapter_dir)
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == before
    assert list(Path.cwd().iterdir()) == []


def test_a_second_attempt_goes_on_with_the_model_of_the_first(handle: RunHandle, adapter_dir: Path) -> None:
    client = open_client(handle.uri)
    begun = client.create_logged_model(handle.experiment_id, "adapter", handle.run_id)  # and then the server went away
    for _ in range(2):
        assert log_adapter_model(handle, adapter_dir, step=4) == f"models:/{begun.model_id}"
    [model] = client.search_logged_models([handle.experiment_id])
    assert str(model.status) == "READY"
    assert len(client.get_run(handle.run_id).outputs.model_outputs) == 1


def test_the_record_carries_the_adapter_and_a_damaged_one_stops_nothing(
    run_dir: Path, adapter_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(adapter_dir, run_dir / "adapter")
    tracker = MlflowTracker(run_dir)
    assert tracker.finish("FINISHED", {}, {}) is None
    assert [record.getMessage() for record in caplog.records if record.name.startswith("fedsim")] == []
    experiment = recorded(run_dir).info.experiment_id
    [model] = open_client(tracker.uri).search_logged_models([experiment])
    assert str(model.status) == "READY"
    (adapter_dir / "adapter.safetensors").unlink()
    damaged = make_run_dir(run_dir.with_name("damaged"), tracker.uri)
    shutil.copytree(adapter_dir, damaged / "adapter")
    assert MlflowTracker(damaged).finish("FINISHED", {}, {}) is None
    assert "the adapter can't be logged as a model" in caplog.text
    assert recorded(damaged).info.status == "FINISHED"
