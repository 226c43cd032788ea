"""RedPajama-1T: JSON lines with `text` and `meta`, one folder per subset.

    arxiv/ book/ c4/ github/ stackexchange/ wikipedia/   plain .jsonl
    common_crawl/<dump>/                                 .jsonl.zst, flat records: `text`, `source`, scores

The subset is known by the path; as published, no record names it. It is looked for, in this order, in the
folders below the corpus folder, in the corpus folder's own name, in the start of the file's name
(`arxiv_sample.jsonl`, `wiki.jsonl`), and last in the first record: `red_pajama_subset` of the hub's
converted form, or `meta.redpajama_set_name` of SlimPajama. A record that names another subset than its file
is a bad line, since a label belongs to the whole file; SlimPajama's mixed files are to be split by subset
first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from data_pipeline.document import DataError, Document, RawFile
from data_pipeline.readers.files import data_files
from data_pipeline.readers.opener import read_lines
from data_pipeline.readers.records import parse_object, text_of

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


def find_files(root: Path) -> list[RawFile]:
    """Every file below `root`, labelled `redpajama/<subset>`. Raises `DataError` where none can be told."""
    return [
        RawFile(path=path, name=name, source=f"redpajama/{_subset(Path(root), path, name)}")
        for path, name in data_files(Path(root))
    ]


def parse(record: dict[str, Any], raw_file: RawFile, line: int) -> Document:
    """One record, whatever its subset. Raises `DataError` with the reason when it is no document."""
    text = text_of(record)
    own = _named_subset(record)
    if own is not None and f"redpajama/{own}" != raw_file.source:
        raise DataError(f"the record is of subset {own!r}, but its file is read as {raw_file.source!r}")
    return Document(text=text, source=raw_file.source, id=f"{raw_file.name}:{line}")


def _subset(root: Path, path: str, name: str) -> str:
    *folders, file_name = name.split("/")
    for folder in (*folders, root.resolve().name):
        if folder in SUBSETS:
            return folder
    prefix = next((prefix for prefix in _FILE_PREFIXES if re.match(rf"{prefix}[._-]", file_name)), None)
    if prefix:
        return _FILE_PREFIXES[prefix]
    named = _named_subset(_first_record(path))
    if named not in SUBSETS:
        raise DataError(
            f"cannot tell the RedPajama subset of {path}: no folder above it, nor its name, nor its first "
            f"record names one of {', '.join(SUBSETS)}; put it in a folder of that name"
        )
    return named


def _first_record(path: str) -> dict[str, Any]:
    first = next((line for line in read_lines(path) if line.strip()), b"{}")
    try:
        return parse_object(first)
    except DataError as error:
        raise DataError(f"{path}: its first line should tell the RedPajama subset, but is {error}") from error


def _named_subset(record: dict[str, Any]) -> str | None:
    """The subset a record itself names; None in the published form, where it names none."""
    named = record.get("red_pajama_subset")
    meta = record.get("meta")
    if named is None and isinstance(meta, dict):
        named = meta.get("redpajama_set_name")
    return None if named is None else _SLIMPAJAMA.get(str(named), str(named))
