"""Adapters on disk: a folder with adapter.safetensors, constants.safetensors, config.json and a README model card."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.adapters import Adapter, HeadSpec, make_adapter, stack
from fedsim.models.guarded_files import check_seal, read_json, read_tensors, sealed
from fedsim.types import AdapterState

FORMAT = 1


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors' bytes (float32, little-endian, contiguous) in name order."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from a folder; call it on audio embeddings.

    Attributes:
        adapter: the adapter.
        state: its tensors; names under "encoder." are audio-encoder layers that were trained with it.
        info: the rest of config.json: encoders, classes, digest.
    """

    adapter: Adapter
    state: AdapterState
    info: Mapping[str, Any]

    @property
    def input_shape(self) -> tuple[int, int]:
        """(S, D) of the audio embeddings it takes."""
        return self.adapter.input_shape

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """Output shape by head."""
        return {head: spec.shape for head, spec in self.adapter.specs.items()}

    def __call__(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Audio embeddings [B, S, D] -> head -> prompt embeddings [B, *shape].

        Raises:
            ModelError: another segment count or width.
        """
        with torch.no_grad():
            outputs = self.adapter.forward(stack(self.state), embeddings.unsqueeze(0))
        return {head: output[0] for head, output in outputs.items()}


def save_adapter(folder: Path, adapter: Adapter, state: AdapterState, *, info: Mapping[str, Any]) -> None:
    """Write an adapter folder; files are replaced one by one, each atomically.

    Args:
        folder: made if missing.
        adapter: the adapter.
        state: its tensors.
        info: JSON values that go into config.json, e.g. encoders and class names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **info,
        "format": FORMAT,
        "input_shape": list(adapter.input_shape),
        "heads": {head: asdict(spec) for head, spec in adapter.specs.items()},
        "scale": dict(adapter.scale),
        "digest": digest(state),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    constants = {head: tensor.cpu().contiguous() for head, tensor in adapter.centre.items()}
    for name, table in (("adapter", tensors), ("constants", constants)):
        partial = folder / f".{name}.safetensors.partial"
        save_file(table, partial)
        os.replace(partial, folder / f"{name}.safetensors")
    config["sha256"] = {name: _sha256(folder / f"{name}.safetensors") for name in ("adapter", "constants")}
    _write_text(folder / "config.json", json.dumps(sealed(config), indent=2) + "\n")
    _write_text(folder / "README.md", _model_card(config, sum(t.numel() for t in tensors.values())))


def load_adapter(path: str | Path) -> SavedAdapter:
    """Open an adapter folder written by a run.

    Raises:
        ModelError: a file is missing, damaged, or of a newer format.
    """
    folder = Path(path)
    try:
        config = read_json(folder / "config.json")
        state, centre = (read_tensors(folder / f"{name}.safetensors") for name in ("adapter", "constants"))
        if config["format"] != FORMAT:
            raise ModelError(f"{folder}: adapter format {config['format']}, this fedsim reads format {FORMAT}")
        check_seal(config)
        expected = config["digest"]
        for name in ("adapter", "constants"):
            written = config.get("sha256", {}).get(name)  # an earlier fedsim wrote none
            if written not in (None, _sha256(folder / f"{name}.safetensors")):
                raise _damaged(folder, name)
        specs = {
            head: HeadSpec(**{**spec, "shape": tuple(spec["shape"]), "hidden": tuple(spec["hidden"])})
            for head, spec in config["heads"].items()
        }
        input_shape = (int(config["input_shape"][0]), int(config["input_shape"][1]))
        scale = {head: float(config["scale"][head]) for head in specs}
        adapter = make_adapter(input_shape, specs, centre=centre, scale=scale)
        if expected != digest(state):
            raise _damaged(folder, "adapter")
        wanted = {name: tensor.shape for name, tensor in adapter.init(0).items()}
        found = {name: tensor.shape for name, tensor in state.items() if not name.startswith("encoder.")}
        if wanted != found:
            raise ValueError("its tensors aren't those of its heads")
    # Sizes that no tensor can have are errors of torch.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder} is not a readable adapter folder ({type(error).__name__}: {reason})") from error
    return SavedAdapter(adapter, state, config)


def _damaged(folder: Path, name: str) -> ModelError:
    return ModelError(f"{folder}/{name}.safetensors doesn't match the digest in config.json: the file is damaged")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _model_card(config: Mapping[str, Any], num_parameters: int) -> str:
    heads = "\n".join(
        f"- `{head}`: {spec['preset']}, output {list(spec['shape'])}" for head, spec in config["heads"].items()
    )
    return f"""---
library_name: fedsim-a2v
tags: [audio-to-visual, federated-learning, adapter]
---
# {config.get("name", "audio-to-visual adapter")}

Maps audio embeddings {config["input_shape"]} (segments, width) to prompt embeddings. {num_parameters:,} parameters.

{heads}

- audio encoder: {config.get("audio_encoder", "unknown")}
- text targets: {config.get("text_encoder", "unknown")}
- classes: {", ".join(config.get("class_names", []))}
- held-out top-1: {config.get("top1", "not evaluated")}
- digest: `{config["digest"]}`

```python
import fedsim, torch
adapter = fedsim.load_adapter("this/folder")
prompts = adapter(torch.zeros(1, *adapter.input_shape))   # head -> [1, *shape]
```
"""
