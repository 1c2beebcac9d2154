"""What an error of Ray says about an actor's end: its kind, and why, in one line."""

from __future__ import annotations

import re

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayActorError

WEATHER = (RayActorError, ObjectLostError, OutOfMemoryError)
"""What a call raises whose actor is gone, or its answer: nobody's bug, it is done elsewhere."""
LOW_MEMORY = "running low on memory"
CREATION = "error raised in its creation task"


def kind_of(error: Exception, node_id: str = "") -> str:
    """One of the kinds of `Fault`.

    Args:
        error: what a call to the actor raised.
        node_id: where the actor lived, "" where that isn't known.
    """
    text = str(error)
    if isinstance(error, OutOfMemoryError) or LOW_MEMORY in text:
        return "out of memory"
    if "node has died" in text or "node died" in text or (node_id and node_id not in alive_nodes()):
        return "node lost"
    return "unreachable" if isinstance(error, ActorUnavailableError) else "killed"


def reason_of(error: Exception) -> str:
    """Why, in one line; Ray's texts begin with generalities and end with advice."""
    text = plain(error)
    if found := re.search(r"Memory on the node .*? was (\S+) used / (\S+) limit.*?(?=\n|$)", text):
        mine = re.search(r"Selected to kill: .*?actual memory used=([\d.]+\s*\w+)", text, re.DOTALL)
        held = f"; the actor held {mine[1]}" if mine else ""
        return f"the node ran out of memory: {found[1]} of {found[2]} were used{held}"
    if found := re.search(r"Worker exit type: (\S+) Worker exit detail: (.*?)\. (?:Some common|End of file)", text):
        return f"{found[1]}: {found[2]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if CREATION in text else lines[0])[:200]


def plain(error: Exception) -> str:
    """An error's text without Ray's colours."""
    return re.sub(r"\x1b\[\d+m", "", str(error))


def alive_nodes() -> set[str]:
    """Ids of the nodes that Ray believes to be alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
