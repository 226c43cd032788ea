"""The loader, against copying the same rows out of one memory map.

The bare side is as bare as can be: the rows lie in one file, without parts, windows or sources, and a micro batch is
one numpy gather by their places, made int64. Both sides read warm pages; they take turns, and medians count.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data_pipeline.bench.fresh import CLOCKS, Seconds, median_of
from data_pipeline.config import DataConfig
from data_pipeline.document import DataError
from data_pipeline.loader import Loader
from data_pipeline.row_source import RowSource
from data_pipeline.stream import open_stream


@dataclass(frozen=True, slots=True)
class LoaderResult:
    """What was measured: the time for all rows, once for each round."""

    rows: int
    seq_len: int
    loader: list[Seconds]
    gather: list[Seconds]

    @property
    def ratios(self) -> dict[str, float]:
        """The loader's speed as a multiple of the gather's: {"wall": ..., "cpu": ...}."""
        return {by: median_of(self.gather, by) / median_of(self.loader, by) for by in CLOCKS}

    def rows_per_second(self, taken: Sequence[Seconds]) -> float:
        """Rows in the median of `taken`."""
        return self.rows / median_of(taken, "wall")


def bench_loader(
    config: DataConfig, *, rows: int = 16_384, batch_rows: int = 64, micro_batch_size: int = 8, rounds: int = 9
) -> LoaderResult:
    """Measure the first `rows` rows of a prepared set, by batches of `batch_rows`; raises DataError."""
    if rows % batch_rows:
        above = -(-rows // batch_rows) * batch_rows
        raise DataError(f"{rows} rows are no multiple of the batch of {batch_rows}; use {above}")
    stream = open_stream(config)
    if stream.rows_total is not None and stream.rows_total < rows:
        raise DataError(f"the stream has {stream.rows_total:,} rows and {rows:,} were asked for; use fewer rows")
    places = np.random.default_rng(0).permutation(rows)
    dtype = np.dtype("<u2" if stream.tokenizer.vocab_size <= 2**16 else "<u4")
    with TemporaryDirectory(prefix="moepp-bench-") as folder:
        laid = np.empty((rows, config.seq_len + 1), dtype=dtype)
        for start in range(0, rows, batch_rows):
            indices = np.arange(start, start + batch_rows)
            laid[places[indices]] = stream.rows(indices)
        laid.tofile(Path(folder) / "rows")
        mapped = np.memmap(Path(folder) / "rows", dtype=dtype, mode="r", shape=laid.shape)
        loader, gather = [], []
        for _ in range(rounds):
            gather.append(_gather(mapped, places, micro_batch_size))
            loader.append(_load(stream, rows // batch_rows, batch_rows, micro_batch_size))
    stream.close()
    return LoaderResult(rows, config.seq_len, loader, gather)


def _gather(mapped: np.ndarray, places: np.ndarray, micro_batch_size: int) -> Seconds:
    taken = Seconds()
    with taken.add():
        for first in range(0, len(places), micro_batch_size):
            mapped[places[first : first + micro_batch_size]].astype(np.int64)
    return taken


def _load(stream: RowSource, steps: int, batch_rows: int, micro_batch_size: int) -> Seconds:
    taken = Seconds()
    with ExitStack() as stack:
        with taken.add():  # opening is a part of it, closing is none
            loader = Loader(stream, rank=0, world=1, batch_rows=batch_rows, micro_batch_size=micro_batch_size)
            stack.enter_context(loader)
            for _ in range(steps):
                next(loader)
    return taken
