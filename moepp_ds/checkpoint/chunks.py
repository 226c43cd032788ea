"""Files in chunks of at most 16 MiB, each with a checksum: proven on the disk when written, checked when read.

A file is a header, which is a chunk of its own, and data, cut every 16 MiB. Its note, which the index keeps, is

    {"bytes": size of the file, "header": size of the header, "chunks": [xxh3-128 of each chunk, as 32 hex digits]}

1. Write   a chunk is gathered in a buffer, its checksum taken there, and goes to the disk past the system's cache:
           faster than through it, and what training has read stays cached.
2. Prove   what the disk then holds is read back, past the cache again, and compared.
3. Read    whole chunks, each compared with the index; the last one is kept.

The checksums protect from disks, memories and cut-off copies. They are no signature.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fcntl import F_GETFL, F_SETFL, fcntl
from itertools import chain
from mmap import mmap
from pathlib import Path
from typing import Any

import xxhash

from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint

CHUNK_BYTES = 16 * 2**20
"""Data of one checksum, and the most that is read where less is wanted."""

HEADER_ALIGNMENT = 4096
"""Headers are multiples of this, so that every chunk starts where a disk can be written and read past the cache."""

ANOTHER = "use another checkpoint (in training: --resume PATH)"
"""What an error over a damaged checkpoint advises."""

_PASSING = frozenset(
    {
        *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ESHUTDOWN),
    }
)
"""Errors of this machine, or of the way to a file system, that say nothing of a file."""


def digest(content: bytes | memoryview) -> str:
    """The checksum of a chunk: 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(content)


def chunk_ranges(header: int, size: int) -> list[tuple[int, int]]:
    """Where the chunks of a file of `size` bytes lie, the first `header` of which are its header."""
    return [(0, header), *((start, min(start + CHUNK_BYTES, size)) for start in range(header, size, CHUNK_BYTES))]


def count_chunks(header: int, size: int) -> int:
    """How many ranges `chunk_ranges` returns; whatever the size is said to be, it takes no memory."""
    return 1 + len(range(header, size, CHUNK_BYTES))


def write_chunks(path: Path, header: bytes, data: Iterable[memoryview]) -> dict[str, Any]:
    """Write a file, wait until the disk has it, and return its note.

    data: the bytes behind the header in pieces of any size; each is used before the next is asked for.
    Raises CheckpointError if it cannot be written.
    """
    chunks: list[str] = []
    buffer, size = memoryview(mmap(-1, CHUNK_BYTES)), 0  # aligned, as a disk wants it
    try:
        with _descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            for length in chain(_fill(buffer, [memoryview(header)]), _fill(buffer, data)):
                chunks.append(digest(buffer[:length]))
                _write_all(file, buffer[: length + -length % HEADER_ALIGNMENT], size)
                size += length
            os.ftruncate(file, size)  # the last chunk was written with what followed it in the buffer
            os.fsync(file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    return {"bytes": size, "header": len(header), "chunks": chunks}


def prove_chunks(path: Path, note: Mapping[str, Any]) -> None:
    """Read a file that was just written back from the disk; CheckpointError if it is not what the note says."""
    buffer = memoryview(mmap(-1, CHUNK_BYTES))
    try:
        with _descriptor(path, os.O_RDONLY) as file:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # where there is no way past the cache
            for (start, stop), checksum in zip(chunk_ranges(note["header"], note["bytes"]), note["chunks"]):
                size = _read_into(file, buffer, start, stop)
                if size < stop - start or digest(buffer[: stop - start]) != checksum:
                    raise CheckpointError(
                        f"{path} does not hold what was written to it: bytes {start} to {stop} are others; check its "
                        "disk and the memory"
                    )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read back: {error}") from error


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    """A file opened past the system's cache, where the file system knows how."""
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fill(buffer: memoryview, pieces: Iterable[memoryview]) -> Iterator[int]:
    """Gather the pieces in the buffer; yields how many bytes it holds when it is full, and at the end of the rest."""
    length = 0
    for piece in pieces:
        while piece:
            part, piece = piece[: len(buffer) - length], piece[len(buffer) - length :]
            buffer[length : length + len(part)] = part
            length += len(part)
            if length == len(buffer):
                yield length
                length = 0
    if length:
        yield length


def _write_all(descriptor: int, content: memoryview, start: int) -> None:
    """Write all of the content at byte `start` of a file."""
    written = 0
    while written < len(content):
        try:
            written += os.pwrite(descriptor, content[written:], start + written)
        except OSError as error:
            _go_through_cache(descriptor, error)


def _read_into(descriptor: int, buffer: memoryview, start: int, stop: int) -> int:
    """Fill the buffer with bytes start..stop of a file, or more; return how many there were."""
    filled = 0
    while start + filled < stop:
        try:
            count = os.preadv(descriptor, [buffer[filled:]], start + filled)
        except OSError as error:
            _go_through_cache(descriptor, error)
            continue
        if not count:
            break
        filled += count
    return filled


def _go_through_cache(descriptor: int, error: OSError) -> None:
    """Raise the error unless it means that the disk asks for another alignment of what goes past the cache."""
    flags = fcntl(descriptor, F_GETFL)
    if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
        raise error
    fcntl(descriptor, F_SETFL, flags & ~os.O_DIRECT)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What to raise for a file that cannot be read: damage, or what may pass and says nothing of the checkpoint.

    For damage an older checkpoint is taken, and the newer one is deleted in the end.
    """
    if error.errno in _PASSING:
        return CheckpointError(f"{path} cannot be read now: {error}; start again when its file system can")
    return DamagedCheckpoint(f"{path} cannot be read: {error}; {ANOTHER}")


def size_problem(path: Path, size: int) -> str | None:
    """What is wrong with a file that should be there with `size` bytes; None if nothing is.

    Raises CheckpointError where that cannot be seen now.
    """
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        if error.errno in _PASSING:
            raise unreadable(path, error) from error
        return f"{path} cannot be read: {error}"
    if not path.is_file():
        return f"{path} is no file"
    return None if found == size else f"{path} has {found} bytes instead of {size}"


class ChunkReader:
    """Reads a checkpoint's files by whole chunks, every one compared with its checksum. The last one is kept.

    Raises DamagedCheckpoint for what is not as the notes say, CheckpointError for what cannot be read now.
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
            raise unreadable(path, error) from error
        if size < stop - start or digest(view) != self._notes[name]["chunks"][number]:
            raise DamagedCheckpoint(f"{path} does not match its checksums in bytes {start} to {stop}; {ANOTHER}")
        self._held = (name, number)
        return view
