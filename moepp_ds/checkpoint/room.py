"""Whether a run's disk has room for its checkpoints, and what can be done where it has none."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from data_pipeline.space import size
from moepp_ds.checkpoint.errors import CheckpointError
from moepp_ds.checkpoint.files import complete_ones, find_checkpoint, step_of
from moepp_ds.config import Recipe, count_parameters

PARAMETER_BYTES = 12
"""Of one parameter in a checkpoint: its fp32 weight and AdamW's two moments."""


class Room:
    """The room that the checkpoints of a run take under `root`, and what its disk has. Its methods raise OSError.

    Free bytes are the file system's; a quota is not seen.
    """

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self._root, self._options = root, recipe.checkpoint
        self._one = PARAMETER_BYTES * count_parameters(recipe.model).total

    def foreseen(self, total_steps: int) -> str:
        """What a checkpoint takes, and all of them at the most, beside what is free; a warning where that is less.

        There may be `keep`, the one that is being written, and the milestones. What the run has already counts as room.
        """
        options = self._options
        milestones = total_steps // options.keep_every if options.keep_every else 0
        number = options.keep + 1 + milestones
        needed, held, free = number * self._one, _bytes_under(self._root), self._free()
        more = f", {milestones} milestones" if milestones else ""
        words = f"a checkpoint takes about {size(self._one)}, {number} of them {size(needed)} (checkpoint.keep "
        words += f"{options.keep}{more}, and one that is being written); "
        words += f"{size(held)} are used so far, " if held else ""
        words += f"{size(free)} are free"
        if needed <= held + free:
            return words
        return f"warning: {words}: too little, so that saves will fail; make room, or lower checkpoint.keep"

    def advice(self) -> str:
        """For a save that has failed: what it needs, what is free, and what may be deleted while the run goes on."""
        free, run = self._free(), self._root.parent
        words = f"A checkpoint takes about {size(self._one)}, and {size(free)} are free in {run}"
        if free > self._one:
            words += " (so a quota, or the number of files, is what is used up)"
        older = self._older()
        if older:
            return (
                f"{words}. To make room, `moepp checkpoint prune {run} --keep 1`, or delete by hand what `latest` does "
                f"not name: {', '.join(path.name for path in older)}"
            )
        return f"{words}. The run has no older checkpoint to delete: make room on its disk"

    def _older(self) -> list[Path]:
        """The checkpoints before the one that `latest` names."""
        try:
            newest = find_checkpoint(self._root)
        except CheckpointError:
            return []
        complete = complete_ones(self._root)
        return [complete[step] for step in sorted(complete) if newest is not None and step < step_of(newest)]

    def _free(self) -> int:
        return shutil.disk_usage(self._root if self._root.exists() else self._root.parent).free


def is_full(error: CheckpointError) -> bool:
    """Whether a disk without room is why a save failed.

    Judged by the words, which all ranks have alike: of the error itself only the rank that met it knows the number.
    """
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def _bytes_under(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("*/*") if path.is_file())
