"""Logs the final adapter as an MLflow model that `mlflow.pyfunc.load_model` opens.

`mlflow.pyfunc.log_model` would log to the process's active run; the same steps by `MlflowClient` hit the given run and
leave no state behind. Requirements are named here and the signature is the adapter's own: MLflow would find out both by
loading the model and predicting, which takes ten seconds and more.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedsim import __version__
from fedsim.tracking.calls import open_client, patience
from fedsim.tracking.store import RunHandle

REQUIREMENTS = ("fedsim-a2v", "torch", "safetensors", "numpy")


def log_adapter_model(handle: RunHandle, adapter_dir: Path, *, name: str = "adapter", step: int = 0) -> str:
    """Log the adapter of a run as a pyfunc model with a signature; again after a failure goes on with the same model.

    Args:
        handle: the run.
        adapter_dir: folder that `fedsim.load_adapter` opens.
        name: name of the model.
        step: round the adapter belongs to.

    Returns:
        Address of the model, `models:/<id>`; `mlflow.pyfunc.load_model` opens it once MLflow's tracking URI is set to
        `handle.uri`.

    Raises:
        ModelError: the folder holds no adapter.
    """
    from fedsim.models.saved import load_adapter

    adapter = load_adapter(adapter_dir)
    client = open_client(handle.uri)
    with patience(), tempfile.TemporaryDirectory() as folder:
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model
        from mlflow.pyfunc import save_model

        model = _made(client, handle, name)
        if str(model.status) == "READY":
            return f"models:/{model.model_id}"
        save_model(
            path=f"{folder}/model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"adapter": str(adapter_dir)},
            signature=_signature(adapter.input_shape, adapter.heads),
            pip_requirements=[_requirement(package) for package in REQUIREMENTS],
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                run_id=handle.run_id,
                model_uuid=model.model_id,
                model_id=model.model_id,
            ),
        )
        client.log_model_artifacts(model.model_id, f"{folder}/model")
        outputs = client.get_run(handle.run_id).outputs
        if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else ())]:
            client.log_outputs(handle.run_id, models=[LoggedModelOutput(model.model_id, step=step)])
        client.finalize_logged_model(model.model_id, "READY")
    return f"models:/{model.model_id}"


def _made(client: Any, handle: RunHandle, name: str) -> Any:
    """The run's model of this name: made now, or by an earlier call that got no further."""
    models = client.search_logged_models([handle.experiment_id], filter_string=f"source_run_id = '{handle.run_id}'")
    made = [model for model in models if model.name == name]
    return made[0] if made else client.create_logged_model(handle.experiment_id, name, handle.run_id)


def _signature(input_shape: tuple[int, ...], heads: dict[str, tuple[int, ...]]) -> Any:
    """[B, S, D] float32 -> head: [B, *shape] float32."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    kind = np.dtype(np.float32)
    return ModelSignature(
        inputs=Schema([TensorSpec(kind, (-1, *input_shape))]),
        outputs=Schema([TensorSpec(kind, (-1, *shape), name=head) for head, shape in heads.items()]),
    )


def _requirement(package: str) -> str:
    """`package==version` of what is installed, without a local build label such as +cpu."""
    try:
        return f"{package}=={version(package).partition('+')[0]}"
    except PackageNotFoundError:  # fedsim run from its source tree
        return f"{package}=={__version__}"
