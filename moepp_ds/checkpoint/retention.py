"""Which checkpoints of a run are deleted, and how: hidden under another name first, by a run and by a command alike.

1. What counts is what the run itself has saved: not what it left behind when it went back to an earlier checkpoint.
2. Milestones stay, and of the others the newest `keep`.
3. What goes gets a hidden name, in one step, and is deleted then. Two processes may do this at once.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.atomic import TEMPORARY
from moepp_ds.checkpoint.files import complete_ones, hide, leftovers, read_index, step_of

_HIDDEN = re.compile(r"\.step-([0-9]+)\.old-[0-9]+")
"""The names that `hide` gives."""

_DELETE_TRIES = 20
"""Of what others delete at the same time, or a file system lists and does not find. A twentieth of a second apart."""


def left_behind(folder: Path) -> list[Path]:
    """The complete checkpoints later than the one that a run goes on from, the oldest first."""
    complete = complete_ones(folder.parent)
    return [complete[step] for step in sorted(complete) if step > step_of(folder)]


def stored_keep_every(folder: Path) -> int | None:
    """checkpoint.keep_every of the recipe in a checkpoint; None where there is none. Raises DamagedCheckpoint."""
    value: Any = read_index(folder)
    for key in ("recipe", "checkpoint", "keep_every"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int) else None


def too_old(newest: Path, *, keep: int, keep_every: int | None = None, before: Path | None = None) -> list[Path]:
    """The complete checkpoints before the newest one but for `keep`, it included, and for milestones.

    keep_every: milestones are those of a multiple of so many updates; they do not count for `keep`, nor do they go.
    before: the one that the run was at before. Those between the two are of a part of the run that was left behind, or
    were passed over as damaged: they do not count, and they go, milestones or not. Later ones do not count either;
    they stay.
    """
    complete = complete_ones(newest.parent)
    steps = sorted(step for step in complete if step <= step_of(newest))
    passed = range(step_of(before) + 1, step_of(newest)) if before is not None else range(0)
    own = [step for step in steps if step not in passed]
    milestones = [step for step in own if keep_every and step % keep_every == 0]
    kept = [*milestones, *[step for step in own if step not in milestones][-keep:]]
    return [complete[step] for step in steps if step not in kept]


def set_aside_old(newest: Path, *, keep: int, keep_every: int | None = None, before: Path | None = None) -> list[Path]:
    """Hide the checkpoints that are `too_old`; return what may be deleted now.

    That is these, and what is left of saves that never ended; nobody may be saving. What cannot be hidden is warned
    of and stays; the next save tries again.
    """
    with _only_warned():
        set_aside(too_old(newest, keep=keep, keep_every=keep_every, before=before))
        return leftovers(newest.parent)
    return []


def set_aside(folders: Iterable[Path]) -> None:
    """Hide checkpoints under names that are free, for deletion: a half-deleted one is never seen as a checkpoint.

    Of two processes that hide the same one the first does. What cannot be hidden is warned of.
    """
    for folder in folders:
        with _only_warned(), suppress(FileNotFoundError):
            hide(folder)


def set_aside_before(newest: Path) -> list[Path]:
    """What was hidden of checkpoints before `newest`, and may be deleted while a run is saving.

    Not those of its own update or of later ones: a save sets what it replaces aside, and puts it back if it fails.
    """
    hidden = {path: _HIDDEN.fullmatch(path.name) for path in newest.parent.glob(".step-*")}
    return sorted(path for path, name in hidden.items() if name and int(name[1]) < step_of(newest))


def left_by_killed_saves(root: Path, newest: Path | None) -> list[Path]:
    """What saves that never ended have left, and deletions before `newest`, the run's own; nobody may be saving.

    It goes before the next save: on a disk that has room for just what is kept that one would not fit beside it.
    """
    hidden = [] if newest is None else set_aside_before(newest)
    return sorted([*root.glob(".step-*.partial"), *root.glob(f"{TEMPORARY}*"), *hidden])


def delete(paths: Iterable[Path]) -> None:
    """Delete folders and files; what cannot be deleted is warned of, and the next save tries again.

    Several processes may delete the same ones.
    """
    for path in paths:
        with _only_warned():
            for _ in range(_DELETE_TRIES):
                try:
                    if path.is_dir() and not path.is_symlink():  # of a checkpoint that was moved away the link goes
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                except FileNotFoundError:  # another process deletes it, too
                    if not os.path.lexists(path):
                        break
                    time.sleep(0.05)
                else:
                    break
            else:
                raise OSError(errno.ENOTEMPTY, "something in it is listed but not found", str(path))


@contextmanager
def _only_warned() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        warnings.warn(f"an old checkpoint cannot be deleted: {error}; the next save tries again", stacklevel=3)
