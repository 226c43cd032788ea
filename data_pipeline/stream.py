"""The training stream: row i of a run, for any i, from a folder of prepared shards.

    row index ─▶ mixture: which source, which of its rows ─▶ packing: which file, where ─▶ gather

`rows(indices)` is a pure function of the shards, the configuration and the indices. Where rows lie is worked
out for blocks of consecutive rows at a time and kept for the last few blocks; the gather itself is one slice
copy per row.
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

from data_pipeline.config import DataConfig, flatten_mixture
from data_pipeline.document import DataError
from data_pipeline.manifest import (
    FileRecord,
    Manifest,
    TokenizerInfo,
    checked_shard,
    read_manifest,
    shard_path,
)
from data_pipeline.mixture import Mixture, claim_labels
from data_pipeline.packing import STRADDLES, SourceRows, TokenStream
from data_pipeline.shards import Shard

BLOCK_ROWS = 2048
"""Rows that are located together."""
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
        self.tokens = lru_cache(maxsize=OPEN_SHARDS)(self._map_tokens)
        """tokens(file): the ids of a file's shard, a read-only view of the disk."""
        self.cuts = lru_cache(maxsize=8 * OPEN_SHARDS)(self._read_cuts)
        """cuts(file): the part cuts of a file's shard, uint64; none for a file without tokens."""

    def _map_tokens(self, file: int) -> np.ndarray:
        return Shard(Path(self.paths[file])).tokens

    def _read_cuts(self, file: int) -> np.ndarray:
        path = self.paths[file]
        return Shard(Path(path)).cuts.copy() if path else np.empty(0, dtype=np.uint64)


class RowStream:
    """The endless stream of rows. Build one with `open_stream`; reading from several threads is safe."""

    def __init__(
        self,
        *,
        seq_len: int,
        mixture: Mixture,
        sources: Sequence[SourceRows],
        pool: ShardPool,
        tokenizer: TokenizerInfo,
        order: Mapping[str, Any],
    ) -> None:
        self.seq_len = seq_len
        self.mixture = mixture
        self.tokenizer = tokenizer
        """Vocabulary size, end-of-document id and fingerprint, among others."""
        self.order = dict(order)
        """Everything the order of rows depends on, by name, as JSON values."""
        self.fingerprint = _hash(self.order)
        """32 hexadecimal digits, equal exactly when `order` is."""
        self.source_names: list[str] = mixture.names
        """Mixture keys; `sources` gives indices into them."""
        self.source_tokens: list[int] = [source.stream.tokens for source in sources]
        """Training tokens of one epoch of each source."""
        self._sources = sources
        self._pool = pool
        self._tokens = pool.tokens
        self._block = lru_cache(maxsize=4)(self._locate_block)

    def _locate_block(self, block: int) -> Located:
        indices = np.arange(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS, dtype=np.int64)
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

    def rows(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """Tokens of the rows at `indices`: int64 [n, seq_len + 1], a new array."""
        return self.gather(self.locate(indices))

    def sources(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """Index into `source_names` of each row: int64 [n]."""
        return self.locate(indices).source

    def pieces(self, index: int) -> list[tuple[str, int, int]]:
        """Row `index` as (shard path, offset, tokens) pieces, in order: where its tokens lie."""
        located = self.locate([index])
        found = self._sources[int(located.source[0])].pieces(int(located.row[0]))
        return [(self._pool.paths[file], offset, length) for file, offset, length in found]

    def gather(self, located: Located) -> np.ndarray:
        """Tokens of rows found by `locate`: int64 [n, seq_len + 1], a new array."""
        length, tokens_of = self.seq_len + 1, self._tokens
        out = np.empty((len(located.file), length), dtype=np.int64)
        for place, (file, offset) in enumerate(zip(located.file.tolist(), located.offset.tolist())):
            if offset == STRADDLES:
                self._gather_pieces(int(located.source[place]), int(located.row[place]), out[place])
            else:
                out[place] = tokens_of(file)[offset : offset + length]
        return out

    def _gather_pieces(self, source: int, row: int, out: np.ndarray) -> None:
        done = 0
        for file, offset, length in self._sources[source].pieces(row):
            out[done : done + length] = self._tokens(file)[offset : offset + length]
            done += length


def open_stream(config: DataConfig) -> RowStream:
    """Open the shard set at `config.path` for training.

    Every shard that the mixture draws from is checked cheaply here (there, whole in size, of this tokenizer,
    the one the manifest lists), so that a run does not stop days later. Raises DataError.
    """
    root = Path(config.path)
    manifest = read_manifest(root)
    mixture = Mixture(flatten_mixture(config.mixture).weights, sampling=config.sampling, seed=config.seed)
    claimed = claim_files(manifest, mixture.names)
    files = [file for name in mixture.names for file in claimed[name]]
    for file in files:
        checked_shard(root, manifest.settings.tokenizer, file, "train")
    pool = ShardPool(
        [str(shard_path(root, file.key, "train")) if file.train.tokens else "" for file in files]
    )
    sources: list[SourceRows] = []
    first_file = 0
    for name in mixture.names:
        stream = TokenStream(
            name,
            names=[file.key for file in claimed[name]],
            tokens=np.array([file.train.tokens for file in claimed[name]], dtype=np.int64),
            read_cuts=pool.cuts,
            seed=config.seed,
            interleave=config.interleave,
            first_file=first_file,
        )
        sources.append(
            SourceRows(stream, seq_len=config.seq_len, window=config.shuffle_window, seed=config.seed)
        )
        first_file += len(claimed[name])
    return RowStream(
        seq_len=config.seq_len,
        mixture=mixture,
        sources=sources,
        pool=pool,
        tokenizer=manifest.settings.tokenizer,
        order=_order(config, manifest, mixture, files),
    )


def claim_files(manifest: Manifest, names: Sequence[str]) -> dict[str, list[FileRecord]]:
    """The files of each mixture key, in the manifest's order; DataError for a key without any."""
    owner = claim_labels(names, manifest.labels())
    claimed: dict[str, list[FileRecord]] = {name: [] for name in names}
    for file in manifest.files:
        if file.source in owner:
            claimed[owner[file.source]].append(file)
    return claimed


def _order(
    config: DataConfig, manifest: Manifest, mixture: Mixture, files: Sequence[FileRecord]
) -> dict[str, Any]:
    return {
        "shards": _hash([[file.key, file.train.tokens, file.train.checksum] for file in files]),
        "tokenizer": manifest.settings.tokenizer.fingerprint,
        "mixture": mixture.quotas,
        "sampling": config.sampling,
        "seed": config.seed,
        "seq_len": config.seq_len,
        "shuffle_window": config.shuffle_window,
        "interleave": config.interleave,
    }


def _hash(value: Any) -> str:
    return hashlib.blake2b(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of one mixture source, in the order of file names."""

    tokens: int
    """End-of-document ids included."""
    text_bytes: int
    """UTF-8 bytes of the texts."""
    documents: int
    eos_id: int
    paths: Sequence[Path]

    @property
    def bytes_per_token(self) -> float:
        """Turns nats per token into bits per byte: nats / ln 2 / bytes_per_token."""
        return self.text_bytes / self.tokens

    def rows(self, seq_len: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The first `limit` rows (all when None) of the split's tokens, laid end to end.

        Returns tokens int64 [n, seq_len + 1], rows overlapping by one token as in training, and valid bool
        [n, seq_len]: whether target t of the row (its token t + 1) is a token of the split. Every token but
        the first is a valid target once; the last row is filled up with end-of-document ids that are not
        valid.
        """
        available = -(-(self.tokens - 1) // seq_len)
        count = available if limit is None else min(limit, available)
        flat = np.full(count * seq_len + 1, self.eos_id, dtype=np.int64)
        filled = 0
        for path in self.paths:
            if filled < len(flat):
                part = Shard(path).tokens[: len(flat) - filled]
                flat[filled : filled + len(part)] = part
                filled += len(part)
        starts = np.arange(count)[:, None] * seq_len
        tokens = flat[starts + np.arange(seq_len + 1)]
        return tokens, starts + np.arange(1, seq_len + 1) < filled


def open_held_out(config: DataConfig) -> dict[str, HeldOut]:
    """The held-out split of each source of the mixture, by mixture key; checked like the training shards.

    A source of which no document was held out is left out.
    """
    root = Path(config.path)
    manifest = read_manifest(root)
    split: dict[str, HeldOut] = {}
    for name, files in claim_files(manifest, sorted(flatten_mixture(config.mixture).weights)).items():
        present = [
            file for file in files if checked_shard(root, manifest.settings.tokenizer, file, "held_out")
        ]
        if not present:
            continue
        split[name] = HeldOut(
            tokens=sum(file.held_out.tokens for file in present),
            text_bytes=sum(file.held_out.text_bytes for file in present),
            documents=sum(file.held_out.documents for file in present),
            eos_id=manifest.settings.tokenizer.eos_id,
            paths=[shard_path(root, file.key, "held_out") for file in present],
        )
    return split
