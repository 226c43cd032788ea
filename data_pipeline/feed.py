"""The one door for training: rows, held-out text and tokenizer, from prepared shards or from raw files.

`data.mode` says which. Both give the same rows for the same files and settings.
"""

from __future__ import annotations

from pathlib import Path

from data_pipeline import stream
from data_pipeline.config import DataConfig
from data_pipeline.manifest import TokenizerInfo, read_manifest
from data_pipeline.row_source import RowSource
from data_pipeline.spool.opening import open_spool, open_spool_held_out, read_tokenizer
from data_pipeline.stream import HeldOut, open_stream


def open_rows(config: DataConfig) -> RowSource:
    """Open a recipe's data for training; `close` it in the end. Raises DataError."""
    return open_stream(config) if config.mode == "prepared" else open_spool(config)


def open_held_out(config: DataConfig, *, rows: int) -> dict[str, HeldOut]:
    """The held-out text of each source, by mixture key; a source of which none was held out is left out.

    rows: how many the caller will ask for. Of raw files no more text is read than these take, and its bytes per token
    are counted over what was read.
    """
    return stream.open_held_out(config) if config.mode == "prepared" else open_spool_held_out(config, rows=rows)


def find_tokenizer(config: DataConfig) -> tuple[Path, TokenizerInfo]:
    """The tokenizer's file, and what is known of it. Raises DataError where the data are not there."""
    if config.mode == "stream":
        return read_tokenizer(config)
    known = read_manifest(Path(config.path)).settings.tokenizer
    return Path(config.path) / known.file, known
