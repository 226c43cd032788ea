"""A checkpoint's files: written so that they are complete or absent, read so that damage is found first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.atomic import TEMPORARY, write_atomically
from moepp_ds.checkpoint.errors import CheckpointError

FORMAT = 1
CHUNK_BYTES = 16 * 2**20

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What is stored of a parameter: its fp32 weight and AdamW's two moments."""

_ANOTHER = "use another checkpoint (in training: --resume PATH)"


class _FileNote(BaseModel):
    """What the index says of a file."""

    bytes: int = Field(ge=0)
    chunks: list[str]


class _Routing(BaseModel):
    """What routing remembers, as `controller.RoutingState` has it."""

    bias_LE: list[list[FiniteFloat]] | None
    share_LE: list[list[FiniteFloat]] | None


class _Data(BaseModel):
    """Where a loader was."""

    order: dict[str, Any] = {}


class _Index(BaseModel):
    """What every index holds, and what many do; the rest belongs to the run."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: int = Field(ge=0)
    tokens: int = Field(default=0, ge=0)
    data: _Data | None = None
    routing: _Routing | None = None
    versions: dict[str, str] | None = None
    origin: dict[str, Any] | None = None
    parameters: dict[str, list[Annotated[int, Field(ge=1)]]]
    files: dict[Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")], _FileNote]  # no path leads out of the folder


@dataclass(frozen=True)
class Piece:
    """A stored range of a parameter: elements start..stop, in tensor `key` of `file`."""

    start: int
    stop: int
    key: str
    file: Path


def write_fragments(file: Path, tensors: Mapping[tuple[str, str, int], Tensor]) -> dict[str, Any]:
    """Write 1-D tensors by (kind, parameter, start); return the file's note for the index: size and checksums.

    What the disk then holds is compared with the tensors bit for bit, before the checksums make it the truth.
    """
    named = {"|".join(map(str, key)): tensor.detach() for key, tensor in tensors.items()}
    try:
        save_file({key: tensor.cpu().contiguous() for key, tensor in named.items()}, file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be written: {error}") from error
    file.chmod(0o644)  # readable by whom a shared file system lets near it, as the index is
    _fsync(file, forget=True)
    try:
        damaged = _first_difference(file, named)
    except SafetensorError as error:
        damaged = f"its header ({error})"
    if damaged:
        raise CheckpointError(f"{file} does not hold what was written to it: {damaged}; check its disk and the memory")
    return {"bytes": file.stat().st_size, "chunks": _checksums(file)}


def _first_difference(file: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """The first part of a file that is not what was written, in 16 MiB pieces; None if it holds just the tensors."""
    with safe_open(file, framework="pt") as stored:
        if set(stored.keys()) != tensors.keys():
            return "its header"
        for key, tensor in tensors.items():
            values, step = stored.get_slice(key), CHUNK_BYTES // tensor.element_size()
            if values.get_shape() != [tensor.numel()]:
                return key
            for start in range(0, tensor.numel(), step):
                found, meant = values[start : start + step], tensor[start : start + step].cpu()
                if found.dtype != meant.dtype or not torch.equal(found.view(torch.uint8), meant.view(torch.uint8)):
                    return key
    return None


def write_index(folder: Path, content: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write index.json with the notes of all ranks' files; with it the folder is a complete checkpoint.

    The files must be visible from here, in their sizes: ranks that do not share the folder are found out.
    """
    for name, note in files.items():
        problem = _size_problem(folder / name, note["bytes"])
        if problem:
            raise CheckpointError(f"{problem}, as rank 0 sees it; the run folder must be one that all nodes share")
    text = _index_text({"format": FORMAT, **content, "files": files})
    write_atomically(folder / "index.json", text.encode())


def publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name, and then move `latest`."""
    # A run that was resumed from an earlier checkpoint comes by here again.
    replaced = _set_aside(final) if final.exists() else None
    try:
        partial.rename(final)
    except OSError:
        if replaced is not None:
            replaced.rename(final)
        raise
    _fsync(final.parent)
    write_atomically(final.parent / "latest", f"{final.name}\n".encode())


def delete_old(newest: Path, *, keep: int) -> None:
    """Delete checkpoints before the newest one but for `keep`, it included, and what is left of unfinished saves.

    What cannot be deleted is warned of and stays; the next save tries again.
    """
    root = newest.parent
    with _only_warned():
        # Later steps are of the part of the run that a resumed one left behind: they do not count, and they stay.
        complete = [folder for folder in sorted(root.glob("step-*")) if (folder / "index.json").exists()]
        for folder in complete[: complete.index(newest) + 1][:-keep]:
            with _only_warned():
                _set_aside(folder)
        for folder in root.glob(".step-*"):
            with _only_warned():
                shutil.rmtree(folder)
        for file in root.glob(f"{TEMPORARY}*"):
            with _only_warned():
                file.unlink()


def _set_aside(folder: Path) -> Path:
    """Hide a checkpoint under a name that is free, for deletion: a half-deleted one is never seen as a checkpoint."""
    names = (folder.with_name(f".{folder.name}.old-{number}") for number in count())
    return folder.rename(next(path for path in names if not path.exists()))


@contextmanager
def _only_warned() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        warnings.warn(f"an old checkpoint cannot be deleted: {error}; the next save tries again", stacklevel=3)


def find_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, as `latest` names it; None if there is none."""
    latest = root / "latest"
    if not latest.exists():
        return None
    name = latest.read_text(errors="replace").strip()
    if not re.fullmatch(r"step-\d+", name) or not (root / name / "index.json").exists():
        raise CheckpointError(f"{latest} names {name[:40]}, which is no checkpoint; name one by its folder")
    return root / name


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint, its checksum included; refuses other folders and formats, and a changed index."""
    path = folder / "index.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it holds no index.json")
    try:
        text = path.read_text(encoding="utf-8")
        index = json.loads(text)
        found = index["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_ANOTHER}") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, this version reads {FORMAT}; use the version that wrote it"
        )
    if text != _index_text(index):
        raise CheckpointError(f"{path} does not match its checksum; {_ANOTHER}")
    try:
        _Index.model_validate(index)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is no index of a checkpoint: {place}: {first['msg']}; {_ANOTHER}") from None
    return index


def stored_kinds(index: Mapping[str, Any]) -> tuple[str, ...]:
    """What a checkpoint holds of every parameter: all of KINDS, as those do that do not say, or weights alone."""
    kinds = tuple(index.get("kinds", KINDS))
    if kinds not in (KINDS, KINDS[:1]):
        raise CheckpointError(f"a checkpoint holds {', '.join(KINDS)}, or weight alone, not '{', '.join(kinds)}'")
    return kinds


def _index_text(content: Mapping[str, Any]) -> str:
    """The index as it is stored: exactly one text for a content, with the checksum of the rest at its end."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    checksum = _digest(json.dumps(rest, indent=1).encode())
    return json.dumps({**rest, "checksum": checksum}, indent=1) + "\n"


def verify_files(folder: Path, files: Mapping[str, Any], *, rank: int, world: int) -> None:
    """Compare one rank's share of the files, every world-th one, with the index's sizes and checksums."""
    for name in sorted(files)[rank::world]:
        path, expected = folder / name, files[name]
        problem = _size_problem(path, expected["bytes"])
        if not problem and _checksums(path) != expected["chunks"]:
            problem = f"{path} does not match its checksums"
        if problem:
            raise CheckpointError(f"{problem}; {_ANOTHER}")


def _size_problem(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    found = path.stat().st_size
    return None if found == size else f"{path} has {found} bytes instead of {size}"


def find_pieces(folder: Path, files: Mapping[str, Any]) -> dict[tuple[str, str], list[Piece]]:
    """Where every stored range is, by (kind, parameter), in order of place; reads only the files' headers."""
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for name in files:
        try:
            for kind, parameter, piece in _headings(folder / name):
                pieces.setdefault((kind, parameter), []).append(piece)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{folder / name} holds no fragments of a checkpoint: {error}; {_ANOTHER}") from error
    for found in pieces.values():
        found.sort(key=lambda piece: piece.start)
    return pieces


def _headings(file: Path) -> Iterator[tuple[str, str, Piece]]:
    """Kind, parameter and place of every tensor of a file."""
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():
            kind, parameter, start = key.split("|")
            values = stored.get_slice(key)
            (length,) = values.get_shape()
            if values.get_dtype() != "F32":
                raise ValueError(f"{key} is {values.get_dtype()} instead of F32")
            yield kind, parameter, Piece(int(start), int(start) + length, key, file)


def check_whole(
    pieces: Mapping[tuple[str, str], list[Piece]], shapes: Mapping[str, list[int]], kinds: tuple[str, ...]
) -> None:
    """Every element of every parameter must be stored exactly once, in each of the kinds."""
    for kind in kinds:
        for name, shape in shapes.items():
            reached = 0
            for piece in pieces.get((kind, name), []):
                if piece.start < reached:
                    twice = f"elements {piece.start} to {min(reached, piece.stop)} are there twice"
                    raise CheckpointError(f"{kind} of {name}: {twice}; {_ANOTHER}")
                if piece.start > reached:
                    break
                reached = piece.stop
            if reached != prod(shape):
                raise CheckpointError(
                    f"{kind} of {name}: without a gap the checkpoint holds {reached} of its "
                    f"{prod(shape)} elements; a fragment is missing, {_ANOTHER}"
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


def _fsync(path: Path, *, forget: bool = False) -> None:
    """Wait until the disk has it; `forget`: ask the system to drop its copy, so that the disk is what is read next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
