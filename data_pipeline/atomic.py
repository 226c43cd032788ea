"""Files that are there in full or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

TEMPORARY = ".unfinished-"
"""Prefix of files being written; what a killed program leaves under it is cleared by the next build."""


def create_beside(path: Path) -> IO[bytes]:
    """Open a new temporary file in `path`'s folder, which is made; `commit` it or delete it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=path.parent, delete=False)


def commit(file: IO[bytes], path: Path) -> None:
    """Sync a file made by `create_beside(path)` and give it its name, so that a power cut cannot undo it."""
    file.flush()
    os.fchmod(file.fileno(), 0o644)
    os.fsync(file.fileno())
    os.replace(file.name, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file; an exception on the way leaves what was there before."""
    with create_beside(path) as file:
        try:
            file.write(data)
            commit(file, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def clear_unfinished(folder: Path) -> None:
    """Delete what interrupted writes have left anywhere under `folder`; nobody may be writing there."""
    for path in folder.rglob(TEMPORARY + "*"):
        path.unlink(missing_ok=True)
