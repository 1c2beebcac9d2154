"""Who of a cohort didn't answer, and what broke on the way: collected while blocks come in, and named in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from fedsim.federation.messages import shown
from fedsim.federation.pool import LostBlock
from fedsim.types import BlockUpdate, Fault, LostClient

log = logging.getLogger(__name__)


@dataclass
class Casualties:
    """Of one round.

    Attributes:
        name: of a client, for people.
        faults: what broke, in order.
    """

    name: Callable[[int], str]
    faults: list[Fault] = field(default_factory=list)
    _lost: list[LostClient] = field(default_factory=list)

    def block(self, block: LostBlock) -> None:
        """All clients of a block that no attempt could train."""
        self._lost += [LostClient(int(client), block.reason) for client in block.client_ids]
        names = shown(block.client_ids, self.name)
        log.warning("lost %d clients (%s): %s", len(block.client_ids), names, block.reason)

    def clients(self, update: BlockUpdate) -> None:
        """The clients of a block that were dropped."""
        self._lost += update.dropped
        for client in update.dropped:
            log.warning("client %s is %s", self.name(client.client), client.reason)

    @property
    def lost(self) -> tuple[LostClient, ...]:
        """By client, so that the order in which blocks came leaves no trace."""
        return tuple(sorted(self._lost, key=lambda lost: lost.client))
