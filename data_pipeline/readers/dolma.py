"""Dolma: gzipped JSON lines with `id`, `text`, `source`.

`added`, `created`, `metadata` and `version` are optional and differ by source; nothing here relies on them.
Labels are `dolma/<source>`, so that a mixture can weigh sources inside Dolma. The source is

    1. the topmost folder, as in all versions since 1 (`wiki/`, `books/`, `cc_en_head/`, ...); a folder that
       names a version (`v1_5`, `dolma-v1_6`) is looked through;
    2. for a file directly in the corpus folder, where downloads by a list of URLs put it, the start of its
       name, up to its number: `cc_en_head-0000.json.gz` is `dolma/cc_en_head`;
    3. none, and the label plain `dolma`, where the name tells none either (`documents-000.json.gz`), or is that
       of a sample drawn from all sources (`v1_5r2_sample-0000.json.gz`).

The label never comes from the field `source`, whose values changed between versions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.document import Document, RawFile
from data_pipeline.readers.files import data_files
from data_pipeline.readers.records import lone_surrogate, text_of

_VERSION = re.compile(r"(dolma[-_])?v\d")
_NUMBERED = re.compile(r"(?P<source>.+?)[-_.]\d+([-_.]of[-_.]\d+)?\.")
_NO_SOURCES = ("chunk", "data", "documents", "file", "part", "shard", "train")


def find_files(location: str | Path, *, split_bytes: int) -> list[RawFile]:
    """Every file at `location`, labelled by its source. Raises `DataError` when there is none."""
    listing = data_files(location, split_bytes=split_bytes)
    return [replace(file, source=_label(file.name)) for file in listing.files]


def passes_over(raw_file: RawFile, exclude: Sequence[str]) -> Callable[[Any], str | None] | None:
    """Nothing of Dolma is passed over."""
    return None


def parse(record: dict[str, Any], raw_file: RawFile, line: int, end: int) -> Document:
    """One record. Only `text` is needed; raises `DataError` with the reason when it is no document."""
    text = text_of(record)
    id_ = record.get("id")
    if not isinstance(id_, str) or not id_ or lone_surrogate(id_) is not None:
        id_ = f"{raw_file.name}:{line}"
    return Document(text, raw_file.source, id_, line, end)


def _label(name: str) -> str:
    *folders, file_name = name.split("/")
    folder = next((folder for folder in folders if not _VERSION.match(folder)), None)
    if folder:
        return f"dolma/{folder}"
    numbered = _NUMBERED.match(file_name)
    if not numbered or numbered["source"] in _NO_SOURCES or _VERSION.match(file_name):
        return "dolma"
    return f"dolma/{numbered['source']}"
