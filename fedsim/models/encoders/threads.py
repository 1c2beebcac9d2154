"""All cores for work whose result doesn't depend on their number.

A run computes with one torch thread, because the bits of a sum over threads depend on their number. An encoder's layers
split rows and columns over threads, never a sum: an AST of the real size gave the same bits with 1, 2 and 3 threads and
in batches of 1 and 4 (torch 2.13, CPU). So recordings may be embedded by all cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedsim.machine import whole_cores


@contextmanager
def all_cores() -> Iterator[None]:
    """As many torch threads as this process may use: OMP_NUM_THREADS where it is set, else its cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(available_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cores() -> int:
    """OMP_NUM_THREADS, or the cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return whole_cores()
