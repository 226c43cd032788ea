"""The spool's folder: who reads it, what each reader still needs, and which process fills it.

    DIR/spool.json                       what its tokens depend on; what another run left is cleared
    DIR/readers/<name>.lock, .json       a pair per reading process: alive while locked; what it needs
    DIR/sources/<source>/<chunk>.tokens  stretches of a source's stream (see `chunks`)
    DIR/sources/<source>/.lock           held by the builder process that fills the source's folder
    DIR/held_out/<source>/               held-out documents, as many as evaluation asks for (see `held_out`)
    DIR/quarantine/<corpus>/<file>.jsonl the lines that are no documents

All locks are the kernel's: they end with their process, however it ends, and nothing has to be cleaned up by
hand. The folder may lie on a disk of one machine or on one that several share.
"""

from __future__ import annotations

import fcntl
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import orjson

from data_pipeline.atomic import write_atomically
from data_pipeline.document import DataError
from data_pipeline.locks import held

_ABOUT = "spool.json"
_HELD_OUT = "held_out"
_LOCK = ".lock"
_SETTLED = b"settled"

Need = Mapping[str, int]
"""For each source the first chunk that a reader still needs."""


class Reader:
    """This process as one that reads the spool: while it lives no chunk is deleted that it may ask for.

    Until it says what it needs, it may ask for all. Made by `enter`.
    """

    def __init__(self, root: Path) -> None:
        self._need = root / "readers" / f"{uuid.uuid4().hex}.json"
        self._need.parent.mkdir(exist_ok=True)
        self._lock = open(self._need.with_suffix(".lock"), "ab")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def need(self, need: Need) -> None:
        """Say what is needed from now on."""
        try:
            write_atomically(self._need, orjson.dumps(dict(need)))
        except OSError as error:
            raise DataError(f"cannot write {self._need}: {error.strerror}; make room for the spool") from error

    def close(self) -> None:
        """Need nothing any more."""
        self._need.unlink(missing_ok=True)
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()


def enter(root: Path, order: Mapping[str, Any]) -> Reader:
    """Join the readers of the spool at `root`, which is made, or cleared of what was made for another `order`.

    Raises DataError when the folder is none of a spool, or other processes read it in another order.
    """
    root.mkdir(parents=True, exist_ok=True)
    with held(root / ".lock"):
        alive = _clear_dead_readers(root)
        before = _read_about(root)
        if before != dict(order):
            if alive:
                changed = [key for key in sorted({*before, *order}) if before.get(key) != order.get(key)]
                raise DataError(
                    f"the spool {root} is in use by a run with other data or settings ({', '.join(changed)} differ);"
                    " give this run another folder (data.path), or wait for that one to end"
                )
            _clear(root)
            write_atomically(root / _ABOUT, orjson.dumps(dict(order), option=orjson.OPT_INDENT_2) + b"\n")
        return Reader(root)


def _clear(root: Path) -> None:
    """Delete what was made for another order. Its builders may have a moment to live, so their locks are waited for."""
    for folder in {path.parent for path in (root / "sources").rglob("*") if path.is_file()}:
        with held(folder / _LOCK):
            for path in folder.iterdir():
                if path.name != _LOCK:
                    path.unlink()
    shutil.rmtree(root / "quarantine", ignore_errors=True)


def _clear_dead_readers(root: Path) -> int:
    """How many readers live; the files of the others are deleted."""
    alive = 0
    for lock in (root / "readers").glob("*.lock"):
        if _is_alive(lock):
            alive += 1
        else:
            lock.with_suffix(".json").unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    return alive


def _read_about(root: Path) -> dict[str, Any]:
    try:
        about = orjson.loads((root / _ABOUT).read_bytes())
    except FileNotFoundError:
        others = sorted(path.name for path in root.iterdir() if path.name not in (".lock", _HELD_OUT))
        if others:
            raise DataError(
                f"{root} is no spool: it holds {others[0]} and no {_ABOUT}; with mode: stream name an empty folder, or"
                " one that does not exist (data.path)"
            ) from None
        return {}
    except orjson.JSONDecodeError:
        about = None
    if not isinstance(about, dict):
        raise DataError(f"{root / _ABOUT} is damaged; delete the folder, all of it can be made again")
    return about


def _is_alive(lock: Path) -> bool:
    """Whether a reader holds its lock file, which is not made where it is gone."""
    try:
        with open(lock, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def needed_by_readers(root: Path) -> list[Need | None]:
    """What each living reader needs; None for one that has not said it."""
    needs: list[Need | None] = []
    for lock in sorted((root / "readers").glob("*.lock")):
        if _is_alive(lock):
            try:
                needs.append(orjson.loads(lock.with_suffix(".json").read_bytes()))
            except FileNotFoundError:
                needs.append(None)
    return needs


def source_folder(root: Path, source: str) -> Path:
    """Where the chunks of a source lie."""
    return root / "sources" / source


def lock_source(root: Path, source: str) -> IO[bytes] | None:
    """The lock of the one process that fills a source's folder, to be handed to it; None where it is held."""
    folder = source_folder(root, source)
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / _LOCK, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    return file


def say_settled(root: Path, source: str) -> None:
    """Say, as the holder of a source's lock, that its folder holds the chunks that will be gone on from, no others."""
    (source_folder(root, source) / _LOCK).write_bytes(_SETTLED)


def is_settled(root: Path, source: str) -> bool:
    """Whether the holder of the source's lock has said so."""
    return (source_folder(root, source) / _LOCK).read_bytes() == _SETTLED
