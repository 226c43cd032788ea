"""RedPajama-1T: JSON lines with `text` and `meta`, one folder per subset.

    arxiv/ book/ c4/ github/ stackexchange/ wikipedia/   plain .jsonl
    common_crawl/<dump>/                                 .jsonl.zst, flat records: `text`, `source`, scores

The subset is known by the path; as published, no record names it. It is looked for, in this order, in the
folders below the location, in the location's own name, in the start of the file's name (`arxiv_sample.jsonl`,
`wiki.jsonl`), and last in the file's first records: `red_pajama_subset` of the hub's converted form, or
`meta.redpajama_set_name` of SlimPajama.

SlimPajama mixes subsets in one file. Where the first records name several, the file is offered once for every
subset (`chunk1/0.jsonl.zst@book`), and reading one passes over the records of the others; what names no subset
belongs to the first of them, so that each line counts once. Elsewhere a record that names another subset than
its file is a bad line, since a label belongs to the whole file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.document import DataError, Document, RawFile
from data_pipeline.readers.files import data_files
from data_pipeline.readers.looks import redpajama_set_of, refuse_another_look
from data_pipeline.readers.records import first_records, text_of

SUBSETS = ("arxiv", "book", "c4", "common_crawl", "github", "stackexchange", "wikipedia")

_FILE_PREFIXES = {**{subset: subset for subset in SUBSETS}, "cc": "common_crawl", "wiki": "wikipedia"}
_SLIMPAJAMA = {
    "RedPajamaArXiv": "arxiv",
    "RedPajamaBook": "book",
    "RedPajamaC4": "c4",
    "RedPajamaCommonCrawl": "common_crawl",
    "RedPajamaGithub": "github",
    "RedPajamaStackExchange": "stackexchange",
    "RedPajamaWikipedia": "wikipedia",
}
_DUMP = re.compile(r"\d{4}-\d{2}")


def find_files(location: str | Path, *, split_bytes: int) -> list[RawFile]:
    """Every file at `location`, labelled `redpajama/<subset>`. Raises `DataError` where none can be told."""
    listing = data_files(location, split_bytes=split_bytes)
    labelled = [one for file in listing.files for one in _labelled(listing.base, file)]
    return sorted(labelled, key=lambda file: file.name)


def passes_over(raw_file: RawFile, exclude: Sequence[str]) -> Callable[[Any], str | None] | None:
    """For one subset of a mixed file: from a record (None for a line that is none) to why it is passed over."""
    mine = raw_file.name.rpartition("@")[2]
    if mine not in SUBSETS:
        return None

    def reason(record: Mapping[str, Any] | None) -> str | None:
        named = None if record is None else _named_subset(record)
        belongs = named if named in SUBSETS else SUBSETS[0]
        if belongs != mine:
            return f"it belongs to {belongs!r}"
        if record is not None and named != mine:
            raise DataError(f"the record is of subset {named!r}, and its file holds several")
        return None

    return reason


def parse(record: dict[str, Any], raw_file: RawFile, line: int, end: int) -> Document:
    """One record, whatever its subset. Raises `DataError` with the reason when it is no document."""
    text = text_of(record)
    own = _named_subset(record)
    if own is not None and f"redpajama/{own}" != raw_file.source:
        raise DataError(f"the record is of subset {own!r}, but its file is read as {raw_file.source!r}")
    return Document(text, raw_file.source, f"{raw_file.name}:{line}", line, end)


def _labelled(base: str, file: RawFile) -> Iterator[RawFile]:
    subset = _subset_of_path(base, file.name)
    if subset:
        yield replace(file, source=f"redpajama/{subset}")
        return
    named = _subsets_of_records(file)
    if len(named) == 1:
        yield replace(file, source=f"redpajama/{named.pop()}")
    else:
        for subset in SUBSETS:
            yield replace(file, name=f"{file.name}@{subset}", source=f"redpajama/{subset}")


def _subset_of_path(base: str, name: str) -> str | None:
    *folders, file_name = name.split("/")
    above = [part for part in base.rstrip("/").split("/") if not _DUMP.fullmatch(part)]
    for folder in (*folders, *above[-1:]):
        if folder in SUBSETS:
            return folder
    prefix = next((prefix for prefix in _FILE_PREFIXES if re.match(rf"{prefix}[._-]", file_name)), None)
    return _FILE_PREFIXES[prefix] if prefix else None


def _subsets_of_records(file: RawFile) -> set[str]:
    records = list(first_records(file))
    named = {subset for record in records if (subset := _named_subset(record)) in SUBSETS}
    if not named:
        if records:
            refuse_another_look(records[0], "redpajama", file.path)
        raise DataError(
            f"cannot tell the RedPajama subset of {file.path}: no folder above it, nor its name, nor its first "
            f"{len(records)} records name one of {', '.join(SUBSETS)}; put it in a folder of that name"
        )
    return named


def _named_subset(record: Mapping[str, Any]) -> str | None:
    """The subset a record itself names; None in the published form, where it names none."""
    named = redpajama_set_of(record)
    return None if named is None else _SLIMPAJAMA.get(named, named)
