"""Whether what a configuration asks for fits into the memory of this machine: estimated before it is allocated.

The estimates are of what is needed at the least, so that nothing that would have run is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping

from fedsim.config.method_checks import LEARNT
from fedsim.config.schema import Config
from fedsim.errors import ResourceError
from fedsim.machine import usable_memory
from fedsim.models.adapters import HeadSpec, num_weights

FLOAT = 4


def require_room(config: Config, specs: Mapping[str, HeadSpec], *, num_classes: int, num_recordings: int) -> None:
    """Refuse sizes that can't be held; a cluster that is joined may have more memory than there is here.

    Args:
        config: the experiment.
        specs: how each head's adapter is built.
        num_classes: C.
        num_recordings: N.

    Raises:
        ResourceError: one of them is larger than the memory that this process may use.
    """
    if config.resources.address is not None or os.environ.get("RAY_ADDRESS"):
        return
    there = usable_memory()
    for keys, size in wanted(config, specs, num_classes, num_recordings):
        if size > there:
            raise ResourceError(
                f"{keys}: this takes at least {size / 1e9:.4g} GB of memory, there are {there / 1e9:.4g} GB; "
                "choose smaller ones"
            )


def wanted(
    config: Config, specs: Mapping[str, HeadSpec], num_classes: int, num_recordings: int
) -> Iterator[tuple[str, float]]:
    """Keys with their values, and the bytes that they ask for at the least."""
    encoder, settings, federation = config.model.audio_encoder, config.feda2v, config.federation
    shapes, row = config.model.head_shapes(), encoder.segments * encoder.dim * FLOAT
    numbers = sum(math.prod(shape) for shape in shapes.values())
    yield f"model.heads {[list(shape) for shape in shapes.values()]}", num_classes * numbers * FLOAT
    weights = sum(num_weights(encoder.dim, spec) for spec in specs.values())
    # The server's, those of a client, and its gradients.
    yield f"model.adapters ({weights:,} weights)", 3 * weights * FLOAT
    at_once = min(encoder.batch_size, num_recordings)
    yield f"model.audio_encoder.segments {encoder.segments} x dim {encoder.dim}", at_once * row
    population = len(config.nodes) or federation.num_clients
    yield f"a cohort of {federation.cohort_size or population} clients", 8 * (federation.cohort_size or population)
    if federation.partition == "drawn" and not config.nodes and isinstance(config.resources.block_size, int):
        clients = min(config.resources.block_size, federation.cohort_size or federation.num_clients)
        drawn = clients * federation.examples_per_client * 8
        yield f"federation.examples_per_client {federation.examples_per_client} x {clients} clients of a block", drawn
    used = settings.use_generator and settings.global_model_train
    learnt = used and settings.generator_type in LEARNT
    if learnt or settings.clients_train != "none":
        hidden, latent = settings.generator_hidden_dim, settings.generator_latent_dim
        network = (hidden * hidden if learnt else 0) + hidden * (encoder.segments * encoder.dim + latent)
        yield f"feda2v.generator_hidden_dim {hidden}, generator_latent_dim {latent}", 3 * network * FLOAT
    if learnt:
        rows = settings.generator_rows_per_class
        yield f"feda2v.generator_rows_per_class {rows} for {num_classes} classes", rows * num_classes * row
    if used:
        rows = settings.synthetic_samples_per_class
        yield f"feda2v.synthetic_samples_per_class {rows} for {num_classes} classes", rows * num_classes * row
    if settings.adapter_aggregation_mode == "kd":
        rows = settings.kd_samples_per_class
        yield f"feda2v.kd_samples_per_class {rows} for {num_classes} classes", rows * num_classes * row
