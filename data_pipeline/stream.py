"""Opening a folder of prepared shards: the training stream of a configuration, and its held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.document import DataError
from data_pipeline.manifest import (
    FileRecord,
    Manifest,
    checked_shard,
    read_manifest,
    shard_path,
)
from data_pipeline.mixture import claim_labels
from data_pipeline.packing import SourceRows, TokenStream
from data_pipeline.row_stream import RowStream, ShardPool, order_hash
from data_pipeline.shards import Shard
from data_pipeline.stages import StagedMixture, plan_stages

ENDLESS_ROWS = 2**48
"""A limit of a source that no run comes to, and that a row index of 64 bits still has room for."""


def open_stream(config: DataConfig) -> RowStream:
    """Open the shard set at `config.path` for training.

    Every shard that the mixture draws from is checked cheaply here (there, whole in size, of this tokenizer,
    the one the manifest lists), so that a run does not stop days later. Raises DataError.
    """
    root = Path(config.path)
    manifest = read_manifest(root)
    claimed = claim_files(manifest, config.source_names)
    files = [file for name in config.source_names for file in claimed[name]]
    for file in files:
        checked_shard(config.path, manifest.settings.tokenizer, file, "train")
    pool = ShardPool([f"{config.path}/shards/{file.key}.train" if file.train.tokens else "" for file in files])
    streams: list[TokenStream] = []
    first_file = 0
    for name in config.source_names:
        streams.append(
            TokenStream(
                name,
                names=[file.key for file in claimed[name]],
                tokens=np.array([file.train.tokens for file in claimed[name]], dtype=np.int64),
                read_cuts=pool.cuts,
                seed=config.seed,
                interleave=config.interleave,
                first_file=first_file,
            )
        )
        first_file += len(claimed[name])
    mixture = open_mixture(config, {stream.source: stream.tokens for stream in streams})
    return RowStream(
        seq_len=config.seq_len,
        mixture=mixture,
        sources=[
            SourceRows(
                stream,
                seq_len=config.seq_len,
                window=config.shuffle_window,
                seed=config.seed,
                limit=mixture.limits.get(stream.source),
            )
            for stream in streams
        ],
        pool=pool,
        tokenizer=manifest.settings.tokenizer,
        order={
            "shards": order_hash([[file.key, file.train.tokens, file.train.checksum] for file in files]),
            "tokenizer": manifest.settings.tokenizer.fingerprint,
            **order_settings(config, mixture),
        },
        drawn_by=config.drawn_by,
    )


def source_tokens(config: DataConfig, manifest: Manifest) -> dict[str, int]:
    """Training tokens of one epoch of each source of the mixture, by the manifest."""
    claimed = claim_files(manifest, config.source_names)
    return {name: sum(file.train.tokens for file in files) for name, files in claimed.items()}


def open_mixture(config: DataConfig, tokens: Mapping[str, int] | None = None) -> StagedMixture:
    """The recipe's mixture or stages, as far as max_epochs lets them; `tokens` are those of one epoch by source."""
    return plan_stages(
        config.flat_stages,
        sampling=config.sampling,
        seed=config.seed,
        limits=_row_limits(config, tokens or {}),
        at_limit=config.on_max_epochs,
    )


def order_settings(config: DataConfig, mixture: StagedMixture) -> dict[str, Any]:
    """What the order of rows depends on beside the files and the tokenizer, by name, as JSON values."""
    return {
        **mixture.order(),
        "sampling": config.sampling,
        "seed": config.seed,
        "seq_len": config.seq_len,
        "shuffle_window": config.shuffle_window,
        "interleave": config.interleave,
    }


def _row_limits(config: DataConfig, tokens: Mapping[str, int]) -> dict[str, int]:
    """Rows that each source with a limit may give: as many as fit whole into its epochs."""
    limits = {}
    for name, available in tokens.items():
        epochs = config.epoch_limit(name)
        if epochs is not None:
            limits[name] = min(int(epochs * available // config.seq_len), ENDLESS_ROWS)
            if not limits[name]:
                raise DataError(
                    f"max_epochs of {name!r} is {float(epochs):g}, which is less than one row of {config.seq_len} of"
                    f" its {available:,} tokens; raise it, or leave the source out (data.max_epochs)"
                )
    return limits


def claim_files(manifest: Manifest, names: Sequence[str]) -> dict[str, list[FileRecord]]:
    """The files of each mixture key, in the manifest's order; DataError for a key without any."""
    owner = claim_labels(names, manifest.labels())
    claimed: dict[str, list[FileRecord]] = {name: [] for name in names}
    for file in manifest.files:
        if file.source in owner:
            claimed[owner[file.source]].append(file)
    return claimed


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
    for name, files in claim_files(manifest, config.source_names).items():
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
