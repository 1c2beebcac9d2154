"""`resources.block_size: auto` and `resources.client_actors: auto` made numbers, before a run starts.

The block size fixes the order of summation, so it is a function of the configuration alone; training one block then
shows that it fits, and how many actors are worth their start.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedsim.algorithms.aggregation import make_aggregator
from fedsim.algorithms.batches import num_batches
from fedsim.algorithms.sampling import order_cohort, sample_cohort
from fedsim.config import Config
from fedsim.config.schema import Resources
from fedsim.data.store import open_store
from fedsim.errors import ClientError
from fedsim.federation.blocks import BlockTrainer, make_blocks
from fedsim.federation.client_sums import ClientSums
from fedsim.federation.memory import out_of_memory
from fedsim.federation.parts import build_parts, choose_device, initial_state
from fedsim.federation.setup import Setup, head_specs
from fedsim.launch.signals import own_handlers
from fedsim.machine import whole_cores
from fedsim.models.adapters import make_adapter
from fedsim.models.encoders.threads import available_cores
from fedsim.seeding import rng
from fedsim.types import Block, Broadcast

log = logging.getLogger(__name__)

LEAST_CLIENTS, MOST_CLIENTS = 16, 2048
BLOCKS_WANTED, FEWEST_BLOCKS = 16, 2
BLOCK_FLOPS = 1e9
"""A block with less to compute costs more to hand out than to train; then blocks are made fewer."""
BUDGET_BYTES = 256 * 2**20
"""What the clients of a block may take; a constant, not what a machine has: the sums must not depend on it."""
RAY_START_S = 12.0
"""What Ray and its actors need until they train."""


@dataclass(frozen=True)
class Machine:
    """What there is for a run: this machine, or the cluster it joins."""

    cpus: float
    gpus: float


def choose_block_size(cohort: int, *, client_flops: float, client_bytes: float, budget: float = BUDGET_BYTES) -> int:
    """Clients of a block: a power of two, the same on every machine.

    About sixteen blocks in a cohort, so that actors can share them evenly; fewer and larger ones, but two, where a
    client has little to compute. At least 16 clients, or a quarter of a small cohort, and at most 2048; as few as the
    budget asks for.

    Args:
        cohort: clients of a round.
        client_flops: arithmetic of one client's local training.
        client_bytes: memory that every client of a block takes.
        budget: bytes for all clients of a block.
    """
    little = min(BLOCK_FLOPS / max(client_flops, 1.0), cohort / FEWEST_BLOCKS)
    least = min(LEAST_CLIENTS, max(cohort / 4, 1.0))
    wanted = min(max(cohort / BLOCKS_WANTED, little, least), MOST_CLIENTS)
    fitting = max(budget / max(client_bytes, 1.0), 1.0)
    return 1 << min(math.ceil(math.log2(wanted)), int(math.log2(fitting)))


def choose_actors(*, training_s: float, blocks: int, machine: Machine, resources: Resources) -> int:
    """Client actors: none where starting Ray takes longer than it saves, else as many as fit and find a block.

    Args:
        training_s: predicted seconds of local training in this process, of the whole run.
        blocks: blocks of a round.
        machine: CPUs and GPUs.
        resources: what one actor and the server take.
    """
    if training_s < RAY_START_S:
        return 0
    places: float = blocks
    if resources.client_cpus > 0:
        places = min(places, (machine.cpus - resources.server_cpus) / resources.client_cpus)
    if 0 < resources.client_gpus <= 1:
        on_each = int(1 / resources.client_gpus + 1e-6)
        whole = int(machine.gpus - resources.server_gpus + 1e-6)
        left = machine.gpus - resources.server_gpus - whole
        places = min(places, whole * on_each + int(left / resources.client_gpus + 1e-6))
    elif resources.client_gpus > 1:
        places = min(places, (machine.gpus - resources.server_gpus) / resources.client_gpus)
    # One actor would do no more than this process does without Ray.
    return int(places + 1e-6) if places >= 2 else 0


@dataclass(frozen=True)
class Measured:
    """One block, trained in this process.

    Attributes:
        clients: how many it had.
        seconds: its training, warmed up.
        share: its part of the round's batches.
        peak_bytes: most memory this process (or its GPU) has held.
        on_cpu: whether it was trained on the CPU.
    """

    clients: int
    seconds: float
    share: float
    peak_bytes: int
    on_cpu: bool


def settle(setup: Setup, *, concurrent: int = 1) -> Setup:
    """The setup with numbers in place of `auto`, and one line in the log that says why.

    Args:
        setup: what `prepare` made.
        concurrent: runs that share the machine at a time.

    Raises:
        ClientError: the measured block can't be trained.
        ResourceError: the cluster whose CPUs should be counted can't be reached.
    """
    resources = setup.config.resources
    size, actors, notes = resources.block_size, resources.client_actors, []
    if not isinstance(size, str) and not isinstance(actors, str):
        return setup
    cohort = _first_cohort(setup)
    if isinstance(size, str):
        flops, memory = _client_costs(setup, cohort)
        size = choose_block_size(len(cohort), client_flops=flops, client_bytes=memory)
        notes.append(f"auto: cohort of {len(cohort)}, {flops / 1e6:.3g} MFLOP and {_megabytes(memory)} a client")
    if isinstance(actors, str) or size > LEAST_CLIENTS:
        size, measured = _measure_fitting(setup, cohort, size, may_halve=resources.block_size == "auto")
        notes.append(
            f"a block of {measured.clients} took {measured.seconds:.2g} s, "
            f"memory peak of this process {_megabytes(measured.peak_bytes)}"
        )
        if isinstance(actors, str):
            actors, why = _settle_actors(setup.config, measured, -(-len(cohort) // size), concurrent)
            notes.append(why)
    log.info("resources: block_size %d, client_actors %d (%s)", size, actors, "; ".join(notes))
    settled = resources.model_copy(update={"block_size": size, "client_actors": actors})
    return replace(setup, config=setup.config.model_copy(update={"resources": settled}))


def _settle_actors(config: Config, measured: Measured, blocks: int, concurrent: int) -> tuple[int, str]:
    """The number of actors, and why."""
    whole = _machine(config)
    machine = Machine(whole.cpus / concurrent, whole.gpus / concurrent)
    # Without actors as many threads as cores train blocks.
    threads = min(config.resources.num_cpus or available_cores(), blocks) if measured.on_cpu else 1
    training_s = measured.seconds / measured.share / threads * config.federation.global_rounds
    actors = choose_actors(training_s=training_s, blocks=blocks, machine=machine, resources=config.resources)
    return actors, (
        f"auto: {training_s:.3g} s of local training in all without Ray, starting it takes {RAY_START_S:g} s, "
        f"{blocks} blocks a round, {machine.cpus:g} CPUs, {machine.gpus:g} GPUs"
    )


def _megabytes(count: float) -> str:
    return f"{count / 2**20:.3g} MB"


def _first_cohort(setup: Setup) -> np.ndarray:
    """The cohort of round 1, in order."""
    federation, population = setup.config.federation, setup.partition.num_clients
    stream = rng(setup.config.experiment.seed, "cohort", 1)
    cohort = sample_cohort(population, min(federation.cohort_size or population, population), stream)
    return order_cohort(cohort, setup.partition.counts_of(cohort), batch_size=setup.config.training.batch_size)


def _client_costs(setup: Setup, cohort: np.ndarray) -> tuple[float, float]:
    """Arithmetic of an average client's local training, and memory that grows with the clients of a block.

    Two operations per weight and row, forward and twice backward, at every segment; forward alone where clients don't
    train. Recordings of this block and the next, statistics, and flat updates grow with a block; weights and optimiser
    state don't, they live in stacks of a fixed size.
    """
    config, encoder = setup.config, setup.config.model.audio_encoder
    heads = config.model.head_shapes()
    centre = {head: torch.zeros(()).expand(shape) for head, shape in heads.items()}
    adapter = make_adapter((encoder.segments, encoder.dim), head_specs(config), centre=centre, scale={})
    parameters = sum(tensor.numel() for tensor in adapter.init(config.experiment.seed).values())
    examples = float(setup.partition.counts_of(cohort).mean())
    passes = 6.0 * config.federation.local_epochs or 2.0
    flops = passes * parameters * examples * encoder.segments
    numbers = 2.0 * examples * math.prod(open_store(setup.store_path).rows.shape[1:])
    if config.feda2v.global_model_train or config.training.prototype_weight:
        classes = min(len(setup.class_names), max(1.0, examples / config.privacy.min_count))
        outputs = sum(math.prod(shape) for shape in heads.values())
        numbers += 2.0 * classes * (2 * encoder.segments * encoder.dim + outputs)
    if make_aggregator(config.feda2v.adapter_aggregation_mode).needs_updates:
        numbers += 4.0 * parameters
    if config.training.control_variates:
        numbers += 4.0 * parameters
    if config.feda2v.clients_train == "own":
        numbers += 4.0 * ClientSums(config, encoder.segments * encoder.dim).network_size
    return flops, 4.0 * numbers


def _measure_fitting(setup: Setup, cohort: np.ndarray, size: int, *, may_halve: bool) -> tuple[int, Measured]:
    """Train a block of `size` clients, or of half as many until memory suffices."""
    while True:
        try:
            return size, measure_block(setup, cohort, size)
        except (MemoryError, RuntimeError, ClientError) as error:
            causes = (error, error.__cause__)
            if not may_halve or size == 1 or not any(out_of_memory(cause) for cause in causes):
                raise
        log.warning("out of memory with blocks of %d clients: resources.block_size is halved to %d", size, size // 2)
        size //= 2


def measure_block(setup: Setup, cohort: np.ndarray, size: int) -> Measured:
    """Train the middle block of an ordered cohort in this process, as an actor would; nothing of it is kept.

    A short one is trained twice, and the second time counts.
    """
    resources = setup.config.resources
    device = choose_device(resources.client_gpus if resources.client_gpus else resources.server_gpus)
    trainer = BlockTrainer(setup, device)
    blocks = make_blocks(cohort, size)
    block = blocks[(len(blocks) - 1) // 2]
    parts = build_parts(setup, device)
    broadcast = Broadcast(1, setup.config.experiment.seed, initial_state(setup, parts))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _timed(trainer, block, broadcast)
        if seconds < 1.0:
            seconds = _timed(trainer, block, broadcast)
    finally:
        torch.set_num_threads(threads)
    batch_size, counts_of = setup.config.training.batch_size, setup.partition.counts_of
    batches = [int(num_batches(counts_of(clients), batch_size).sum()) for clients in (block.client_ids, cohort)]
    return Measured(len(block.client_ids), seconds, batches[0] / batches[1], _peak_bytes(device), device.type == "cpu")


def _timed(trainer: BlockTrainer, block: Block, broadcast: Broadcast) -> float:
    start = time.perf_counter()
    trainer.train(block, broadcast)
    return time.perf_counter() - start


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return 0
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _machine(config: Config) -> Machine:
    """CPUs and GPUs of the Ray that is connected, of the cluster to be joined, or of this machine."""
    resources = config.resources
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if connected or resources.address or os.environ.get("RAY_ADDRESS"):
        return _cluster(resources)
    wants_gpus = max(resources.client_gpus, resources.server_gpus) > 0
    gpus = resources.num_gpus if resources.num_gpus is not None else torch.cuda.device_count() if wants_gpus else 0
    # OMP_NUM_THREADS speaks of threads, and an actor has one.
    return Machine(resources.num_cpus or whole_cores(), gpus)


def _cluster(resources: Resources) -> Machine:
    from fedsim.cluster.resources import cluster_resources, start_ray, stop_ray

    with own_handlers():
        started = start_ray(address=resources.address, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
    try:
        found = cluster_resources()
    finally:
        if started:
            stop_ray(started)
    return Machine(found["CPU"], found["GPU"])
