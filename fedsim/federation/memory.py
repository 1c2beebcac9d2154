"""Memory that is kept, and memory that runs out.

What training frees is used again, not given back to the operating system and asked for anew.

Every step needs the same temporary tensors. glibc maps large ones afresh each time, and the kernel then clears every
page before its first use: with AdamW on an adapter of 1.3 M weights half of the time went there.
"""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for this process; False where there is no glibc (only speed is lost)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # 32 MB is the largest that glibc takes; one arena, so that what one thread frees another can use.
    settings = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 2**30, _ARENA_MAX: 1}
    return all([mallopt(option, value) == 1 for option, value in settings.items()])


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out; torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
