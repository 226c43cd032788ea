"""The rows of an update that was not taken, as files of the run folder: what `moepp replay` needs beside a checkpoint.

    RUN/replay/step-00000012/
        rank-00000-of-00002.safetensors   each rank's own rows in the order of its micro batches
            tokens_BS1 int32, row_B int64 (number in the stream), source_B int64 (place in `source_names`)
        facts.json                        what `Facts` says, written by the first rank

The folder of an update is overwritten when a resumed run comes by it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_pipeline.atomic import write_atomically
from data_pipeline.document import DataError
from data_pipeline.loader import Batch
from moepp_ds.agreement import agreed_message, gather

_DTYPES = {"tokens_BS1": np.int32, "row_B": np.int64, "source_B": np.int64}


class Facts(BaseModel):
    """What an update was done with. Where its files are damaged, reading them raises ValidationError."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int = Field(ge=1)
    """The update, from 1."""
    reason: str
    """Why it was not taken."""
    loss: float | None
    """Mean over all ranks and micro batches; None where that is no number."""
    world: int = Field(ge=1)
    """Ranks."""
    eos_id: int = Field(ge=0)
    """The token that ends a document."""
    recipe: dict[str, Any]
    """`Recipe.model_dump(mode="json")`."""
    routing: dict[str, Any]
    """`RoutingState.facts()` before the update."""
    source_names: list[str]
    """Of the stream, in its order."""

    @field_validator("loss")
    @classmethod
    def _finite(cls, loss: float | None) -> float | None:
        return loss if loss is None or math.isfinite(loss) else None


@dataclass(frozen=True)
class RankBatch:
    """A micro batch and the rank that had it."""

    rank: int
    batch: Batch


def rows_folder(run_dir: Path, step: int) -> Path:
    """Where the rows of update `step` are."""
    return run_dir / "replay" / f"step-{step:08d}"


def write_rows(folder: Path, rank: int, batches: Sequence[Batch], facts: Facts) -> str | None:
    """Write this rank's rows, and on the first rank `facts`. Collective.

    A disk that is full must not end the run: returns what went wrong, the same words on every rank, or None.
    """
    rows = np.concatenate([batch.row_start + np.arange(len(batch.tokens_BS1)) for batch in batches])
    tensors = {
        "tokens_BS1": np.concatenate([batch.tokens_BS1 for batch in batches]),
        "row_B": rows,
        "source_B": np.concatenate([batch.source_B for batch in batches]),
    }
    problem = None
    try:
        content = save({name: np.ascontiguousarray(tensors[name], dtype=dtype) for name, dtype in _DTYPES.items()})
        write_atomically(folder / _file(rank, facts.world), content)
        if rank == 0:
            write_atomically(folder / "facts.json", facts.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        problem = f"rows of update {facts.step} are not in {folder}: {error}"
    return agreed_message(gather(problem))


def read_facts(run_dir: Path, step: int) -> Facts:
    """What update `step` was done with; DataError where its rows were not written, or the file is damaged."""
    file = rows_folder(run_dir, step) / "facts.json"
    try:
        return Facts.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{run_dir} holds no rows of update {step}; {_available(run_dir)}") from None
    except (OSError, ValidationError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def read_batches(run_dir: Path, facts: Facts, *, micro_batch_size: int, vocab_size: int) -> list[RankBatch]:
    """The micro batches of all ranks, in the order of the stream; DataError where a file is missing or damaged."""
    found = []
    for rank in range(facts.world):
        file = rows_folder(run_dir, facts.step) / _file(rank, facts.world)
        tensors = _read(file, num_sources=len(facts.source_names), vocab_size=vocab_size)
        for start in range(0, len(tensors["row_B"]), micro_batch_size):
            part = {name: array[start : start + micro_batch_size] for name, array in tensors.items()}
            first = int(part["row_B"][0])
            if part["row_B"].tolist() != list(range(first, first + micro_batch_size)):
                raise DataError(f"{file} is damaged: rows {part['row_B'].tolist()} are no micro batch")
            found.append(RankBatch(rank, Batch(part["tokens_BS1"], first, part["source_B"])))
    return sorted(found, key=lambda item: item.batch.row_start)


def _read(file: Path, *, num_sources: int, vocab_size: int) -> dict[str, np.ndarray]:
    try:
        tensors = load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    if {name: array.dtype for name, array in tensors.items()} != _DTYPES:
        raise DataError(f"{file} holds other tensors than rows: {', '.join(sorted(tensors))}")
    tokens, rows, sources = (tensors[name] for name in _DTYPES)
    if tokens.ndim != 2 or not len(rows) or not rows.shape == sources.shape == tokens.shape[:1]:
        shapes = {name: list(array.shape) for name, array in tensors.items()}
        raise DataError(f"{file} is damaged: its tensors are of shapes {shapes}")
    for array, end in ((tokens, vocab_size), (sources, num_sources)):
        wrong = array[(array < 0) | (array >= end)]
        if wrong.size:
            raise DataError(f"{file} is damaged: it holds the number {wrong[0]}; those there are 0 to {end - 1}")
    return tensors


def _available(run_dir: Path) -> str:
    steps = sorted(int(file.parent.name.removeprefix("step-")) for file in run_dir.glob("replay/step-*/facts.json"))
    if not steps:
        return "it holds none at all: rows are written when an update is skipped or stops the run (safety)"
    return f"there are those of {', '.join(map(str, steps))}"


def _file(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"
