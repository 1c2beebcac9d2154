"""The final adapter as an MLflow model, stored as this file and the adapter's folder (no pickle).

MLflow copies this file into the logged model and runs it when the model is loaded, so it stands alone: it imports only
what the model's requirements install. Legend for shapes: B rows, S segments, D width of an audio embedding.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel


class AdapterModel(PythonModel):  # type: ignore[misc]  # mlflow is not followed by the type checker
    """Audio embeddings in, prompt embeddings out."""

    def load_context(self, context: Any) -> None:
        """Open the adapter's folder."""
        from fedsim import load_adapter

        self.adapter = load_adapter(context.artifacts["adapter"])

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Prompt embeddings of audio embeddings.

        Args:
            context: MLflow's, not used.
            model_input: audio embeddings [B, S, D], or flattened [B, S * D] as an array or a table.
            params: MLflow's, not used.

        Returns:
            head -> prompt embeddings [B, *shape], float32.
        """
        rows = np.array(model_input, dtype=np.float32).reshape(-1, *self.adapter.input_shape)
        with torch.no_grad():
            return {head: output.cpu().numpy() for head, output in self.adapter(torch.from_numpy(rows)).items()}


mlflow.models.set_model(AdapterModel())
