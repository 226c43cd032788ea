"""Tensors in a checkpoint's files: written from where they are, read by range.

Every file is a safetensors file: 8 bytes with the length of the JSON that follows, the JSON, padded with spaces, that
says where each tensor lies, and the tensors' bytes. A tensor is 1-D, fp32, and called `kind|parameter|start`.

A reader says all it wants at once, for then every chunk that is needed is read just once, in the order of the files.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp_ds.checkpoint.chunks import ANOTHER, CHUNK_BYTES, HEADER_ALIGNMENT, ChunkReader, write_chunks
from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint

ELEMENT = 4
"""Bytes of an fp32 number."""
_LENGTH = 8


@dataclass(frozen=True)
class Piece:
    """A stored range of a parameter: elements start..stop, from byte `offset` of `file` on."""

    start: int
    stop: int
    file: str
    offset: int


@dataclass(frozen=True)
class Wanted:
    """A range of a parameter that is to be read: elements from `start` on, into the 1-D fp32 `target`."""

    kind: str
    name: str
    start: int
    target: Tensor


def write_fragments(path: Path, tensors: Mapping[tuple[str, str, int], Tensor]) -> dict[str, Any]:
    """Write 1-D fp32 tensors by (kind, parameter, start); return the file's note for the index. See `write_chunks`.

    They are written from where they are: of a tensor on a device a chunk at a time comes to the host.
    """
    header: dict[str, Any] = {}
    size = 0
    for (kind, name, start), tensor in tensors.items():
        offsets = [size, size := size + tensor.nbytes]
        header[f"{kind}|{name}|{start}"] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % HEADER_ALIGNMENT)
    if len(text) > CHUNK_BYTES - HEADER_ALIGNMENT:
        raise CheckpointError(f"{path} cannot be written: {len(tensors)} fragments are too many for one file")
    return write_chunks(path, len(text).to_bytes(_LENGTH, "little") + text, _bytes_of(tensors.values()))


def _bytes_of(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"a fragment is {tensor.dtype}; checkpoints hold torch.float32")
        for part in tensor.detach().split(CHUNK_BYTES // ELEMENT):
            if len(part):
                yield memoryview(part.cpu().contiguous().numpy()).cast("B")


class StoredTensors:
    """What the files of a checkpoint hold, by (kind, parameter) and range.

    Raises DamagedCheckpoint for files that are missing, cut off, changed, or hold no fragments.
    """

    def __init__(self, folder: Path, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """Read the files' headers. notes: of the index, by file."""
        self.chunks = ChunkReader(folder, notes)
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        for name, note in notes.items():
            try:
                for kind, parameter, piece in _headings(name, bytes(self.chunks.header(name)), note["bytes"]):
                    self._pieces.setdefault((kind, parameter), []).append(piece)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if isinstance(error, DamagedCheckpoint):
                    raise
                raise DamagedCheckpoint(
                    f"{folder / name} holds no fragments of a checkpoint: {error}; {ANOTHER}"
                ) from error
        for found in self._pieces.values():
            found.sort(key=lambda piece: piece.start)

    def check_whole(self, shapes: Mapping[str, list[int]], kinds: Iterable[str]) -> None:
        """Every element of every parameter must be stored exactly once, in each of the kinds."""
        for kind in kinds:
            for name, shape in shapes.items():
                reached = 0
                for piece in self._pieces.get((kind, name), []):
                    if piece.start < reached:
                        twice = f"elements {piece.start} to {min(reached, piece.stop)} are there twice"
                        raise DamagedCheckpoint(f"{kind} of {name}: {twice}; {ANOTHER}")
                    if piece.start > reached:
                        break
                    reached = piece.stop
                if reached != prod(shape):
                    raise DamagedCheckpoint(
                        f"{kind} of {name}: without a gap the checkpoint holds {reached} of its "
                        f"{prod(shape)} elements; a fragment is missing, {ANOTHER}"
                    )

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Fill all targets; elements that no file has are left as they were, which `check_whole` excludes.

        Beside the targets it takes one chunk of memory.
        """
        copies = sorted((copy for one in wanted for copy in self._copies(one)), key=lambda copy: copy[:2])
        for file, offset, target in copies:
            while len(target):
                chunk = self.chunks.rest_of_chunk(file, offset)
                values = torch.frombuffer(chunk, dtype=torch.float32, count=min(len(chunk) // ELEMENT, len(target)))
                target[: len(values)].copy_(values)
                target, offset = target[len(values) :], offset + values.nbytes

    def stream(self, *kinds: str) -> Iterator[tuple[str, str, int, Tensor]]:
        """All of these kinds in the order of the files: kind, parameter, first element, values, on the CPU.

        Those are at most 16 MiB. Kinds lie beside one another, so that together they are read once.
        """
        places = (
            (piece.file, piece.offset, kind, name, piece)
            for (kind, name), pieces in self._pieces.items()
            for piece in pieces
            if kind in kinds
        )
        for *_, kind, name, piece in sorted(places, key=lambda place: place[:2]):
            for start in range(piece.start, piece.stop, CHUNK_BYTES // ELEMENT):
                values = torch.empty(min(CHUNK_BYTES // ELEMENT, piece.stop - start))
                self.read([Wanted(kind, name, start, values)])
                yield kind, name, start, values

    def _copies(self, wanted: Wanted) -> Iterator[tuple[str, int, Tensor]]:
        """File, byte and target of each stored range that a wanted one meets."""
        pieces = self._pieces.get((wanted.kind, wanted.name), [])
        start, stop = wanted.start, wanted.start + wanted.target.numel()
        for piece in pieces[max(bisect(pieces, start, key=lambda piece: piece.start) - 1, 0) :]:
            first, last = max(piece.start, start), min(piece.stop, stop)
            if piece.start >= stop:
                break
            if first < last:
                target = wanted.target[first - start : last - start]
                yield piece.file, piece.offset + (first - piece.start) * ELEMENT, target


def _headings(file: str, header: bytes, size: int) -> Iterator[tuple[str, str, Piece]]:
    """Kind, parameter and place of every tensor that a file's header names; ValueError if it is not one of ours."""
    if int.from_bytes(header[:_LENGTH], "little") != len(header) - _LENGTH:
        raise ValueError("its header has another length than it says")
    entries = json.loads(header[_LENGTH:])
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    spans = []
    for key, entry in entries.items():
        kind, parameter, start = key.split("|")
        if entry["dtype"] != "F32":
            raise ValueError(f"{key} is {entry['dtype']} instead of F32")
        (length,) = entry["shape"]
        begin, end = entry["data_offsets"]
        if not (type(length) is type(begin) is type(end) is int) or end - begin != length * ELEMENT:
            raise ValueError(f"{key} has another size than its shape")
        if not 0 <= begin <= end <= size - len(header) or begin % ELEMENT:
            raise ValueError(f"{key} lies outside of the file")
        spans.append((begin, end))
        yield kind, parameter, Piece(int(start), int(start) + length, file, len(header) + begin)
    spans.sort()  # a file never gives more than it holds
    if [begin for begin, _ in spans] != [0, *(end for _, end in spans)][: len(spans)]:
        raise ValueError("its fragments do not lie one behind the other")
