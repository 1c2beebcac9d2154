"""The server: one federated round after another.

`Server.run_round` is the round: sample, train locally, open the sums, aggregate, fit the generator, distil, refine,
evaluate. It knows nothing of Ray or MLflow; the pool that trains blocks and the tracker that records numbers are handed
in. Updates are put together as they arrive (see `gathering`): what the server holds doesn't grow with the clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedsim.algorithms.aggregation import make_aggregator
from fedsim.algorithms.batches import padding_share
from fedsim.algorithms.client_generator import network_of
from fedsim.algorithms.distillation import client_states
from fedsim.algorithms.sampling import order_cohort
from fedsim.algorithms.server_optimizer import make_server_optimizer
from fedsim.federation.blocks import make_blocks, without
from fedsim.federation.casualties import Casualties
from fedsim.federation.checkpoint import ServerState, save_checkpoint
from fedsim.federation.client_guides import ClientGuides
from fedsim.federation.client_store import ClientStore
from fedsim.federation.client_sums import ClientSums
from fedsim.federation.clock import RoundClock, Status
from fedsim.federation.gathering import Joining, Numbers, make_joining
from fedsim.federation.held_out import HeldOut
from fedsim.federation.kept import KeptByClients
from fedsim.federation.messages import Expected, check_update, state_bytes
from fedsim.federation.parts import Parts, build_parts, initial_state
from fedsim.federation.pool import ClientPool, LostBlock
from fedsim.federation.privacy import Receiving
from fedsim.federation.quorum import Quorum
from fedsim.federation.run_directory import temporary_folder
from fedsim.federation.saving_generators import save_generators
from fedsim.federation.server_step import ServerStep
from fedsim.federation.setup import Setup
from fedsim.seeding import rng
from fedsim.types import AdapterState, Block, Broadcast, Fault, Learnt, RoundResult


class Server:
    """Holds the global state and runs rounds.

    Args:
        setup: what the driver prepared.
        pool: trains blocks.
        device: where the server computes.
        state: where to go on from; None for a new run.
        status: told of every change of phase and of every finished block.
        run_dir: receives what clients keep between rounds (`clients/`) and, while a round lasts, updates that don't go
            into a sum; None: a temporary folder.

    Raises:
        ConfigError: the aggregator needs more clients than a cohort has.
        CheckpointError: what clients keep according to `state` is missing.
    """

    def __init__(
        self,
        setup: Setup,
        pool: ClientPool,
        *,
        device: torch.device,
        state: ServerState | None = None,
        status: Status = lambda _: None,
        run_dir: Path | None = None,
    ) -> None:
        self.setup, self.config, self.pool, self.device = setup, setup.config, pool, device
        self.parts: Parts = build_parts(setup, device)
        cohort, population = self._cohort_size(), setup.partition.num_clients
        self._receiving = Receiving(self.config, self.parts, num_clients=population, cohort_size=cohort)
        self._client_sums = ClientSums(self.config, int(np.prod(self.parts.adapter.input_shape)))
        self.state = state or ServerState(0, initial_state(setup, self.parts))
        settings = self.config.feda2v
        self.aggregator = make_aggregator(
            settings.adapter_aggregation_mode,
            trim_share=settings.trim_share,
            byzantine_clients=settings.byzantine_clients,
        )
        self.optimizer = make_server_optimizer(
            settings.server_optimizer,
            learning_rate=settings.server_learning_rate,
            momentum=settings.server_momentum,
            adaptivity=settings.server_adaptivity,
        )
        self._guides = ClientGuides(self.config, self.aggregator, setup.partition, len(setup.class_names))
        self._quorum = Quorum(self.config, self.aggregator, cohort_size=cohort)
        self._folder = run_dir or temporary_folder(self)
        self._expected = Expected(
            adapter={name: tuple(tensor.shape) for name, tensor in self.state.adapter.items()},
            needs_updates=self.aggregator.needs_updates,
            num_classes=len(setup.class_names),
            audio_shape=tuple(self.parts.adapter.input_shape),
            head_shapes={head: tuple(spec.shape) for head, spec in self.parts.adapter.specs.items()},
            min_count=self.config.privacy.min_count,
            keeps_variates=self.config.training.control_variates,
            class_sums=self._receiving.wanted,
            masked=self.config.privacy.secure_sums,
            own_generators=settings.clients_train == "own",
        )
        variates = self.config.training.control_variates
        self.kept = KeptByClients(
            self._folder,
            self.state,
            own=self._expected.row_size if self.aggregator.keeps_clients_apart or variates else 0,
            network=self._client_sums.network_size if self._expected.own_generators else 0,
            variates=variates,
        )
        if state is None:
            self.state = self.kept.pretrained(self.state, setup)
        self._step = ServerStep(setup, self.parts, self.state.generator)
        self.held_out = HeldOut(setup, self.parts)
        self._status = status

    def run_round(self) -> RoundResult:
        """Sample, train locally, aggregate, generate, refine, evaluate; the state moves on by one round."""
        # One thread: a sum's order, and so its bits, would otherwise depend on the number of cores.
        torch.set_num_threads(1)
        state = self.state
        clock = RoundClock(state.round_number + 1, self._status)
        cohort = self._sample_cohort(clock.round_number)
        blocks = make_blocks(cohort, self.config.resources.clients_per_block)
        ring = self._receiving.ring(cohort, clock.round_number)
        broadcast = replace(self._broadcast(clock.round_number), ring=ring)
        numbers = self._numbers(broadcast, len(cohort))
        with closing(self._joining(len(cohort))) as joining:
            with clock("train"):
                gone = self._train(blocks, broadcast, joining, numbers, clock)
            with clock("aggregate"):
                joined, sums = self._receiving.read(joining.joined(), numbers.sums(), clock.round_number)
                averaged = self.aggregator.step(state.adapter, joined)
                averaged, moments = self.optimizer.step(state.adapter, averaged, state.server_optimizer)
                learnt = self._receiving.learn(state.learnt, self._learn(sums, broadcast), sums)
                stats = self._receiving.stats(learnt, sums) or numbers.stats()
                guides = self._guides.learn(broadcast.extra, sums, stats)
            teachers = client_states(joined, state.adapter)
            stepped = self._step.run(averaged, stats, state.buffer, learnt, clock, teachers)
        metrics = stepped.metrics | numbers.metrics() | self._receiving.metrics(clock.round_number)
        if broadcast.evaluate_clients:
            metrics |= self.held_out.measure(
                averaged, stepped.adapter, cohort=cohort, step=self._step, buffer=stepped.buffer, clock=clock
            )
        metrics["clients/per_second"] = numbers.answered / clock.seconds["train"]
        metrics["clients/padding"] = padding_share(
            self.setup.partition.counts_of(cohort), self.config.training.batch_size
        )
        up, down = self._bytes(cohort, broadcast, numbers)
        generator = self._step.generator_state()
        self.state = self.kept.commit(
            ServerState(
                clock.round_number,
                stepped.adapter,
                generator,
                stepped.buffer,
                learnt=learnt,
                server_optimizer=moments,
                guides=guides,
            )
        )
        faults = tuple(gone.faults)
        return RoundResult(clock.round_number, len(cohort), gone.lost, metrics, clock.seconds, up, down, faults)

    def _sample_cohort(self, round_number: int) -> np.ndarray:
        """The cohort in the order that fixes blocks and sums."""
        partition = self.setup.partition
        stream = rng(self.config.experiment.seed, "cohort", round_number)
        cohort = self._receiving.sample_cohort(stream)
        return order_cohort(cohort, partition.counts_of(cohort), batch_size=self.config.training.batch_size)

    def _cohort_size(self) -> int:
        population = self.setup.partition.num_clients
        return min(self.config.federation.cohort_size or population, population)

    def _learn(self, sums: AdapterState, broadcast: Broadcast) -> Learnt:
        """Earlier rounds are remembered by the share of the population that a cohort leaves out."""
        absent = 1.0 - self._cohort_size() / self.setup.partition.num_clients
        absent = 1.0 if self._receiving.adds_noise else absent
        frozen = self.config.model.audio_encoder.trainable == "none"
        return self._client_sums.learn(self.state.learnt, sums, broadcast.extra, memory=absent if frozen else 0.0)

    def _broadcast(self, round_number: int) -> Broadcast:
        """What clients are told. Those that keep their own adapters never see the server's: newcomers start alike."""
        every, last = self.config.experiment.evaluate_every, self.config.federation.global_rounds
        due = round_number % every == 0 or round_number == last
        apart = self.aggregator.keeps_clients_apart
        sent = initial_state(self.setup, self.parts) if apart else self.state.adapter
        extra = self._client_sums.extra(self.state.learnt, round_number) | self._guides.extra(self.state.guides, sent)
        return Broadcast(round_number, self.config.experiment.seed, sent, due and apart, due, extra)

    def _numbers(self, broadcast: Broadcast, num_clients: int) -> Numbers:
        return Numbers(
            broadcast,
            num_clients=num_clients,
            block_size=self.config.resources.clients_per_block,
            statistics_rows=self.config.feda2v.statistics_rows,
        )

    def _joining(self, num_clients: int) -> Joining:
        return make_joining(
            self.aggregator,
            self.kept.own,
            folder=self._folder,
            num_clients=num_clients,
            row_size=self._expected.row_size,
            block_size=self.config.resources.clients_per_block,
        )

    def _train(
        self, blocks: Sequence[Block], broadcast: Broadcast, joining: Joining, numbers: Numbers, clock: RoundClock
    ) -> Casualties:
        """The only hop that carries weights: every block's update is checked and joined as it comes, or lost."""
        gone, total = Casualties(self.setup.client_name), sum(len(block.client_ids) for block in blocks)
        clock.clients(0, total)
        for answer in self.pool.train(self.kept.blocks(blocks, broadcast), broadcast):
            if isinstance(answer, Fault):
                gone.faults.append(answer)
                continue
            if isinstance(answer, LostBlock):
                gone.block(answer)
            else:
                gone.clients(answer)
            if isinstance(answer, LostBlock) or not len(answer.metrics.client):
                joining.lose(answer.index)
                numbers.lose(answer.index)
                continue
            block = blocks[answer.index]
            check_update(answer, without(block, answer.dropped), self._expected, broadcast)
            joining.add(answer, block)
            self.kept.add(answer)
            numbers.add(answer, block)
            clock.clients(numbers.answered, total)
        self._receiving.require_everyone(len(gone.lost), broadcast.round_number)
        self._quorum.require(numbers.answered, total, broadcast.round_number)
        return gone

    def _bytes(self, cohort: np.ndarray, broadcast: Broadcast, numbers: Numbers) -> tuple[int, int]:
        """What the cohort's clients would send and receive; those that keep their own tensors receive them once."""
        size, told = state_bytes(broadcast.adapter), state_bytes(broadcast.extra)
        up = numbers.stats_bytes + numbers.answered * state_bytes(numbers.sums())
        down = len(cohort) * (size + told)
        if self.aggregator.keeps_clients_apart:
            newcomers = int((self.state.clients.slots_of(cohort) < 0).sum())
            down -= (len(cohort) - newcomers) * size
        elif self.config.federation.local_epochs:  # who doesn't train has no change to send
            up += numbers.answered * size * (2 if self.config.privacy.secure_sums else 1)  # masked: 64 bits
        if self.kept.generators is not None:
            old = int((self.state.generators.slots_of(cohort) >= 0).sum())
            down -= old * state_bytes(network_of(broadcast.extra))
        return up, down

    def guarantee(self) -> dict[str, object]:
        """What is promised to clients about the rounds so far, for result.json."""
        return self._receiving.guarantee(self.state.round_number)

    def confusion(self) -> np.ndarray:
        """Counts [C, C] of the global adapter on the held-out recordings, rows true, columns predicted."""
        return self.held_out.confusion(self.state.adapter)

    def save(self, run_dir: Path, *, mlflow_run_id: str | None, state: ServerState | None = None) -> None:
        """Write a checkpoint, of the last round unless a state is given; a resume repeats the rest bit for bit.

        Raises:
            ValueError: clients keep their tensors in another run directory.
        """
        self.kept.flush(run_dir)
        state, fingerprint = state or self.state, self.setup.data_fingerprint
        save_checkpoint(run_dir, state, self.config, mlflow_run_id=mlflow_run_id, data_fingerprint=fingerprint)
        self.kept.pin(state)

    def save_generators(self, run_dir: Path) -> None:
        """Write clients' generators and class means (see `saved_generators`)."""
        held_out = self.held_out.embeddings(self.state.adapter)
        save_generators(run_dir, self.setup, self.parts, self.state, self.kept.generators, held_out)

    def close(self) -> None:
        """End the pool and close what clients keep."""
        self.pool.close()
        self.kept.close()

    @property
    def clients(self) -> ClientStore | None:
        """The adapters or control variates that clients keep, where they keep any."""
        return self.kept.own

    def sample_embeddings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For a plot: held-out audio embeddings [n, S * D], their classes, synthetic ones [m, S * D], their classes."""
        real, labels = self.held_out.embeddings(self.state.adapter)
        made_labels, made = self._step.samples(self.state.buffer, 20, self.state.round_number)
        return real.flatten(1).cpu().numpy(), labels.cpu().numpy(), made, made_labels
