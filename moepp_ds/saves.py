"""When a run is saved, and what becomes of a save that fails.

1. Where the run goes on from an earlier checkpoint of its own, `latest` names that one before anything else is done:
   whatever happens next, the run is not gone on with from what it has left behind.
2. A save is due every `checkpoint.every` updates. It is only begun then, and published when all ranks have said,
   beside the losses of an update, that their part is on the disk, and proven.
3. One that fails is warned of and tried again, sooner than the next is due: earlier checkpoints are untouched, and
   a disk that is full now may have room in an hour. The same words are said once, and then at every doubling of tries.
4. The last one, at the end or at a stop, is waited for. Where the disk is full it is tried again for a while; it fails
   the run if it fails.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moepp_ds.agreement import all_or_none, gather
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.files import is_named_by_step, name_latest, step_of
from moepp_ds.checkpoint.live import Saver
from moepp_ds.checkpoint.retention import left_behind
from moepp_ds.checkpoint.room import Room, is_full
from moepp_ds.run import Progress, Run, versions

RETRY_SHARE = 10
"""A failed save is tried again after this part of `checkpoint.every`."""

PAUSE = 2.0
"""Between tries of the last save on a full disk. Seconds."""


class Saves:
    """The checkpoints of one run. Its methods are collective."""

    def __init__(self, run: Run, resumed: Path | None = None) -> None:
        """resumed: the checkpoint that the run went on from; one of its own need not be written again.

        Raises CheckpointError where `latest` cannot be made to name it.
        """
        options, root = run.recipe.checkpoint, run.path / "checkpoints"
        self._run, self._every = run, options.every
        if resumed is not None and not (is_named_by_step(resumed) and resumed.parent.resolve() == root.resolve()):
            resumed = None
        self._room = Room(root, run.recipe)
        if resumed is not None:
            resumed = root / resumed.name
            with all_or_none(CheckpointError):
                if run.ranks.is_first:
                    self._leave_behind(resumed)
        if run.folder:
            with suppress(OSError):  # only to be known
                run.say(self._room.foreseen(run.total_steps))
        self._saver = Saver(
            run.engine,
            root,
            keep=options.keep,
            keep_every=options.keep_every,
            background=options.background,
            resumed=resumed,
        )
        self._retry_at: int | None = None
        self._failures = 0  # in a row
        self._told: set[str] = set()

    @property
    def ready(self) -> bool:
        """Whether this rank's part of a save waits to be published."""
        return self._saver.ready

    def after_update(self, progress: Progress, data: Callable[[], Mapping[str, Any]], *, all_ready: bool) -> None:
        """Publish what all ranks have written; begin what is due. data: gives the loader's state after the update."""
        if all_ready:
            self._attempt(progress, self._publish)
        if progress.step % self._every == 0 or progress.step == self._retry_at:
            self._attempt(progress, lambda: self._save(progress, data()))

    def last(self, progress: Progress, data: Mapping[str, Any]) -> None:
        """Have a checkpoint of `progress` on the disk; raises CheckpointError where that cannot be.

        The first rank's clock decides for all of them how often it is tried.
        """
        try:
            self._publish()
        except CheckpointError as error:  # what kept an earlier one from the disk may be over
            self._run.say(f"warning: {error}")
        last = self._saver.last
        if last is not None and step_of(last) == progress.step:
            return
        self._failures, wait = 0, self._run.recipe.checkpoint.wait_for_room
        self._told.clear()
        end = time.monotonic() + wait
        while True:
            try:
                self._save(progress, data)
                self._publish()
                return
            except CheckpointError as error:  # which all ranks come to, or none
                if not is_full(error) or not gather(time.monotonic() < end)[0]:
                    raise
                self._warn(progress.step, error, f"it is tried again for {wait} s in all (checkpoint.wait_for_room)")
                time.sleep(PAUSE)

    def close(self) -> None:
        """End what is under way, unpublished."""
        self._saver.close()

    def _leave_behind(self, resumed: Path) -> None:
        """Have `latest` name the checkpoint that the run goes on from; say once what becomes of later ones."""
        try:
            has_moved = name_latest(resumed)
        except OSError as error:
            # A start with --resume auto would go on from what this one leaves behind, and nobody would notice.
            raise CheckpointError(
                f"{resumed.parent / 'latest'} cannot be made to name {resumed.name}, which the run is to go on "
                f"from: {error}; make room or repair its disk, and start it again as before"
            ) from error
        later = ", ".join(path.name for path in left_behind(resumed))
        if has_moved and later:
            self._run.say(f"left behind: {later}; each is deleted once this run has saved one at or past it")

    def _attempt(self, progress: Progress, action: Callable[[], None]) -> None:
        try:
            action()
            self._retry_at = None
        except CheckpointError as error:
            self._retry_at = progress.step + max(1, self._every // RETRY_SHARE)
            self._warn(progress.step, error, f"training goes on, the next try is after update {self._retry_at}")

    def _warn(self, step: int, error: CheckpointError, going_on: str) -> None:
        """Say that a save has failed, and what can be done; not again and again."""
        self._failures += 1
        kind = re.sub(r"\d+", "", str(error))
        if kind in self._told and self._failures & (self._failures - 1):
            return
        said = str(error) if kind not in self._told else f"no checkpoint of update {step}, for the same reason"
        tries = f", {self._failures} tries in a row" if self._failures > 1 else ""
        message = f"{said}{tries}; {going_on}"
        if self._run.folder and is_full(error) and kind not in self._told:
            with suppress(OSError):
                message += f". {self._room.advice()}"
        self._told.add(kind)
        self._run.say(f"warning: {message}")
        self._run.note_status(step, message)

    def _save(self, progress: Progress, data: Mapping[str, Any]) -> None:
        self._publish()
        run = self._run
        with all_or_none(CheckpointError):
            try:
                if run.folder:
                    run.folder.sync()
            except OSError as error:
                raise CheckpointError(f"no checkpoint of update {progress.step}: {error}") from error
        self._saver.save(
            step=progress.step,
            facts={
                "tokens": progress.step * run.recipe.train.batch_tokens,
                "recipe": run.recipe.model_dump(mode="json"),
                "data": data,
                "routing": progress.routing.facts(),
                "guard": progress.guard.facts(),
                "versions": versions(),
                "origin": run.origin,
            },
        )

    def _publish(self) -> None:
        published = self._saver.complete()
        if published is not None:
            self._failures = 0
            self._told.clear()
            self._run.note_saved(published)
