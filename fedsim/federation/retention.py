"""Which checkpoints stay: the last ones, and the best ones by held-out top-1."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from fedsim.errors import CheckpointError
from fedsim.federation.checkpoint_files import (
    check_files,
    checkpoints_of,
    read_document,
    remove_checkpoint,
    remove_leftovers,
    round_of,
)

log = logging.getLogger(__name__)


def kept_rounds(
    rounds: Collection[int], top1: Mapping[int, float], *, keep_last: int | None, keep_best: int
) -> set[int]:
    """Rounds whose checkpoints stay.

    Args:
        rounds: those that have one.
        top1: accuracy by round; rounds without evaluation are in no order and so never among the best.
        keep_last: how many of the newest stay; None: all of them.
        keep_best: how many of the best stay besides; of equals the earliest.
    """
    if keep_last is None:
        return set(rounds)
    best = sorted((number for number in rounds if number in top1), key=lambda number: (-top1[number], number))
    return {*sorted(rounds)[-keep_last:], *best[:keep_best]}


def thin_out(
    run_dir: Path, top1: Mapping[int, float], *, newest: int, keep_last: int | None, keep_best: int
) -> list[int]:
    """Delete the checkpoints that needn't stay, and what broken-off writes have left; returns the rounds deleted.

    Nothing is deleted unless the newest one reads back as it was written. Checkpoints of later rounds, which a resume
    has passed over, are left alone: they are written anew when their round comes.

    Args:
        run_dir: the run directory.
        top1: accuracy by round.
        newest: the round whose checkpoint has just been written.
        keep_last: see `kept_rounds`.
        keep_best: see `kept_rounds`.
    """
    remove_leftovers(run_dir)
    folders = {round_of(folder): folder for folder in checkpoints_of(run_dir)}
    rounds = {number for number in folders if number <= newest}
    doomed = sorted(rounds - kept_rounds(rounds, top1, keep_last=keep_last, keep_best=keep_best))
    if not doomed:
        return []
    try:
        check_files(folders[newest], read_document(folders[newest]))
    except CheckpointError as error:
        log.warning("the checkpoint just written doesn't read back, so that no earlier one is deleted: %s", error)
        return []
    for number in doomed:
        remove_checkpoint(folders[number])
    return doomed
