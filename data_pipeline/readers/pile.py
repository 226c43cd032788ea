"""The Pile: `train/00.jsonl.zst` .. `29.jsonl.zst`, `val.jsonl.zst` and `test.jsonl.zst`; `text` and `meta`.

All files carry the label `pile`: each holds all 22 sets shuffled together, named document by document in
`meta.pile_set_name`, which some hub forms write as the repr of a Python dictionary. Only `text` is needed
here. `val` and `test` are not read: models are compared on them, and the held-out split is cut by this
program itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.document import DataError, Document, RawFile
from data_pipeline.readers.files import data_files
from data_pipeline.readers.records import text_of

EVALUATION_SPLITS = ("val", "test")


def find_files(root: Path) -> list[RawFile]:
    """Every file below `root` but `val` and `test`. Raises `DataError` when there is none."""
    found = data_files(Path(root))
    training = [(path, name) for path, name in found if not _is_evaluation(name)]
    files = [RawFile(path=path, name=name, source="pile") for path, name in training]
    if not files:
        raise DataError(
            f"no training files below {root}, only {', '.join(name for _, name in found)}; the Pile's val "
            "and test files are not trained on (data_pipeline.readers.pile); pass the folder of train/"
        )
    return files


def parse(record: dict[str, Any], raw_file: RawFile, line: int) -> Document:
    """One record. Raises `DataError` with the reason when it is no document."""
    return Document(text=text_of(record), source=raw_file.source, id=f"{raw_file.name}:{line}")


def _is_evaluation(name: str) -> bool:
    return any(part.split(".")[0] in EVALUATION_SPLITS for part in name.split("/"))
