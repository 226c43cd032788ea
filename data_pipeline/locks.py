"""Locks on files, so that programs that would disturb one another refuse or wait.

All are `flock`: the kernel owns them, so a lock ends with its process, a killed one too, and nothing has to
be cleaned up by hand. They work between machines on NFS, and on Lustre and the like where mounted with locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from data_pipeline.document import DataError


@contextmanager
def held(path: Path, *, shared: bool = False, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock `path`, together with others who share it, or alone.

    While it cannot be had: wait, or with `refusal` raise DataError with that text at once.
    """
    with open(path, "a+b") as file:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            _lock(file, path, kind | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise DataError(str(refusal)) from None
        yield


class Taken(RuntimeError):
    """Another process holds a lock; `by` is what it wrote about itself, empty where it wrote nothing."""

    def __init__(self, path: Path, by: str) -> None:
        super().__init__(f"{path} is held by {by or 'another process'}")
        self.by = by


def take(path: Path, *, shared: bool = False) -> IO[bytes]:
    """Hold the lock `path` until the file returned is closed, or this process ends; at once, or raise Taken.

    Who holds it alone is named in it, by process and host. Raises DataError where the file system has no locks.
    """
    file = open(path, "a+b")
    try:
        _lock(file, path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        by = file.read(200).decode(errors="replace").strip()
        file.close()
        raise Taken(path, by) from None
    except BaseException:
        file.close()
        raise
    with suppress(OSError):  # on a full disk nobody is named
        file.truncate(0)
        file.write(b"" if shared else f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
    return file


def _lock(file: IO[bytes], path: Path, kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise DataError(
            f"the file system of {path} has no file locks ({error.strerror}), without which two programs could"
            " write over one another; mount it with locks (flock), or use another disk"
        ) from error


@contextmanager
def at_work(lock: str, report: Callable[[None], None]) -> Iterator[None]:
    """Hold the lock of a build's workers, shared, while one of its jobs runs.

    `report(None)` asks, with the lock held, whether the build still lives, and raises where it does not: a worker
    that was given its job just before its build was killed must not begin to write, since the next build may have
    found this lock free.
    """
    with held(Path(lock), shared=True):
        report(None)
        yield


def holder(path: Path) -> str:
    """Who holds the lock `path` alone, as that one wrote it there."""
    with suppress(OSError):
        return path.read_bytes()[:200].decode(errors="replace").strip() or "another process"
    return "another process"


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock `path` at this moment."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
