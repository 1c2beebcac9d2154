"""The driver's handle to an experiment that lives in a server actor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from fedsim.cluster.crew import Worker
from fedsim.cluster.faults import WEATHER, kind_of, reason_of
from fedsim.cluster.placement import ServerPlace
from fedsim.cluster.resources import ACTOR_ENVIRONMENT, Demand, check_fits
from fedsim.cluster.server_actor import ServerActor
from fedsim.errors import FedsimError, ResourceError
from fedsim.federation.checkpoint import ServerState, load_checkpoint
from fedsim.federation.checkpoint_files import has_checkpoint
from fedsim.federation.experiment import RunFiles
from fedsim.federation.run_directory import last_recorded
from fedsim.federation.setup import Setup
from fedsim.federation.tracker import Tracker
from fedsim.types import Fault, RoundResult

POLL_S = 0.5
"""A poll costs driver and server 5 ms of CPU: one per cent where they share the cores with clients."""
MAX_SERVER_DEATHS = 4
"""So many without a finished round in between end the run: the server itself is what fails."""
GONE_S = 120.0
"""How long a silent server may take to be declared dead; Ray needs about 65 s for a node whose link is cut."""
log = logging.getLogger(__name__)


class ServerDeath(ResourceError):
    """The server actor died."""

    def __init__(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(f"the server actor died ({kind}: {reason}); go on with `fedsim resume`")


class RemoteExperiment:
    """Starts the server actor (which starts the client actors) and passes calls on; prints its log records here.

    A server actor that dies is started again from the newest checkpoint, and the rounds since are repeated: they have
    the same bits, and are recorded once.

    Args:
        setup: what `prepare` made.
        files: run directory; must be reachable from the server's node.
        tracker: picklable.
        state: where to go on from.
        status: told of the server's status while a round runs.
        faults: what broke before; recorded with the first round.

    Raises:
        ResourceError: the actors don't fit.
    """

    def __init__(
        self,
        setup: Setup,
        files: RunFiles,
        tracker: Tracker,
        *,
        state: ServerState | None,
        status: Callable[[Mapping[str, Any]], None],
        faults: Sequence[Fault] = (),
    ) -> None:
        if not ray.util.get_current_placement_group():
            # Inside a placement group (a Tune trial) the group already holds what the actors need.
            check_fits(demand_of(setup))
        self._setup, self._files, self._tracker, self._status = setup, files, tracker, status
        self._place = ServerPlace(cpus=setup.config.resources.server_cpus, gpus=setup.config.resources.server_gpus)
        self._faults = list(faults)
        self._finished = state.round_number if state else 0
        self._deaths = 0
        self._where = Worker(None, name="server")
        try:
            self._lasting(lambda: self._start(files, state), lambda: None)
        except BaseException:
            self._place.close()
            raise

    def _start(self, files: RunFiles, state: ServerState | None) -> None:
        resources = self._setup.config.resources
        level = logging.getLogger("fedsim").getEffectiveLevel()
        actor = (
            ray.remote(ServerActor)
            .options(
                num_cpus=resources.server_cpus,
                num_gpus=resources.server_gpus,
                scheduling_strategy=self._place.strategy(),
                max_concurrency=2,
                runtime_env={"env_vars": ACTOR_ENVIRONMENT},
            )
            .remote(self._setup, files, self._tracker, state, resources.server_gpus, level, tuple(self._faults))
        )
        self._actor, self._where = actor, Worker(actor, name="server")
        try:
            where = self._wait(actor.ready.remote(), poll=False)
        except BaseException:
            ray.kill(actor)
            raise
        self._where.node_id, self._where.address, self._where.pid = where

    def round(self) -> RoundResult:
        """Run the next round; status and log records arrive meanwhile."""
        result: RoundResult = self._lasting(lambda: self._wait(self._actor.round.remote()))
        self._finished, self._deaths, self._faults = result.round_number, 0, []
        return result

    def finish(self, status: str) -> dict[str, Any]:
        """Write the results."""
        result: dict[str, Any] = self._lasting(lambda: self._wait(self._actor.finish.remote(status)))
        return result

    def stop(self) -> None:
        """Write a checkpoint of the last finished round where there is none; the round under way is abandoned."""
        self._status = lambda _: None  # who is stopping has nothing to show, and must not be stopped by what shows it
        self._wait(self._actor.stop.remote(), poll=False)

    def _lasting(self, call: Callable[[], Any], again: Callable[[], Any] | None = None) -> Any:
        """The result of a call, or of `again` to a server actor that had to be started meanwhile.

        Raises:
            ResourceError: `MAX_SERVER_DEATHS` died without a round in between.
        """
        try:
            return call()
        except ServerDeath as death:
            error = death
        while True:
            self._deaths += 1
            fault = self._where.fault(f"server {error.kind}", self._finished + 1, None, error.reason)
            if self._deaths >= MAX_SERVER_DEATHS:
                raise ResourceError(
                    f"the server actor died {self._deaths} times in round {self._finished + 1} ({error.kind}: "
                    f"{error.reason}); go on with `fedsim resume`"
                ) from error
            self._faults.append(fault)
            try:
                self._restart(fault)
                return (again or call)()
            except ServerDeath as death:
                error = death

    def _restart(self, fault: Fault) -> None:
        """A new server actor at the last finished round."""
        run_dir, start = self._files.run_dir, time.monotonic()
        state = load_checkpoint(run_dir, self._setup.config)[0] if has_checkpoint(run_dir) else None
        first = state.round_number + 1 if state else 1
        log.warning(
            "server actor died in round %d: %s on %s: %s; it is started again from round %d%s",
            fault.round_number, fault.actor, fault.node or "unknown node", f"{fault.kind}: {fault.reason}", first - 1,
            f", rounds {first} to {self._finished} are repeated" if first <= self._finished else "",
        )  # fmt: skip
        self._end(self._actor)
        self._start(replace(self._files, recorded=last_recorded(run_dir)), state)
        for _ in range(first, self._finished + 1):
            self._wait(self._actor.round.remote())
        log.warning("server actor is up again, %.1f s after its death", time.monotonic() - start)

    def _end(self, actor: Any) -> None:
        """Return when Ray says that an actor is dead: two servers would write into one directory."""
        ray.kill(actor)
        end = time.monotonic() + GONE_S
        while (found := ray._private.state.actors(actor._actor_id.hex())) and found.get("State") != "DEAD":
            if time.monotonic() > end:
                raise ResourceError(
                    f"the server actor doesn't answer, and after {GONE_S:g} s Ray can't say that it is dead; go on "
                    "with `fedsim resume` when its node is back or gone"
                )
            time.sleep(0.1)

    def close(self) -> None:
        """End all actors."""
        with suppress(*WEATHER, RayTaskError, TimeoutError):  # client actors go with their owner in any case
            ray.get(self._actor.close.remote(), timeout=10)
        ray.kill(self._actor)
        self._place.close()

    def _wait(self, ref: Any, *, poll: bool = True) -> Any:
        """The result of a call to the server actor, unwrapped from Ray's errors.

        `poll` is off while the actor is being made: it answers nothing before.
        """
        try:
            while poll and not ray.wait([ref], timeout=POLL_S)[0]:
                self._relay(timeout=60.0)
            result = ray.get(ref)
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, FedsimError) else error from None
        except WEATHER as error:
            raise ServerDeath(kind_of(error, self._where.node_id), reason_of(error)) from error
        with suppress(*WEATHER):  # the result is here; that the server is gone is the next call's business
            self._relay(timeout=60.0)
        return result

    def _relay(self, *, timeout: float) -> None:
        try:
            status, records = ray.get(self._actor.poll.remote(), timeout=timeout)
        except GetTimeoutError:
            log.warning("the server actor has not answered for %g s; still waiting", timeout)
            return
        for name, level, text in records:
            logging.getLogger(name).log(level, "%s", text)
        if status:
            self._status(status)


def demand_of(setup: Setup) -> Demand:
    """What the configuration asks of Ray."""
    resources = setup.config.resources
    return Demand(resources.actor_kinds(), server_cpus=resources.server_cpus, server_gpus=resources.server_gpus)
