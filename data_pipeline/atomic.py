"""Files that are there in full or not at all: written under a temporary name, synced, renamed.

A temporary name is `.unfinished-`, eight random characters, `-` and the name that the file will have, so that
what a killed program left of one file can be cleared without touching a file that another is writing.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

TEMPORARY = ".unfinished-"
"""Prefix of files being written."""
_RANDOM = 8


def create_beside(path: Path) -> IO[bytes]:
    """Open a new temporary file in `path`'s folder, which is made; `commit` it or delete it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.NamedTemporaryFile(prefix=TEMPORARY, suffix=f"-{path.name}", dir=path.parent, delete=False)


def commit(file: IO[bytes], path: Path) -> None:
    """Sync a file made by `create_beside(path)` and give it its name, so that a power cut cannot undo it."""
    file.flush()
    os.fchmod(file.fileno(), 0o644)
    os.fsync(file.fileno())
    os.replace(file.name, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names given, changed and taken away in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file; an exception on the way leaves what was there before."""
    with create_beside(path) as file:
        try:
            file.write(data)
            commit(file, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def remove(path: Path) -> None:
    """Delete a file, so that a power cut cannot bring it back; nothing happens where there is none."""
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def clear_unfinished(folder: Path) -> None:
    """Delete what interrupted writes have left anywhere under `folder`; nobody may be writing there."""
    for path in folder.rglob(TEMPORARY + "*"):
        path.unlink(missing_ok=True)


def clear_unfinished_of(path: Path) -> None:
    """Delete what interrupted writes of `path` have left; nobody may be writing that file."""
    if path.parent.is_dir():
        for entry in os.scandir(path.parent):
            if entry.name.startswith(TEMPORARY) and entry.name[len(TEMPORARY) + _RANDOM :] == f"-{path.name}":
                Path(entry.path).unlink(missing_ok=True)
