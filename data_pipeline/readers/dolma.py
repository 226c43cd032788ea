"""Dolma: gzipped JSON lines with `id`, `text`, `source`.

`added`, `created`, `metadata` and `version` are optional and differ by source; nothing here relies on them.
Files lie in one folder per source (`wiki/`, `books/`, `cc_en_head/`, ...) and are labelled `dolma/<folder>`,
so that a mixture can weigh sources inside Dolma. Files directly in the corpus folder are labelled `dolma`.
The label comes from the path, never from the field `source`, whose values changed between versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.document import Document, RawFile
from data_pipeline.readers.files import data_files
from data_pipeline.readers.records import lone_surrogate, text_of


def find_files(root: Path) -> list[RawFile]:
    """Every file below `root`, labelled by its topmost folder. Raises `DataError` when there is none."""
    return [RawFile(path=path, name=name, source=_label(name)) for path, name in data_files(Path(root))]


def parse(record: dict[str, Any], raw_file: RawFile, line: int) -> Document:
    """One record. Only `text` is needed; raises `DataError` with the reason when it is no document."""
    text = text_of(record)
    id_ = record.get("id")
    if not isinstance(id_, str) or not id_ or lone_surrogate(id_) is not None:
        id_ = f"{raw_file.name}:{line}"
    return Document(text=text, source=raw_file.source, id=id_)


def _label(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return f"dolma/{folder}" if slash else "dolma"
