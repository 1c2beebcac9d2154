"""What tests of bad input share: damage to bytes and documents, and the watch over time, memory and files."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fedsim.errors import FedsimError

SECONDS, MEGABYTES = 10.0, 400
HOSTILE = [None, True, -1, 0, 2**63, 10**400, 1e308, "", "x" * 1000, "../../etc/passwd", "/etc/passwd", "\x00", [], {},
           [[]], {"a": {"b": []}}, [2**40, 2**40]]  # fmt: skip
REFUSED = "refused in one line"


class HangError(BaseException):
    """It took too long; no handler of `Exception` hides it."""


@contextmanager
def bounded(seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Iterator[None]:
    """A block that ends within a time and without needing much more memory than before."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError(f"longer than {seconds:g} s")

    peak, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / (1024 if sys.platform == "linux" else 2**20)
    assert grown < megabytes, f"memory grew by {grown:.0f} MB"


def one_line(error: BaseException) -> bool:
    """Whether an error is for people: a line that can be read."""
    text = str(error)
    return isinstance(error, FedsimError) and 0 < len(text) < 6000 and len(text.splitlines()) == 1


def ends_well(call: Callable[[], Any], **limits: Any) -> tuple[str, Any]:
    """How a call ends: REFUSED and the error, or "answered" and its answer; anything else fails the test."""
    try:
        with bounded(**limits):
            return "answered", call()
    except FedsimError as caught:
        error = caught
    assert one_line(error), f"{type(error).__name__} is no line: {str(error)[:500]!r}"
    return REFUSED, error


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes; links and pipes by name alone."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The bytes with one of the damages that disks, copies and editors do."""
    data, at = bytearray(content), chance.randrange(max(1, len(content)))
    length = chance.choice([1, 1, 4, 64, 4096])
    kind = chance.randrange(7)
    if kind == 0:
        data[at : at + 1] = bytes([(data[at] if data else 0) ^ (1 << chance.randrange(8))])
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = chance.randbytes(length)
    elif kind == 3:
        data[at : at + length] = bytes(min(length, len(data) - at))
    elif kind == 4:
        data[at : at + length] = chance.randbytes(min(length, len(data) - at))
    elif kind == 5:
        del data[at : at + length]
    else:
        data += data[at : at + length] or b"x"
    return bytes(data)


def changed(document: Any, chance: random.Random) -> Any:
    """A document with one value, anywhere in it, replaced, removed or renamed."""
    document = json.loads(json.dumps(document))
    place, parents = document, []
    while isinstance(place, dict | list) and place and chance.random() < 0.8:
        name = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
        parents.append((place, name))
        place = place[name]
    if not parents:
        return chance.choice(HOSTILE)
    holder, name = parents[-1]
    if chance.random() < 0.2:
        value = holder.pop(name)
        if isinstance(holder, dict) and chance.random() < 0.5:
            holder["../" + str(name)] = value
    else:
        holder[name] = chance.choice(HOSTILE)
    return document


def told(what: str, counts: Counter[str]) -> None:
    """Print what a test did; nothing else than the outcomes counted came about, or it would have failed."""
    print(f"{what}: {sum(counts.values())}, " + ", ".join(f"{v} {k}" for k, v in counts.items()) + ", 0 tracebacks")
