"""The rows of a shard set: row i of a run, for any i.

    row index ─▶ stages: which source, which of its rows ─▶ packing: which file, where ─▶ gather

`rows(indices)` is a pure function of the shards, the configuration and the indices. Where rows lie is worked
out for blocks of consecutive rows at a time and kept for the last few blocks; the gather itself joins one slice a
row, and widens all of them in one go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_pipeline.document import DataError
from data_pipeline.manifest import TokenizerInfo
from data_pipeline.packing import SourceRows
from data_pipeline.shards import Shard, token_width
from data_pipeline.stages import StagedMixture

BLOCK_ROWS = 2048
"""Rows that are located together."""
GATHERED_ROWS = 64
"""Rows that are joined before they are widened: what lies between stays in the processor's cache."""
OPEN_SHARDS = 512
"""Shards mapped at a time; each holds a file descriptor, of which a process usually may have 1,024."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a block of consecutive rows lies; int64 arrays of the block's length."""

    source: np.ndarray
    row: np.ndarray
    """Row number within the source's stream."""
    file: np.ndarray
    offset: np.ndarray


class ShardPool:
    """Shards by file number, opened when they are needed and closed when many others were needed since."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.bytes = lru_cache(maxsize=OPEN_SHARDS)(self._map_tokens)
        """bytes(file): the bytes of the ids in a file's shard, a read-only view of the disk."""
        self.cuts = lru_cache(maxsize=OPEN_SHARDS)(self._read_cuts)
        """cuts(file): the part cuts of a file's shard, uint64; none for a file without tokens."""

    def close(self) -> None:
        """Unmap all shards; one that is asked for again is opened again."""
        self.bytes.cache_clear()

    def _map_tokens(self, file: int) -> memoryview:
        return Shard(Path(self.paths[file])).tokens.data.cast("B")

    def _read_cuts(self, file: int) -> np.ndarray:
        path = self.paths[file]
        return Shard(Path(path)).cuts.copy() if path else np.empty(0, dtype=np.uint64)


class RowStream:
    """The stream of rows. Build one with `open_stream`; reading from several threads is safe."""

    def __init__(
        self,
        *,
        seq_len: int,
        mixture: StagedMixture,
        sources: Sequence[SourceRows],
        pool: ShardPool,
        tokenizer: TokenizerInfo,
        order: Mapping[str, Any],
        drawn_by: Mapping[str, Any],
    ) -> None:
        self.seq_len = seq_len
        self.mixture = mixture
        self.tokenizer = tokenizer
        """Vocabulary size, end-of-document id and fingerprint, among others."""
        self.order = dict(order)
        """Everything the order of rows depends on, by name, as JSON values."""
        self.fingerprint = order_hash(self.order)
        """32 hexadecimal digits, equal exactly when `order` is."""
        self.drawn_by = dict(drawn_by)
        """The recipe's keys that `mixture` was made of."""
        self.source_names: list[str] = mixture.names
        """Mixture keys; `sources` gives indices into them."""
        self.source_tokens: list[int] = [source.stream.tokens for source in sources]
        """Training tokens of one epoch of each source."""
        self._sources = sources
        self._pool = pool
        self._stored = np.dtype(f"<u{token_width(tokenizer.vocab_size)}")
        self._block = lru_cache(maxsize=4)(self._locate_block)

    @property
    def rows_total(self) -> int | None:
        """Rows until a source's `max_epochs` ends the stream; None is without end."""
        return self.mixture.rows_total

    @property
    def rows_ahead(self) -> None:
        """Any row may be asked for at any time."""

    def epochs(self, rows: int) -> dict[str, float | None]:
        """Passes over each source that the first `rows` rows are."""
        drawn = self.mixture.drawn(rows)
        return {
            name: drawn[name] * self.seq_len / tokens for name, tokens in zip(self.source_names, self.source_tokens)
        }

    def seek(self, row: int, position: Mapping[str, Any]) -> None:
        """Nothing to get ready: every row is as near as the first."""

    def release(self, row: int) -> None:
        """Nothing to clean up: shards are mapped, and their pages the system's."""

    def position(self, row: int) -> dict[str, Any]:
        """Nothing: the index of the row says it all."""
        return {}

    def close(self) -> None:
        """Let go of the shards."""
        self._pool.close()

    def _locate_block(self, block: int) -> Located:
        stop = (block + 1) * BLOCK_ROWS if self.rows_total is None else min((block + 1) * BLOCK_ROWS, self.rows_total)
        indices = np.arange(block * BLOCK_ROWS, stop, dtype=np.int64)
        source, drawn = self.mixture.locate(indices)
        row, file, offset = np.empty_like(drawn), np.empty_like(drawn), np.empty_like(drawn)
        for number in np.unique(source).tolist():
            here = source == number
            row[here], file[here], offset[here] = self._sources[number].locate(drawn[here])
        return Located(source, row, file, offset)

    def locate(self, indices: np.ndarray | Sequence[int]) -> Located:
        """Source, source row, file and offset of each row index (any order, each >= 0)."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1 or (len(wanted) and wanted.min() < 0):
            raise DataError(f"row indices must be a flat list of numbers >= 0, got {indices!r}")
        if self.rows_total is not None and len(wanted) and wanted.max() >= self.rows_total:
            raise DataError(
                f"row {wanted.max():,} does not exist: the stream ends after {self.rows_total:,} rows, when"
                f" {self.mixture.ended_by!r} has given all of its epochs (data.max_epochs)"
            )
        block, place = np.divmod(wanted, BLOCK_ROWS)
        if len(wanted) and block[0] == block[-1] and (block == block[0]).all():
            here = self._block(int(block[0]))
            return Located(here.source[place], here.row[place], here.file[place], here.offset[place])
        found = Located(*(np.empty_like(wanted) for _ in range(4)))
        for number in np.unique(block).tolist():
            mine, here = block == number, self._block(number)
            for name in ("source", "row", "file", "offset"):
                getattr(found, name)[mine] = getattr(here, name)[place[mine]]
        return found

    def rows(self, indices: np.ndarray | Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Tokens of the rows at `indices`: int64 [n, seq_len + 1], a new array; or they are written to `out`."""
        return self.gather(self.locate(indices), out)

    def sources(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """Index into `source_names` of each row: int64 [n]."""
        return self.locate(indices).source

    def pieces(self, index: int) -> list[tuple[str, int, int]]:
        """Row `index` as (shard path, offset, tokens) pieces, in order: where its tokens lie."""
        located = self.locate([index])
        found = self._sources[int(located.source[0])].pieces(int(located.row[0]))
        return [(self._pool.paths[file], offset, length) for file, offset, length in found]

    def gather(self, located: Located, out: np.ndarray | None = None) -> np.ndarray:
        """Tokens of rows found by `locate`: int64 [n, seq_len + 1], a new array; or they are written to `out`."""
        if out is None:
            out = np.empty((len(located.file), self.seq_len + 1), dtype=np.int64)
        files, begins = located.file.tolist(), (located.offset * self._stored.itemsize).tolist()
        for first in range(0, len(files), GATHERED_ROWS):
            last = min(first + GATHERED_ROWS, len(files))
            parts: list[memoryview] = []
            for place in range(first, last):
                parts += self._bytes(located, place, files[place], begins[place])
            out[first:last] = np.frombuffer(b"".join(parts), dtype=self._stored).reshape(last - first, -1)
        return out

    def _bytes(self, located: Located, place: int, file: int, begin: int) -> Sequence[memoryview]:
        width, bytes_of = self._stored.itemsize, self._pool.bytes
        if begin >= 0:
            return (bytes_of(file)[begin : begin + (self.seq_len + 1) * width],)
        pieces = self._sources[int(located.source[place])].pieces(int(located.row[place]))
        return [bytes_of(own)[start * width : (start + count) * width] for own, start, count in pieces]


def order_hash(value: Any) -> str:
    """32 hexadecimal digits that name a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()
