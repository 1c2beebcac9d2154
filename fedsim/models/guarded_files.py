"""JSON and safetensors from files that may be damaged or planted: sealed, and read in bounded time and memory.

A document's seal is the SHA-256 of its other contents: without one a flipped bit that leaves it JSON would go unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SEAL = "seal"
MOST_JSON_BYTES = 32 * 2**20
"""A thousand named nodes take 100 kB."""
MOST_HEADER_BYTES = 8 * 2**20
"""A safetensors header takes 100 bytes a tensor; the library itself would read 100 MB."""


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its seal."""
    contents = {key: value for key, value in document.items() if key != SEAL}
    return {**contents, SEAL: _seal_of(contents)}


def check_seal(document: Mapping[str, Any]) -> None:
    """Refuse a document whose contents aren't what was sealed; one of an earlier fedsim, without a seal, is taken.

    Raises:
        ValueError: they differ.
    """
    if SEAL in document and document[SEAL] != sealed(document)[SEAL]:
        raise ValueError("its contents differ from those that were written: it doesn't match its own seal")


def _seal_of(contents: Mapping[str, Any]) -> str:
    contents = json.loads(json.dumps(contents))  # as a reader finds them: keys are text, sequences are lists
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it can't be read.
        ValueError: it is too large, nested too deeply, no JSON, or no object.
    """
    size = _size(file)
    if size > MOST_JSON_BYTES:
        raise ValueError(f"it has {size} bytes, at most {MOST_JSON_BYTES} are read")
    try:
        document = json.loads(file.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"it holds no object but {type(document).__name__}")
    return document


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        OSError: it can't be read.
        ValueError: its header is too large, or isn't that of its contents: overlapping, missing or surplus bytes.
    """
    check_header(file)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    # Shapes that no tensor can have are errors of torch, names that are no text are errors of Python.
    except (SafetensorError, RuntimeError, OverflowError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"it is no readable safetensors file ({_one_line(error)})") from error
    return tensors


def check_header(file: Path) -> None:
    """Refuse a safetensors file whose header is longer than the file, or absurdly long, before anything reads it.

    Raises:
        OSError: it can't be read.
        ValueError: it is.
    """
    size = _size(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
        raise ValueError(f"it is no readable safetensors file ({size} bytes with a header of {length})")


def _size(file: Path) -> int:
    """Bytes of a regular file: a pipe would wait for ever, a device never end."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    return file.stat().st_size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
