"""A checkpoint of given weights, and moments if there are any, written by one process from pieces one after another.

1. Place   each piece is a range of a parameter; it must lie inside, and where nothing was yet.
2. Collect pieces as fp32 until a file's worth is there; longer ones are cut. No more than that is in memory.
3. Write   part-00000.safetensors and so on, each read back and compared when it is on the disk.
4. Publish when every element of every parameter has come: the index, the name, and then `latest`.
"""

from __future__ import annotations

import shutil
from bisect import bisect, insort
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp_ds.checkpoint.chunks import prove_chunks
from moepp_ds.checkpoint.errors import CheckpointError
from moepp_ds.checkpoint.files import KINDS, folder_name, partial_folder, publish, write_index
from moepp_ds.checkpoint.fingerprints import Fingerprints
from moepp_ds.checkpoint.tensors import write_fragments
from moepp_ds.config.errors import nearest

FILE_BYTES = 2**30
"""Weights of one file, and the most that is held in memory besides the piece at hand. Bytes."""

NEW_OPTIMIZER = {"updates": 0, "loss_scaler": {"dynamic": False}}
"""What the index says of an optimizer that has not begun, in the words of `fragments.optimizer_facts`."""

LINES = 20
"""Parameters that an error names one by one."""


def write_weights(
    root: Path,
    pieces: Iterable[tuple[str, int, Tensor]],
    *,
    shapes: Mapping[str, list[int]],
    step: int,
    facts: Mapping[str, Any],
    moments: Iterable[tuple[str, str, int, Tensor]] | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write root/step-XXXXXXXX from `pieces`, make it the latest, and return it.

    pieces: (parameter name, first element in the flattened parameter, tensor of any floating dtype and shape), in any
    order; together they must be every element of `shapes` once. facts: what else the index holds, as JSON.
    moments: (kind, and the rest as in a piece); each of the two kinds must be every element of `shapes` once, too.
    Raises CheckpointError for a piece of no parameter, outside of it, over another one, or with values that are not
    finite, and at the end for all parameters that lack elements. Whatever fails, no checkpoint is left behind.
    """
    final, partial = root / folder_name(step), partial_folder(root, step)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        kinds = KINDS[:1] if moments is None else KINDS
        placed, fingerprints = {kind: _Placed(shapes) for kind in kinds}, Fingerprints(shapes)
        named = chain((("weight", *piece) for piece in pieces), moments or ())
        files: dict[str, Any] = {}
        for batch in _in_batches(_parts(named, placed, file_bytes // 4), file_bytes):
            file = partial / f"part-{len(files):05d}.safetensors"
            files[file.name] = write_fragments(file, batch)
            prove_chunks(file, files[file.name])
            for (kind, name, start), values in batch.items():
                if kind == "weight":
                    fingerprints.add(name, start, values)
        for kind in kinds:
            placed[kind].check_complete()
        content = {"step": step, **NEW_OPTIMIZER, **facts, "kinds": kinds, "parameters": dict(shapes)}
        write_index(partial, {**content, "fingerprints": fingerprints.facts()}, files)
        publish(partial, final)
    except OSError as error:
        raise CheckpointError(f"{final} cannot be written: {error}; free its disk or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when it was published
    return final


def _parts(
    pieces: Iterable[tuple[str, str, int, Tensor]], placed: Mapping[str, _Placed], most: int
) -> Iterator[tuple[tuple[str, str, int], Tensor]]:
    """The pieces in parts of at most `most` elements, as fp32 tensors of their own, by their key in a file."""
    for kind, name, start, tensor in pieces:
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} comes as {tensor.dtype}; weights must be floating point numbers")
        placed[kind].add(name, start, tensor.numel())
        for number, part in enumerate(tensor.detach().flatten().split(most)):
            own = part.to("cpu", torch.float32, copy=True)  # the giver may use its memory again
            if not own.isfinite().all():
                what = name if kind == "weight" else f"{kind} of {name}"
                raise CheckpointError(f"{what} has values that are not finite numbers in fp32; look at its source")
            if len(own):
                yield (kind, name, start + number * most), own


def _in_batches(
    parts: Iterable[tuple[tuple[str, str, int], Tensor]], file_bytes: int
) -> Iterator[dict[tuple[str, str, int], Tensor]]:
    """Parts together, as many as fit into a file."""
    batch: dict[tuple[str, str, int], Tensor] = {}
    held = 0
    for key, tensor in parts:
        if batch and held + tensor.nbytes > file_bytes:
            yield batch
            batch, held = {}, 0
        batch[key] = tensor
        held += tensor.nbytes
    if batch:
        yield batch


class _Placed:
    """Which elements of every parameter have come."""

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        self._sizes = {name: prod(shape) for name, shape in shapes.items()}
        self._ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}

    def add(self, name: str, start: int, length: int) -> None:
        """Note that elements from `start` on have come; refuse those that cannot be."""
        if name not in self._sizes:
            meant = nearest(name, self._sizes)
            hint = f"; did you mean {meant}?" if meant else ""
            raise CheckpointError(f"the model has no parameter {name}{hint}")
        stop, size = start + length, self._sizes[name]
        if start < 0 or stop > size:
            raise CheckpointError(f"{name} has elements 0 to {size}, and {start} to {stop} came")
        if not length:
            return
        ranges = self._ranges[name]
        at = bisect(ranges, (start, stop))
        for other in ranges[max(at - 1, 0) : at + 1]:
            if start < other[1] and other[0] < stop:
                raise CheckpointError(
                    f"{name}: elements {start} to {stop} came, and {other[0]} to {other[1]} had come before; "
                    "each may come once"
                )
        insort(ranges, (start, stop))

    def check_complete(self) -> None:
        """Refuse if elements are missing, naming the parameters and the first gap of each."""
        missing = [line for name in self._sizes if (line := self._first_gap(name))]
        if missing:
            more = [f"  and {len(missing) - LINES} more"] if len(missing) > LINES else []
            said = f"{len(missing)} parameters did not come whole:"
            raise CheckpointError("\n".join([said, *missing[:LINES], *more]))

    def _first_gap(self, name: str) -> str | None:
        size, reached = self._sizes[name], 0
        if not self._ranges[name]:
            return f"  {name}: nothing came"
        for start, stop in [*self._ranges[name], (size, size)]:
            if start > reached:
                return f"  {name}: elements {reached} to {start} of {size} are missing"
            reached = stop
        return None
