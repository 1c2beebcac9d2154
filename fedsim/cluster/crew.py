"""The client actors of a pool: started, named, replaced when they die, and not again where they keep dying."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsim.cluster.faults import CREATION, WEATHER, kind_of, reason_of
from fedsim.cluster.resources import precedence
from fedsim.config.schema import NODE_LABEL
from fedsim.errors import FedsimError, ResourceError
from fedsim.types import Fault

log = logging.getLogger(__name__)
Supply = Callable[[], list[Any]]
MAX_FAILED_STARTS = 3


@dataclass(frozen=True)
class Post:
    """A place in the crew, for one actor at a time.

    Attributes:
        kind: name of its kind; with a number after it, the name of whoever is there.
        remote_class: the actor class; its `ready` says (node id, address, process id, whether it has its data).
        arguments: of its constructor.
        options: Ray's, of the actor; `label_selector` is what its node must have.
    """

    kind: str
    remote_class: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


@dataclass(eq=False)
class Worker:
    """A client actor and its calls, the oldest first: that one trains, the other waits.

    Attributes:
        actor: the handle.
        calls: what was sent by call.
        name: the same for all actors that replace each other.
        node_id, address, pid: where it lives.
        deaths: of this name's actors in a row, without a block in between.
        since: when the oldest call became it.
        replaces_s: when the one that it replaces died, on the clock `time.monotonic`; None for the first of its name.
        overdue: its block is with another actor too, and it gets no others.
    """

    actor: Any
    calls: dict[Any, Any] = field(default_factory=dict)
    name: str = ""
    node_id: str = ""
    address: str = ""
    pid: int = 0
    deaths: int = 0
    since: float = math.inf
    replaces_s: float | None = None
    overdue: bool = False

    @property
    def node(self) -> str:
        """Its node for people; "" where it isn't known."""
        return f"{self.address} ({self.node_id[:8]})" if self.node_id else ""

    def fault(self, kind: str, round_number: int, block: int | None, reason: str) -> Fault:
        """What happened to it."""
        actor = f"{self.name} (pid {self.pid})" if self.pid else self.name
        return Fault(kind, actor, self.node, block, round_number, reason)

    def answered(self, call: Any) -> float:
        """Take a call off; returns the seconds that it took as the oldest one."""
        del self.calls[call]
        before, self.since = self.since, time.monotonic()
        self.deaths, self.overdue = 0, False
        return self.since - before


class Crew:
    """Keeps an actor up at each post.

    Args:
        posts: where actors are wanted.
        supply: makes the message that brings its data to an actor that has none.
        max_deaths: an actor that dies so often in a row, without training a block in between, isn't started on the node
            of its last death again, and neither is any other.
    """

    def __init__(self, posts: Sequence[Post], *, supply: Supply, max_deaths: int) -> None:
        self._supply, self._max_deaths = supply, max_deaths
        self.workers: list[Worker] = []
        self.starting: dict[Any, Worker] = {}
        self._quarantined: set[str] = set()
        self._failed_starts = 0
        self._posts = {f"{post.kind}-{number}": post for number, post in enumerate(posts)}
        for name in sorted(self._posts, key=self._precedence):
            self._spawn(name, deaths=0)

    def __len__(self) -> int:
        return len(self.workers) + len(self.starting)

    def _precedence(self, name: str) -> tuple[bool, float, float]:
        options = self._posts[name].options
        return precedence(options["num_cpus"], options["num_gpus"], options.get("label_selector"))

    def _spawn(self, name: str, deaths: int, since: float | None = None) -> None:
        post = self._posts[name]
        options = dict(post.options)
        if self._quarantined:
            others = {NODE_LABEL: f"!in({','.join(sorted(self._quarantined))})"}
            options["label_selector"] = options.get("label_selector", {}) | others
        actor = post.remote_class.options(**options).remote(*post.arguments)
        self.starting[actor.ready.remote()] = Worker(actor, name=name, deaths=deaths, replaces_s=since)

    def started(self, ready: Any, round_number: int) -> list[Fault]:
        """Take up an actor whose `ready` has answered, or start another one where it died before.

        Raises:
            FedsimError: it can't keep what it is sent.
            ResourceError: its constructor fails every time.
        """
        worker = self.starting[ready]  # left there by what is raised, so that `close` ends it
        try:
            worker.node_id, worker.address, worker.pid, has_data = ray.get(ready)
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, FedsimError) else error from None
        except WEATHER as error:
            del self.starting[ready]
            reason = " ".join(reason_of(error).split())
            if CREATION in str(error):
                self._failed_starts += 1
                if self._failed_starts >= MAX_FAILED_STARTS:
                    raise ResourceError(
                        f"client actors can't be started ({self._failed_starts} tries): {reason}"
                    ) from error
            log.warning("client actor %s died before it was up: %s", worker.name, reason)
            return [worker.fault("not started", round_number, None, reason), *self._replace(worker, round_number)]
        self._failed_starts = 0
        if not has_data:
            log.info("the embeddings aren't on node %s: they are sent to %s", worker.node, worker.name)
            self.starting[worker.actor.receive.remote(self._supply())] = worker
            del self.starting[ready]
            return []
        del self.starting[ready]
        self.workers.append(worker)
        if worker.replaces_s is not None:
            after = time.monotonic() - worker.replaces_s
            log.info("client actor %s is up again on %s, %.1f s after the death", worker.name, worker.node, after)
        return []

    def bury(self, worker: Worker, error: Exception | None, round_number: int, block: int | None) -> list[Fault]:
        """End a worker and start another one in its place, or none where only nodes in quarantine are left.

        Args:
            worker: dead, or hung.
            error: what its call raised; None for one that hangs.
            round_number: the round under way.
            block: the index of the block that it trained.
        """
        self.workers.remove(worker)
        if error is None:
            self._end_process(worker)
            kind, reason = "hung", f"no answer for {time.monotonic() - worker.since:.1f} s"
        else:
            kind, reason = kind_of(error, worker.node_id), reason_of(error)
        ray.kill(worker.actor)
        return [worker.fault(kind, round_number, block, reason), *self._replace(worker, round_number)]

    def _replace(self, worker: Worker, round_number: int) -> list[Fault]:
        deaths, faults = worker.deaths + 1, []
        with suppress(RayError):
            ray.kill(worker.actor)
        if deaths >= self._max_deaths and worker.node_id not in self._quarantined:
            where = f"node {worker.node}" if worker.node_id else "its node"
            reason = f"{worker.name} died {deaths} times without training a block: nothing is started on {where} again"
            log.error("quarantine: %s", reason)
            faults.append(worker.fault("quarantined", round_number, None, reason))
            if worker.node_id:
                self._quarantined.add(worker.node_id)
                deaths = 0
        if deaths < self._max_deaths and self._has_place(self._posts[worker.name].options):
            self._spawn(worker.name, deaths, time.monotonic())
        else:
            log.error("client actor %s isn't started again; %d are left", worker.name, len(self))
        return faults

    def _has_place(self, options: Mapping[str, Any]) -> bool:
        """Whether a node outside of quarantine could hold such an actor, once it is free."""
        wanted = (("CPU", options["num_cpus"]), ("GPU", options["num_gpus"]))
        return any(
            node["NodeID"] not in self._quarantined
            and all(node["Resources"].get(name, 0.0) >= amount for name, amount in wanted)
            and options.get("label_selector", {}).items() <= node["Labels"].items()
            for node in ray.nodes()
            if node["Alive"]
        )

    def _end_process(self, worker: Worker) -> None:
        """`kill -9` where it lives: a process that stands still doesn't hear Ray."""
        here = NodeAffinitySchedulingStrategy(worker.node_id, soft=False)
        ended = ray.remote(_kill_9).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(worker.pid)
        try:
            ray.get(ended, timeout=10)
        except (RayError, TimeoutError) as error:
            log.warning("the process of %s can't be ended: %s", worker.name, reason_of(error))

    def close(self) -> None:
        """End all actors, also those that are at work."""
        for worker in [*self.starting.values(), *self.workers]:
            ray.kill(worker.actor)
        self.workers, self.starting = [], {}


def _kill_9(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
