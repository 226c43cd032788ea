"""Raw corpora -> documents, with one module per corpus that knows its layout and its fields.

    files     which files below a folder are data, in which order
    opener    a file -> its lines (plain, gzip, zstandard)
    records   a line -> a JSON object -> a sound text
    redpajama, dolma, pile
              `find_files`: which files, under which labels;  `parse`: a record -> a `Document`

`read_documents` joins them: every line that is not blank becomes exactly one `Document` or one `BadLine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from data_pipeline.document import BadLine, DataError, Document, RawFile
from data_pipeline.readers import dolma, pile, redpajama
from data_pipeline.readers.opener import read_lines
from data_pipeline.readers.records import parse_object


class Reader(Protocol):
    """What a corpus module offers."""

    def find_files(self, root: Path) -> list[RawFile]:
        """The corpus's files below `root`, sorted by name; raises `DataError` when there is none."""

    def parse(self, record: dict[str, Any], raw_file: RawFile, line: int) -> Document:
        """One record -> one document; raises `DataError` with the reason when it is none."""


READERS: Mapping[str, Reader] = MappingProxyType({"redpajama": redpajama, "dolma": dolma, "pile": pile})


def reader_for(corpus: str) -> Reader:
    """The reader of `corpus`: `redpajama`, `dolma` or `pile`."""
    if corpus not in READERS:
        raise DataError(f"unknown corpus {corpus!r}; the readers are {', '.join(READERS)}")
    return READERS[corpus]


def read_documents(raw_file: RawFile, corpus: str) -> Iterator[Document | BadLine]:
    """Yield one `Document` or `BadLine` for every line of `raw_file` that is not blank, in file order.

    Raises `DataError` for a file that cannot be trusted as a whole (truncated, damaged, empty, a Git-LFS
    pointer), after yielding what came before the damaged place.
    """
    reader = reader_for(corpus)
    for number, line in enumerate(read_lines(raw_file.path), start=1):
        if line and not line.isspace():
            yield _read_line(line, number, raw_file, reader)


def _read_line(line: bytes, number: int, raw_file: RawFile, reader: Reader) -> Document | BadLine:
    try:
        return reader.parse(parse_object(line), raw_file, number)
    except DataError as error:
        return BadLine(file=raw_file.name, line=number, reason=str(error), raw=line)
