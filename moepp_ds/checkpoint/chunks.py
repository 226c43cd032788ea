"""Files in chunks of at most 16 MiB, each with a checksum: proven on the disk when written, checked when read.

A file is a header, which is a chunk of its own, and data, cut every 16 MiB. Its note, which the index keeps, is

    {"bytes": size of the file, "header": size of the header, "chunks": [xxh3-128 of each chunk, as 32 hex digits]}

1. Write   a chunk's checksum is taken of the bytes that are given to the system.
2. Prove   behind the writer a thread waits, every 64 MiB, until the disk has them, reads them back past the system's
           cache, and compares. So one part is proven while the next is written.
3. Read    whole chunks, each compared with the index; the last one is kept.

The checksums protect from disks, memories and cut-off copies. They are no signature.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from mmap import mmap
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint

CHUNK_BYTES = 16 * 2**20
"""Data of one checksum, and the most that is read where less is wanted."""

HEADER_ALIGNMENT = 4096
"""Headers are multiples of this, so that every chunk starts where a read past the system's cache may start."""

PROVEN_AT_ONCE = 4
"""Chunks for which one wait for the disk must do: every wait holds up all who write to it."""

ANOTHER = "use another checkpoint (in training: --resume PATH)"
"""What an error over a damaged checkpoint advises."""


def digest(content: bytes | memoryview) -> str:
    """The checksum of a chunk: 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(content)


def chunk_ranges(header: int, size: int) -> list[tuple[int, int]]:
    """Where the chunks of a file of `size` bytes lie, the first `header` of which are its header."""
    return [(0, header), *((start, min(start + CHUNK_BYTES, size)) for start in range(header, size, CHUNK_BYTES))]


def write_chunks(path: Path, header: bytes, data: Iterable[memoryview]) -> dict[str, Any]:
    """Write a file, wait until the disk has it, prove it, and return its note.

    data: the bytes behind the header in pieces of any size; each is used before the next is asked for.
    Raises CheckpointError if it cannot be written, or if the disk then holds something else.
    """
    chunks: list[str] = []
    try:
        with path.open("wb") as file, _ReadBack(path, file.fileno()) as proof:
            for chunk in chain([[memoryview(header)]], _regrouped(data)):
                checksum = xxhash.xxh3_128()
                for piece in chunk:
                    checksum.update(piece)
                    file.write(piece)
                file.flush()
                chunks.append(checksum.hexdigest())
                proof.expect(file.tell(), chunks[-1])
            proof.finish()
            os.fsync(file.fileno())
            size = file.tell()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    return {"bytes": size, "header": len(header), "chunks": chunks}


def _regrouped(pieces: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes in lists of CHUNK_BYTES each, the last one of what is left."""
    held: list[memoryview] = []
    room = CHUNK_BYTES
    for piece in pieces:
        while piece:
            part, piece = piece[:room], piece[room:]
            held.append(part)
            room -= len(part)
            if not room:
                yield held
                held, room = [], CHUNK_BYTES
    if held:
        yield held


class _ReadBack:
    """Proves chunks behind a writer, on a thread of its own. On leaving, all of them are proven or an error comes."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._end = 0
        self._waiting: list[tuple[int, int, str]] = []
        self._checks: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-back")
        self._buffer = mmap(-1, CHUNK_BYTES)

    def __enter__(self) -> _ReadBack:
        return self

    def expect(self, stop: int, checksum: str) -> None:
        """From the end of the last chunk to `stop` the file must hold what has this checksum."""
        self._waiting.append((self._end, stop, checksum))
        self._end = stop
        if len(self._waiting) == PROVEN_AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Begin to prove what is written by now."""
        self._checks.append(self._pool.submit(self._prove, self._waiting))
        self._waiting = []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for check in self._checks:
                check.result()

    def _prove(self, chunks: list[tuple[int, int, str]]) -> None:
        os.fdatasync(self._descriptor)
        reader = _open_past_cache(self._path)
        try:
            for start, stop, checksum in chunks:
                os.posix_fadvise(reader, start, stop - start, os.POSIX_FADV_DONTNEED)  # where there is no way past it
                view = memoryview(self._buffer)
                size = _read_into(reader, view, start, stop)
                if size < stop - start or digest(view[: stop - start]) != checksum:
                    raise CheckpointError(
                        f"{self._path} does not hold what was written to it: bytes {start} to {stop} are others; check "
                        "its disk and the memory"
                    )
        finally:
            os.close(reader)


def _open_past_cache(path: Path) -> int:
    """A file opened for reading from the disk itself, where the file system knows how."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY)


def _read_into(descriptor: int, buffer: memoryview, start: int, stop: int) -> int:
    """Fill the buffer with bytes start..stop of a file, or more; return how many there were."""
    filled = 0
    while start + filled < stop:
        count = os.preadv(descriptor, [buffer[filled:]], start + filled)
        if not count:
            break
        filled += count
    return filled


def size_problem(path: Path, size: int) -> str | None:
    """What is wrong with a file that should be there with `size` bytes; None if nothing is."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    if not path.is_file():
        return f"{path} is no file"
    return None if found == size else f"{path} has {found} bytes instead of {size}"


class ChunkReader:
    """Reads a checkpoint's files by whole chunks, every one compared with its checksum. The last one is kept.

    Raises DamagedCheckpoint for what is not as the notes say.
    """

    def __init__(self, folder: Path, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """notes: of each file, as `write_chunks` returned them. Files that are missing or cut off are found here."""
        self._folder, self._notes = folder, notes
        self._ranges = {name: chunk_ranges(note["header"], note["bytes"]) for name, note in notes.items()}
        self._buffer = bytearray()
        self._held: tuple[str, int] | None = None
        for name, note in notes.items():
            problem = size_problem(folder / name, note["bytes"])
            if problem:
                raise DamagedCheckpoint(f"{problem}; {ANOTHER}")

    def header(self, name: str) -> memoryview:
        """The header of a file, until the next call."""
        return self._chunk(name, 0)

    def rest_of_chunk(self, name: str, offset: int) -> memoryview:
        """The data of a file from byte `offset` to the end of the chunk that has it, until the next call."""
        number = 1 + (offset - self._notes[name]["header"]) // CHUNK_BYTES
        return self._chunk(name, number)[offset - self._ranges[name][number][0] :]

    def damage(self, name: str) -> list[str]:
        """What is wrong with each chunk of a file."""
        problems = []
        for number in range(len(self._ranges[name])):
            try:
                self._chunk(name, number)
            except DamagedCheckpoint as error:
                problems.append(str(error))
        return problems

    def _chunk(self, name: str, number: int) -> memoryview:
        start, stop = self._ranges[name][number]
        if len(self._buffer) < stop - start:
            self._buffer = bytearray(stop - start)
        view = memoryview(self._buffer)[: stop - start]
        if self._held == (name, number):
            return view
        self._held = None
        path = self._folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                size = _read_into(descriptor, view, start, stop)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error}; {ANOTHER}") from error
        if size < stop - start or digest(view) != self._notes[name]["chunks"][number]:
            raise DamagedCheckpoint(f"{path} does not match its checksums in bytes {start} to {stop}; {ANOTHER}")
        self._held = (name, number)
        return view
