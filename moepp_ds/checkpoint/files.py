"""A checkpoint's files: written so that they are complete or absent, read so that damage is found first."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moepp_ds.checkpoint.errors import CheckpointError

FORMAT = 1
CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Piece:
    """A stored range of a parameter: elements start..stop, in tensor `key` of `file`."""

    start: int
    stop: int
    key: str
    file: Path


def write_fragments(file: Path, tensors: Mapping[tuple[str, str, int], Tensor]) -> None:
    """Write 1-D tensors by (kind, parameter, start), and beside the file a note of its size and checksums."""
    named = {"|".join(map(str, key)): tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        save_file(named, file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be written: {error}") from error
    _fsync(file)
    note = {"bytes": file.stat().st_size, "chunks": _checksums(file)}
    file.with_suffix(".json").write_text(json.dumps(note))


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Gather the notes of all ranks into index.json; with it the folder is a complete checkpoint."""
    files = {}
    for note in sorted(folder.glob("rank-*.json")):
        files[note.with_suffix(".safetensors").name] = json.loads(note.read_text())
        note.unlink()
    _write(folder / "index.json", _index_text({"format": FORMAT, **content, "files": files}))


def publish(partial: Path, final: Path, *, keep: int) -> None:
    """Give a complete checkpoint its name, then move `latest`, and then delete what is not wanted now."""
    root, replaced = final.parent, partial.with_suffix(".replaced")
    if final.exists():  # a run that was resumed from an earlier checkpoint comes by here again
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    _fsync(root)
    _write(root / "latest", final.name + "\n")
    for folder in root.glob(".step-*"):  # also what a killed run left half-written
        shutil.rmtree(folder)
    # Later steps are of the part of the run that a resumed one left behind: they do not count, and they stay.
    complete = [folder for folder in sorted(root.glob("step-*")) if (folder / "index.json").exists()]
    for folder in complete[: complete.index(final) + 1][:-keep]:
        shutil.rmtree(folder)


def find_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, as `latest` names it; None if there is none."""
    latest = root / "latest"
    if not latest.exists():
        return None
    folder = root / latest.read_text().strip()
    if not (folder / "index.json").exists():
        raise CheckpointError(
            f"{latest} names {folder.name}, which is no checkpoint; name one with --resume PATH"
        )
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint; refuses folders that are none, other formats, and a changed index."""
    path = folder / "index.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it holds no index.json")
    try:
        text = path.read_text(encoding="utf-8")
        index = json.loads(text)
        found = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, this version reads {FORMAT}; use the version that wrote it"
        )
    index.pop("checksum", None)
    if text != _index_text(index):
        raise CheckpointError(f"{path} does not match its checksum; resume from another checkpoint")
    return index


def _index_text(content: Mapping[str, Any]) -> str:
    """The index as it is stored: exactly one text for a content, with the checksum of the rest at its end."""
    checksum = _digest(json.dumps(content, indent=1).encode())
    return json.dumps({**content, "checksum": checksum}, indent=1) + "\n"


def verify_files(folder: Path, files: Mapping[str, Any], *, rank: int, world: int) -> None:
    """Compare one rank's share of the files, every world-th one, with the index's sizes and checksums."""
    for name in sorted(files)[rank::world]:
        path, expected, problem = folder / name, files[name], ""
        if not path.is_file():
            problem = f"{path} is missing"
        elif path.stat().st_size != expected["bytes"]:
            problem = f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        elif _checksums(path) != expected["chunks"]:
            problem = f"{path} does not match its checksums"
        if problem:
            raise CheckpointError(f"{problem}; resume from another checkpoint with --resume PATH")


def find_pieces(folder: Path, files: Mapping[str, Any]) -> dict[tuple[str, str], list[Piece]]:
    """Where every stored range is, by (kind, parameter), in order of place; reads only the files' headers."""
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as stored:
            for key in stored.keys():
                kind, parameter, start = key.split("|")
                (length,) = stored.get_slice(key).get_shape()
                piece = Piece(int(start), int(start) + length, key, folder / name)
                pieces.setdefault((kind, parameter), []).append(piece)
    for found in pieces.values():
        found.sort(key=lambda piece: piece.start)
    return pieces


def check_whole(
    pieces: Mapping[tuple[str, str], list[Piece]], shapes: Mapping[str, list[int]], kinds: tuple[str, ...]
) -> None:
    """Every element of every parameter must be stored exactly once."""
    for kind in kinds:
        for name, shape in shapes.items():
            reached = 0
            for piece in pieces.get((kind, name), []):
                if piece.start != reached:
                    break
                reached = piece.stop
            if reached != prod(shape):
                raise CheckpointError(
                    f"{kind} of {name}: without gap or overlap the checkpoint holds {reached} of its "
                    f"{prod(shape)} elements; a fragment is missing, resume from another checkpoint"
                )


def read_range(target: Tensor, start: int, pieces: list[Piece]) -> None:
    """Copy the elements of a parameter from `start` on into the 1-D `target`."""
    stop = start + target.numel()
    for piece in pieces:
        first, last = max(piece.start, start), min(piece.stop, stop)
        if first >= last:
            continue
        with safe_open(piece.file, framework="pt") as stored:
            values = stored.get_slice(piece.key)[first - piece.start : last - piece.start]
        target[first - start : last - start].copy_(values)


def shape_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The parameters that two models do not have in common, a line for each of the first 20."""
    lines = [
        f"  {name}: checkpoint {stored.get(name, 'lacks it')}, model {wanted.get(name, 'lacks it')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    return "\n".join(lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else []))


def _checksums(path: Path) -> list[str]:
    """The checksum of every 16 MiB of a file."""
    with path.open("rb") as stream:
        return [_digest(chunk) for chunk in iter(lambda: stream.read(CHUNK_BYTES), b"")]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _write(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new text, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _fsync(partial)
    partial.rename(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
