"""The chunk: a stretch of one source's token stream on disk, and the states of the stream at its two ends.

Format version 1, all numbers little-endian and unsigned:

    offset  bytes  header (128 bytes)
         0      8  magic: the ASCII letters MOEPPSPL
         8      4  format version: 1
        12      4  token width w in bytes, 2 or 4
        16      8  number n of the chunk: it holds tokens nT to (n + 1)T - 1 of the stream
        24      8  T, tokens
        32      8  J, bytes of the states
        40     16  identity of the spool: a hash of everything its tokens depend on
        56     16  BLAKE2b-128 of the bytes before this one and of all that follow the header
        72     56  zeros

       128    w*T  tokens
                J  states: JSON, {"before": state, "after": state}, see `linear.SourceState`

A chunk is written under a temporary name, synced and renamed: a file that bears a chunk's name is complete. With
its states any chunk is a place from which the stream can be continued, and from which it can be made again.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from data_pipeline.atomic import commit, create_beside
from data_pipeline.document import DataError
from data_pipeline.spool.linear import SourceState

MAGIC = b"MOEPPSPL"
VERSION = 1
HEADER_BYTES = 128
_LAYOUT = struct.Struct("<8sIIQQQ16s")
_SUFFIX = ".tokens"


@dataclass(frozen=True, slots=True)
class States:
    """Where a source's stream was at the two ends of a chunk."""

    before: SourceState
    after: SourceState


_STATES = TypeAdapter(States)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk open for reading."""

    tokens: np.ndarray
    """Unsigned integers, 1-D, read-only: a view of the file, whose pages are read when touched."""
    states: States


def chunk_path(folder: Path, number: int) -> Path:
    """Where chunk `number` lies in a source's folder."""
    return folder / f"{number:010d}{_SUFFIX}"


def chunk_numbers(folder: Path) -> list[int]:
    """The chunks there are in a source's folder, ascending."""
    return sorted(int(path.name.removesuffix(_SUFFIX)) for path in folder.glob(f"[0-9]*{_SUFFIX}"))


def state_bytes(files: int) -> int:
    """Most that the states of a chunk take when `files` are open side by side."""
    return 2 * (300 + 120 * files)


def write_chunk(path: Path, tokens: np.ndarray, states: States, *, number: int, identity: bytes) -> None:
    """Write a chunk atomically. tokens: 1-D, of the stored type. identity: 16 bytes."""
    facts = orjson.dumps(states)
    fields = _LAYOUT.pack(MAGIC, VERSION, tokens.itemsize, number, len(tokens), len(facts), identity)
    with create_beside(path) as file:
        try:
            file.write((fields + _digest(fields, tokens, facts)).ljust(HEADER_BYTES, b"\0"))
            file.write(tokens.data)
            file.write(facts)
            commit(file, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def open_chunk(path: Path, *, number: int, identity: bytes) -> Chunk | None:
    """Open a chunk and check all of it; None where there is none, or one of another spool."""
    try:
        raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # numpy maps no empty file
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; each chunk in use takes a file descriptor, so where these are too"
            " few raise ulimit -n, or lower data.shuffle_window"
        ) from error
    header = _read_header(raw[:HEADER_BYTES].tobytes(), path)
    if header.identity != identity:
        return None
    if header.number != number or len(raw) != header.states_offset + header.states_bytes:
        raise _damaged(path, "its number or size is not what its header says")
    tokens = raw[HEADER_BYTES : header.states_offset].view(f"<u{header.width}")
    facts = raw[header.states_offset :].tobytes()
    if header.digest != _digest(header.fields, tokens, facts):
        raise _damaged(path, "its checksum does not match")
    return Chunk(tokens, _parse_states(facts, path))


def read_states(path: Path, *, identity: bytes) -> States | None:
    """The states of a chunk without its tokens; None where it is of another spool, or gone."""
    try:
        with open(path, "rb") as file:
            header = _read_header(file.read(HEADER_BYTES), path)
            file.seek(header.states_offset)
            facts = file.read()
    except FileNotFoundError:
        return None
    return _parse_states(facts, path) if header.identity == identity else None


@dataclass(frozen=True, slots=True)
class _Header:
    fields: bytes
    """What the checksum covers of it."""
    width: int
    number: int
    states_offset: int
    states_bytes: int
    identity: bytes
    digest: bytes


def _read_header(raw: bytes, path: Path) -> _Header:
    if len(raw) < HEADER_BYTES:
        raise _damaged(path, "it ends within its header")
    fields = raw[: _LAYOUT.size]
    magic, version, width, number, count, length, identity = _LAYOUT.unpack(fields)
    if magic != MAGIC or version != VERSION or width not in (2, 4):
        raise _damaged(path, f"it begins with {fields[:12]!r}")
    digest = raw[_LAYOUT.size : _LAYOUT.size + 16]
    return _Header(fields, width, number, HEADER_BYTES + count * width, length, identity, digest)


def _parse_states(facts: bytes, path: Path) -> States:
    try:
        return _STATES.validate_json(facts)
    except ValidationError as error:
        raise _damaged(path, error.errors()[0]["msg"]) from None


def _digest(fields: bytes, tokens: np.ndarray, facts: bytes) -> bytes:
    digest = hashlib.blake2b(fields, digest_size=16)
    digest.update(tokens.data)
    digest.update(facts)
    return digest.digest()


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} is damaged ({what}); delete it and start the run again, it will be made anew")
