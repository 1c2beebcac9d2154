"""Every error that fedsim raises on purpose.

FedsimError                 one line for people: what was wrong, what came, what is allowed, what to do
├── ConfigError             a key, a value, or two keys that don't go together
├── DataError               a folder, a recording, a manifest, a split, missing class statistics
├── ModelError              encoders, adapters, generators, shapes, tables of text embeddings
├── ClientError             client code raised, or produced a non-finite number (client, round, phase)
├── QuorumError             too few clients answered in a round
├── ResourceError           more CPUs or GPUs asked for than there are
└── CheckpointError         a run directory that can't be read, or belongs to another configuration
"""

from __future__ import annotations

LONGEST = 4000
"""Characters of a message: what was found in a damaged file can be long."""


class FedsimError(Exception):
    """Base of all errors meant for people; the command line prints its one line and exits with code 2.

    Args:
        message: what can't be printed (it may quote what was found in a file) is escaped, so that it stays one line.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 40]}... ({len(line)} characters)")


class ConfigError(FedsimError):
    """A configuration key or value is wrong."""


class DataError(FedsimError):
    """Recordings, manifests, splits or statistics are missing or unusable."""


class ModelError(FedsimError):
    """An encoder, adapter, generator or text table doesn't fit or can't be loaded."""


class ClientError(FedsimError):
    """Client code failed; the message names the client, the round and the phase."""


class QuorumError(FedsimError):
    """Fewer clients answered than `federation.quorum` asks for."""


class TrackingError(FedsimError):
    """The record of a run in MLflow is missing, damaged or can't be delivered."""


class ResourceError(FedsimError):
    """The requested actors don't fit the machine or cluster; the message holds both numbers."""


class CheckpointError(FedsimError):
    """A checkpoint is missing, damaged, or from another configuration."""
