"""Raw corpora -> documents, with one module per corpus that knows its layout and its fields.

    storage   where files lie: on this machine, or behind a URL
    files     which files at a location are data, in which order, and where large ones are cut
    opener    a file -> its lines (plain, gzip, zstandard)
    tables    a .parquet file or a dataset of the hub -> its records
    records   a line -> a JSON object -> a sound text
    looks     which corpus a record certainly comes from
    redpajama, dolma, pile
              `find_files`: which files, under which labels;  `parse`: a record -> a `Document`;
              `passes_over`: which records are left out on purpose

`read_documents` joins them: every line that is not blank becomes exactly one `Document`, `BadLine` or
`PassedOver`, and every item says where reading can go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import orjson

from data_pipeline.document import BadLine, DataError, Document, Mark, PassedOver, RawFile
from data_pipeline.readers import dolma, pile, redpajama
from data_pipeline.readers.files import corpus_around, local_folder, refuse_changed
from data_pipeline.readers.looks import refuse_another_look
from data_pipeline.readers.opener import read_lines
from data_pipeline.readers.pile import checked_sets
from data_pipeline.readers.records import first_records, parse_object
from data_pipeline.readers.storage import is_url
from data_pipeline.readers.tables import is_table, read_rows

__all__ = [
    "READERS",
    "Reader",
    "checked_sets",
    "corpus_around",
    "local_folder",
    "raw_files",
    "read_documents",
    "reader_for",
    "refuse_changed",
]

_PassesOver = Callable[[Any], "str | None"]


class Reader(Protocol):
    """What a corpus module offers."""

    def find_files(self, location: str | Path, *, split_bytes: int) -> list[RawFile]:
        """The corpus's files at `location`, sorted by name; raises `DataError` when there is none."""

    def passes_over(self, raw_file: RawFile, exclude: Sequence[str]) -> _PassesOver | None:
        """None where all of the file is read; else a function from a record (None for a line that holds none) to
        the reason why it is left out, None where it is not; it raises `DataError` where that cannot be told."""

    def parse(self, record: dict[str, Any], raw_file: RawFile, line: int, end: int) -> Document:
        """One record -> one document; raises `DataError` with the reason when it is none."""


READERS: Mapping[str, Reader] = MappingProxyType({"redpajama": redpajama, "dolma": dolma, "pile": pile})


def reader_for(corpus: str) -> Reader:
    """The reader of `corpus`: `redpajama`, `dolma` or `pile`."""
    if corpus not in READERS:
        raise DataError(f"unknown corpus {corpus!r}; the readers are {', '.join(READERS)}")
    return READERS[corpus]


def raw_files(corpora: Mapping[str, str | Path], *, split_bytes: int) -> list[tuple[str, RawFile]]:
    """The files of all corpora given as {corpus: location}, each with its corpus, by corpus as given and name.

    A location is a folder, a file, a pattern, a URL of one of them, or `hub:NAME[:CONFIG[:SPLIT]]`. Plain files
    above `split_bytes` come in pieces. Raises `DataError` for a location without data, for one that certainly
    holds another corpus, and for a file under two corpora.
    """
    found: list[tuple[str, RawFile]] = []
    owner: dict[str, str] = {}
    for corpus, location in corpora.items():
        files = reader_for(corpus).find_files(location, split_bytes=split_bytes)
        _refuse_another_corpus(files[0], corpus)
        for file in files:
            place = file.path if is_url(file.path) else os.path.realpath(file.path)
            if owner.setdefault(place, corpus) != corpus:
                raise DataError(f"{file.path} would be read as {owner[place]} and as {corpus}; name it once")
        found += [(corpus, file) for file in files]
    return found


def _refuse_another_corpus(file: RawFile, corpus: str) -> None:
    try:
        first = next(first_records(file), None)
    except DataError:
        return  # what is wrong with the file is said when it is read
    if first is not None:
        refuse_another_look(first, corpus, file.path)


def read_documents(
    raw_file: RawFile, corpus: str, *, exclude: Sequence[str] = (), after: Mark = Mark()
) -> Iterator[Document | BadLine | PassedOver]:
    """Yield one item for every line of `raw_file` that is not blank, in file order, beginning `after` a mark.

    `exclude` names sets of the Pile to leave out; other corpora have none of them. A mark is made of the `line`
    and `end` of any item: what is read after it is what came after that item.

    Raises `DataError` for a file that cannot be trusted as a whole (truncated, damaged, empty, a Git-LFS
    pointer, shorter than the mark), after yielding what came before the damaged place.
    """
    reader = reader_for(corpus)
    reason_for = reader.passes_over(raw_file, exclude) or _keep
    if is_table(raw_file.path):
        yield from _read_table(raw_file, reader, reason_for, after)
        return
    number = after.line
    for line, end in read_lines(raw_file.path, span=raw_file.span, skip=after.end):
        number += 1
        if not line or line.isspace():
            continue
        try:
            record = parse_object(line)
        except DataError as error:
            reason = reason_for(None)
            yield PassedOver(number, end, reason) if reason else BadLine(raw_file.name, number, str(error), line, end)
            continue
        try:
            reason = reason_for(record)
            yield PassedOver(number, end, reason) if reason else reader.parse(record, raw_file, number, end)
        except DataError as error:
            yield BadLine(raw_file.name, number, str(error), line, end)


def _keep(record: Any) -> None:
    """No reason to pass over any record."""


def _read_table(
    raw_file: RawFile, reader: Reader, reason_for: _PassesOver, after: Mark
) -> Iterator[Document | BadLine | PassedOver]:
    """As `read_documents`; the `end` of a record is its number, since a table's content is its records."""
    with closing(read_rows(raw_file.path, after.line)) as rows:
        for number, record in enumerate(rows, start=after.line + 1):
            try:
                reason = reason_for(record)
                yield PassedOver(number, number, reason) if reason else reader.parse(record, raw_file, number, number)
            except DataError as error:
                raw = orjson.dumps(record, default=str)
                yield BadLine(raw_file.name, number, str(error), raw, number)
