"""The Pile: `train/00.jsonl.zst` .. `29.jsonl.zst`, `val.jsonl.zst` and `test.jsonl.zst`; `text` and `meta`.

All files carry the label `pile`: each holds all 22 sets shuffled together, named document by document in
`meta.pile_set_name`, which some hub forms write as the repr of a Python dictionary. Sets may be excluded by
name; a document that does not say its set is then a bad line, since it might be of an excluded one. `val` and
`test` are not read: models are compared on them, and the held-out split is cut by this program itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data_pipeline.document import DataError, Document, RawFile
from data_pipeline.readers.files import data_files
from data_pipeline.readers.looks import pile_set_of
from data_pipeline.readers.records import text_of

SETS = (
    *("ArXiv", "BookCorpus2", "Books3", "DM Mathematics", "Enron Emails", "EuroParl", "FreeLaw", "Github"),
    *("Gutenberg (PG-19)", "HackerNews", "NIH ExPorter", "OpenSubtitles", "OpenWebText2", "PhilPapers"),
    *("Pile-CC", "PubMed Abstracts", "PubMed Central", "StackExchange", "USPTO Backgrounds", "Ubuntu IRC"),
    *("Wikipedia (en)", "YoutubeSubtitles"),
)
_EVALUATION = re.compile(r"(val|valid|validation|test)([.-].*)?")


def find_files(location: str | Path, *, split_bytes: int) -> list[RawFile]:
    """Every file at `location` but `val` and `test`. Raises `DataError` when there is none."""
    found = data_files(location, split_bytes=split_bytes).files
    files = [replace(file, source="pile") for file in found if not _is_evaluation(file.name)]
    if not files:
        raise DataError(
            f"no training files at {location}, only {', '.join(file.name for file in found)}; the Pile's val "
            "and test files are not trained on (data_pipeline.readers.pile); pass the folder of train/"
        )
    return files


def checked_sets(names: Iterable[str]) -> tuple[str, ...]:
    """The names sorted and each once. Raises `DataError` for one that is none of the Pile's sets."""
    names = sorted(set(names))
    for name in names:
        if name not in SETS:
            lowered = {known.lower(): known for known in SETS}
            nearest = get_close_matches(name.lower(), lowered, n=1, cutoff=0.3)
            hint = f"did you mean {lowered[nearest[0]]!r}? " if nearest else ""
            raise DataError(f"the Pile has no set {name!r}; {hint}Its sets are {', '.join(SETS)}")
    return tuple(names)


def passes_over(raw_file: RawFile, exclude: Sequence[str]) -> Callable[[Any], str | None] | None:
    """A function from a record (None for a line that is none) to why it is passed over, None where it is not."""
    excluded = checked_sets(exclude)
    if not excluded:
        return None

    def reason(record: dict[str, Any] | None) -> str | None:
        if record is None:
            return None
        name = pile_set_of(record)
        if name in excluded:
            return f"set {name!r} is excluded"
        if name not in SETS:
            said = "names no set of the Pile" if name is None else f"is of {name!r}, which is no set of the Pile"
            raise DataError(f"the record {said}, so it cannot be told whether it is to be excluded")
        return None

    return reason


def parse(record: dict[str, Any], raw_file: RawFile, line: int, end: int) -> Document:
    """One record. Raises `DataError` with the reason when it is no document."""
    return Document(text_of(record), raw_file.source, f"{raw_file.name}:{line}", line, end)


def _is_evaluation(name: str) -> bool:
    return any(_EVALUATION.fullmatch(part) for part in name.split("/"))
