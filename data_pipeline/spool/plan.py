"""What a streaming run reads and how much of it lies on disk at a time, worked out once when it is opened.

    window      shuffle_window x seq_len tokens of a source: the rows that are drawn in random order
    chunk       an eighth of a window, within bounds: the unit that is written, released and counted
    capacity    chunks that a source may hold: enough for two windows, so that the next is made while one is read;
                what data.raw.disk_bytes has beyond that goes to the sources by weight

A plan is plain data, so that it can be handed to the processes that build.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig, RawInputs
from data_pipeline.document import DataError
from data_pipeline.held_out import HeldOutRule
from data_pipeline.mixture import claim_labels
from data_pipeline.readers import checked_sets, corpus_around, raw_files
from data_pipeline.row_stream import order_hash
from data_pipeline.shards import token_width
from data_pipeline.spool.chunks import HEADER_BYTES, state_bytes
from data_pipeline.spool.documents import CorpusFile, Encoding
from data_pipeline.spool.linear import SourceState
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

CHUNKS_PER_WINDOW = 8
LEAST_CHUNK_TOKENS = 1 << 14
MOST_CHUNK_TOKENS = 1 << 22
MOST_CHUNKS = 4096
"""Of one source: no folder needs more files, and no tiny corpus has to be read ahead by gigabytes."""

ANSWER_MARK = b"\0"
"""Before what a builder says on standard output: a Python may print there at its start, as a sitecustomize does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """One source of the mixture."""

    name: str
    weight: float
    """Its largest share in any stage."""
    capacity: int
    """Most chunks on disk."""
    files: Sequence[CorpusFile]
    """Sorted by key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolPlan:
    """What a spool holds and how it is made."""

    root: str
    identity: str
    """Hash of everything its tokens depend on, 32 hexadecimal digits."""
    raw: RawInputs
    fingerprint: str
    """The tokenizer's."""
    token_bytes: int
    seed: int
    interleave: int
    seq_len: int
    window: int
    """Rows."""
    chunk_tokens: int
    sources: Sequence[SourcePlan]

    def first_chunk(self, drawn: int) -> int:
        """The first chunk that is still needed of a source that has given `drawn` rows: its window's first."""
        return drawn // self.window * self.window * self.seq_len // self.chunk_tokens

    @property
    def rows_ahead(self) -> int:
        """Rows of any source, from the first still needed on, whose windows fit with that one's into its chunks.

        n windows from the start of one on, and the token after them, touch up to 1 + their tokens / chunk's, rounded
        up. The first row may be its window's last, so it and the n - 1 windows behind it are certain.
        """
        chunks = min(source.capacity for source in self.sources)
        windows = (chunks - 1) * self.chunk_tokens // (self.window * self.seq_len)
        return 1 + (windows - 1) * self.window

    def encoding(self) -> Encoding:
        """How raw files become documents, with the tokenizer loaded: it must be the one of the plan."""
        tokenizer = load_tokenizer(self.raw.tokenizer, self.raw.eos)
        if tokenizer.fingerprint != self.fingerprint:
            raise DataError(f"{self.raw.tokenizer} has changed since the run began (data.raw.tokenizer); restore it")
        return encoding_of(self.raw, tokenizer, Path(self.root))

    def builders(self) -> list[list[str]]:
        """The sources of each builder process: the heaviest first, each to the one that has least so far."""
        dealt: list[tuple[float, list[str]]] = [(0.0, []) for _ in range(min(self.raw.builders, len(self.sources)))]
        for source in sorted(self.sources, key=lambda source: (-source.weight, source.name)):
            least = min(range(len(dealt)), key=lambda number: dealt[number][0])
            load, names = dealt[least]
            dealt[least] = (load + source.weight, [*names, source.name])
        return [names for _, names in dealt]


@dataclass(frozen=True, slots=True)
class Known:
    """A state of a source's stream that a checkpoint carries: that before chunk `number`."""

    number: int
    state: SourceState


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderJob:
    """What a builder is told at its start."""

    plan: SpoolPlan
    sources: Sequence[str]
    """Those whose locks it was given."""
    known: Mapping[str, Known]
    parent: int
    """Process without which it ends."""


def plan_spool(config: DataConfig, tokenizer: Tokenizer, claimed: Mapping[str, Sequence[CorpusFile]]) -> SpoolPlan:
    """The plan of a streaming run whose sources have the files `claimed`; DataError where the disk is too small."""
    raw = raw_inputs(config)
    window_tokens = config.shuffle_window * config.seq_len
    chunk_tokens = min(max(window_tokens // CHUNKS_PER_WINDOW, LEAST_CHUNK_TOKENS), MOST_CHUNK_TOKENS)
    token_bytes = token_width(tokenizer.vocab_size)
    open_files = max(min(config.interleave, len(files)) for files in claimed.values())
    weights = {
        name: float(max(stage.mixture.weights.get(name, 0) for stage in config.flat_stages)) for name in claimed
    }
    capacities = share_disk(
        raw,
        weights,
        window_tokens=window_tokens,
        chunk_tokens=chunk_tokens,
        chunk_bytes=HEADER_BYTES + chunk_tokens * token_bytes + state_bytes(open_files),
    )
    versions = {name: [[file.key, file.raw.version] for file in files] for name, files in claimed.items()}
    return SpoolPlan(
        root=os.path.abspath(config.path),
        identity=order_hash(
            [files_order(raw, tokenizer, claimed), versions, config.seed, config.interleave, chunk_tokens]
        ),
        raw=raw,
        fingerprint=tokenizer.fingerprint,
        token_bytes=token_bytes,
        seed=config.seed,
        interleave=config.interleave,
        seq_len=config.seq_len,
        window=config.shuffle_window,
        chunk_tokens=chunk_tokens,
        sources=[
            SourcePlan(name=name, weight=weights[name], capacity=capacities[name], files=files)
            for name, files in claimed.items()
        ],
    )


def share_disk(
    raw: RawInputs, weights: Mapping[str, float], *, window_tokens: int, chunk_tokens: int, chunk_bytes: int
) -> dict[str, int]:
    """Chunks that each source may hold. A chunk that a builder is writing counts too."""
    least = (2 * window_tokens - 1) // chunk_tokens + 2  # two windows and a token, wherever chunks begin
    writing = min(raw.builders, len(weights))
    rest = raw.disk_bytes // chunk_bytes - writing - least * len(weights)
    if rest < 0:
        enough = (least * len(weights) + writing) * chunk_bytes
        raise DataError(
            f"raw.disk_bytes {raw.disk_bytes:,} is too little for two shuffle windows of every source: {len(weights)}"
            f" sources x {least} chunks, and {writing} being written, each of {chunk_tokens:,} tokens or"
            f" {chunk_bytes:,} bytes, take {enough:,} (a window has {window_tokens:,} tokens); set data.raw.disk_bytes"
            f" to {enough} or more, or lower data.shuffle_window"
        )
    total = sum(weights.values())
    return {name: min(least + int(rest * weight / total), max(MOST_CHUNKS, least)) for name, weight in weights.items()}


def raw_inputs(config: DataConfig) -> RawInputs:
    """`data.raw`, which goes with `mode: stream`."""
    assert config.raw is not None, "DataConfig has checked it"
    return config.raw


def encoding_of(raw: RawInputs, tokenizer: Tokenizer, root: Path) -> Encoding:
    """How raw files become documents."""
    return Encoding(
        tokenizer=tokenizer,
        is_held_out=HeldOutRule(raw.held_out),
        exclude=checked_sets(raw.pile_exclude),
        max_bad_share=raw.max_bad_share,
        quarantine=root / "quarantine",
    )


def claim_raw_files(config: DataConfig) -> dict[str, list[CorpusFile]]:
    """The raw files of each source of the mixture, in the order of their keys, as a prepared set has them."""
    raw = raw_inputs(config)
    _refuse_nested(config.path, raw)
    files = [CorpusFile(*found) for found in raw_files(raw.corpora, split_bytes=raw.split_bytes)]
    owner = claim_labels(config.source_names, [file.raw.source for file in files])
    claimed: dict[str, list[CorpusFile]] = {name: [] for name in config.source_names}
    for file in sorted(files, key=lambda file: file.key):
        if file.raw.source in owner:
            claimed[owner[file.raw.source]].append(file)
    return claimed


def _refuse_nested(root: str, raw: RawInputs) -> None:
    """Refuse a spool inside a corpus's folder: its quarantine would be read as raw data by the next run."""
    around = corpus_around(root, raw.corpora)
    if around:
        name, folder = around
        raise DataError(
            f"data.path {root} lies in the folder of data.raw.{name}, {folder}, so what is written there would be"
            " read as raw data; name a folder outside the corpora"
        )


def files_order(raw: RawInputs, tokenizer: Tokenizer, claimed: Mapping[str, Sequence[CorpusFile]]) -> dict[str, Any]:
    """What the tokens depend on, by name, as JSON values. A file's age is not among it: copies are as good."""
    files = [[file.key, file.raw.size, file.raw.span] for own in claimed.values() for file in own]
    return {
        "raw": order_hash(files),
        "tokenizer": tokenizer.fingerprint,
        "held_out": raw.held_out,
        "part_tokens": raw.part_tokens,
        "pile_exclude": list(checked_sets(raw.pile_exclude)),
    }
