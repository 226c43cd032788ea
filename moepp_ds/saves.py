"""When a run is saved, and what becomes of a save that fails.

1. A save is due every `checkpoint.every` updates. It is only begun then, and published when all ranks have said,
   beside the losses of an update, that their part is on the disk, and proven.
2. One that fails is warned of and tried again, sooner than the next is due: earlier checkpoints are untouched, and
   a disk that is full now may have room in an hour.
3. The last one, at the end or at a stop, is waited for, and fails the run if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moepp_ds.agreement import all_or_none
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.files import is_named_by_step, step_of
from moepp_ds.checkpoint.live import Saver
from moepp_ds.run import Progress, Run, versions

RETRY_SHARE = 10
"""A failed save is tried again after this part of `checkpoint.every`."""


class Saves:
    """The checkpoints of one run. Its methods are collective."""

    def __init__(self, run: Run, resumed: Path | None = None) -> None:
        """resumed: the checkpoint that the run went on from; one of its own need not be written again."""
        options, root = run.recipe.checkpoint, run.path / "checkpoints"
        self._run, self._every = run, options.every
        if resumed is not None and not (is_named_by_step(resumed) and resumed.parent.resolve() == root.resolve()):
            resumed = None
        self._saver = Saver(run.engine, root, keep=options.keep, background=options.background, resumed=resumed)
        self._retry_at: int | None = None

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
        """Have a checkpoint of `progress` on the disk; raises CheckpointError where that cannot be."""
        try:
            self._publish()
        except CheckpointError as error:  # what kept an earlier one from the disk may be over
            self._run.say(f"warning: {error}")
        last = self._saver.last
        if last is None or step_of(last) != progress.step:
            self._save(progress, data)
            self._publish()

    def close(self) -> None:
        """End what is under way, unpublished."""
        self._saver.close()

    def _attempt(self, progress: Progress, action: Callable[[], None]) -> None:
        try:
            action()
            self._retry_at = None
        except CheckpointError as error:
            self._retry_at = progress.step + max(1, self._every // RETRY_SHARE)
            message = f"{error}; training goes on, the next try is after update {self._retry_at}"
            self._run.say(f"warning: {message}")
            self._run.note_status(progress.step, message)

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
            self._run.note_status(step_of(published))
            self._run.say(f"saved {published}")
