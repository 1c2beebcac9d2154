"""The driver's handle to an experiment that lives in a server actor."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from fedsim.cluster.resources import ACTOR_ENVIRONMENT, Demand, check_fits
from fedsim.cluster.server_actor import ServerActor
from fedsim.errors import FedsimError, ResourceError
from fedsim.federation.checkpoint import ServerState
from fedsim.federation.experiment import RunFiles
from fedsim.federation.setup import Setup
from fedsim.federation.tracker import Tracker
from fedsim.types import RoundResult

POLL_S = 0.5
"""A poll costs driver and server 5 ms of CPU: one per cent where they share the cores with clients."""
log = logging.getLogger(__name__)


class RemoteExperiment:
    """Starts the server actor (which starts the client actors) and passes calls on; prints its log records here.

    Args:
        setup: what `prepare` made.
        files: run directory; must be reachable from the server's node.
        tracker: picklable.
        state: where to go on from.
        status: told of the server's status while a round runs.

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
    ) -> None:
        resources = setup.config.resources
        if not ray.util.get_current_placement_group():
            # Inside a placement group (a Tune trial) the group already holds what the actors need.
            check_fits(demand_of(setup))
        self._status = status
        level = logging.getLogger("fedsim").getEffectiveLevel()
        self._actor = (
            ray.remote(ServerActor)
            .options(
                num_cpus=resources.server_cpus,
                num_gpus=resources.server_gpus,
                max_concurrency=2,
                runtime_env={"env_vars": ACTOR_ENVIRONMENT},
            )
            .remote(setup, files, tracker, state, resources.server_gpus, level)
        )
        try:
            self._wait(self._actor.ready.remote(), poll=False)
        except BaseException:
            ray.kill(self._actor)
            raise

    def round(self) -> RoundResult:
        """Run the next round; status and log records arrive meanwhile."""
        result: RoundResult = self._wait(self._actor.round.remote())
        return result

    def finish(self, status: str) -> dict[str, Any]:
        """Write the results."""
        result: dict[str, Any] = self._wait(self._actor.finish.remote(status))
        return result

    def stop(self) -> None:
        """Write a checkpoint of the last finished round where there is none; the round under way is abandoned."""
        self._wait(self._actor.stop.remote(), poll=False)

    def close(self) -> None:
        """End all actors."""
        with suppress(RayActorError, RayTaskError, TimeoutError):  # client actors go with their owner in any case
            ray.get(self._actor.close.remote(), timeout=10)
        ray.kill(self._actor)

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
        except RayActorError as error:
            # The cause stands at the end of Ray's text, after the traceback.
            cause = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise ResourceError(f"the server actor died ({cause[-300:]}); go on with `fedsim resume`") from error
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
    return Demand(
        client_actors=resources.num_actors,
        client_cpus=resources.client_cpus,
        client_gpus=resources.client_gpus,
        server_cpus=resources.server_cpus,
        server_gpus=resources.server_gpus,
    )


def stop_ray() -> None:
    """Disconnect, and remove the private Ray's folder."""
    folder = ray._private.worker._global_node.get_session_dir_path() if ray._private.worker._global_node else None
    ray.shutdown()
    if folder and "/fs-" in folder:
        shutil.rmtree(folder.split("/session_")[0], ignore_errors=True)
