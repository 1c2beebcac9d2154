"""What computes, made from what was told: adapter, loss, client model and the open store, on one device.

Every actor builds the same parts from the same `Setup`.

Legend: C classes, S segments, D audio embedding width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.client_model import ENCODER, AdapterModel, ClientModel, EncoderModel
from fedsim.algorithms.objective import Objective, make_objective
from fedsim.data.store import Store, open_store
from fedsim.federation.setup import Setup, head_specs
from fedsim.models.adapters import Adapter, make_adapter
from fedsim.models.encoders import make_audio_encoder, require_ast
from fedsim.types import AdapterState

log = logging.getLogger(__name__)
CPU_TABLE_BYTES = 2**30
"""Larger stores are gathered ahead, in the background, so that training doesn't wait for the disk."""


@dataclass(frozen=True)
class Table:
    """The whole store where it is trained on: inputs [N, ...], lengths [N], classes [N]."""

    inputs: Tensor
    lengths: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Parts:
    """What computes, on one device: adapter, loss, client model and the open store.

    `table` is None when the store is too large for the device: then rows are gathered block by block.
    """

    adapter: Adapter
    objective: Objective
    model: ClientModel
    encoder_state: AdapterState
    store: Store
    table: Table | None
    device: torch.device


def build_parts(setup: Setup, device: torch.device) -> Parts:
    """Make what computes from what was told; the same on every actor."""
    config = setup.config
    targets = {head: torch.from_numpy(np.array(table)) for head, table in setup.targets.items()}
    objective = make_objective(
        targets,
        contrastive_weight=config.training.contrastive_weight,
        temperature=config.training.contrastive_temperature,
        cosine_weight=config.training.cosine_weight,
    ).to(device)
    encoder = config.model.audio_encoder
    adapter = make_adapter(
        (encoder.segments, encoder.dim),
        head_specs(config),
        centre=objective.centre,
        scale={head: weight**-0.5 for head, weight in objective.weight.items()},
    ).to(device)
    model: ClientModel = AdapterModel(adapter)
    encoder_state: AdapterState = {}
    if encoder.trainable != "none":
        ast = require_ast(
            make_audio_encoder(
                encoder.name,
                path=encoder.path,
                revision=encoder.revision,
                segments=encoder.segments,
                dim=encoder.dim,
                device=str(device),
            ),
            encoder.name,
        )
        encoder_state = {ENCODER + name: t.to(device) for name, t in ast.trainable_state(encoder.trainable).items()}
        model = EncoderModel(adapter, ast.forward)
    store = open_store(setup.store_path)
    return Parts(adapter, objective, model, encoder_state, store, _table(store, setup, device), device)


def _table(store: Store, setup: Setup, device: torch.device) -> Table | None:
    """The store on the device; on the CPU its own pages, which all processes of a machine share."""
    room = CPU_TABLE_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 4
    if store.rows.nbytes > room:
        log.info("embedding store of %d MB: rows are gathered block by block", store.rows.nbytes >> 20)
        return None
    # Copy on write: torch wants writable memory, but nothing is ever written.
    inputs = np.load(store.path / "rows.npy", mmap_mode="c", allow_pickle=False)
    return Table(
        torch.from_numpy(inputs).to(device),
        torch.from_numpy(np.array(store.lengths)).to(device),
        torch.from_numpy(np.array(setup.labels)).to(device),
    )


def rows_of(parts: Parts, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs [n, ...] and lengths [n] of rows of the store, copied onto the device."""
    inputs = torch.from_numpy(np.array(parts.store.rows[rows])).to(parts.device)
    return inputs, torch.from_numpy(np.array(parts.store.lengths[rows])).to(parts.device)


def choose_device(gpus: float) -> torch.device:
    """CUDA when GPUs were asked for and there are any, else the CPU."""
    return torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")


def adapter_part(state: AdapterState) -> AdapterState:
    """The tensors of a state that belong to the adapters, not to the audio encoder."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(ENCODER)}


def initial_state(setup: Setup, parts: Parts) -> AdapterState:
    """The global trainable tensors before round 1."""
    fresh = {name: t.to(parts.device) for name, t in parts.adapter.init(setup.config.experiment.seed).items()}
    return fresh | parts.encoder_state
