"""One raw file -> its training documents as ids, from any place on: the very tokens of its train shard.

1. Read from the place on. Bad lines go to the quarantine, and too many of them stop the run.
2. The hash of each text says whether it is held out; what is held out is left out.
3. Encode about a megabyte of text in one call, and give the documents one by one, each with the place after it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.document import BadLine, DataError, Document, Mark, RawFile
from data_pipeline.file_build import BATCH_CHARACTERS, BATCH_DOCUMENTS
from data_pipeline.held_out import HeldOutRule
from data_pipeline.quarantine import JUDGED_EVERY_LINES, TOLERATED_BAD_LINES, too_many
from data_pipeline.readers import read_documents
from data_pipeline.shards import token_width
from data_pipeline.spool.bad_lines import BadLines
from data_pipeline.spool.linear import FilePlace, Taken
from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One raw file and the corpus it belongs to."""

    corpus: str
    raw: RawFile

    @property
    def key(self) -> str:
        """Names the file among those of all corpora, as `FileRecord.key` does."""
        return f"{self.corpus}/{self.raw.name}"


@dataclass(frozen=True)
class Encoding:
    """How raw files become training documents."""

    tokenizer: Tokenizer
    is_held_out: HeldOutRule
    exclude: Sequence[str]
    """Sets of the Pile that are left out."""
    max_bad_share: float
    quarantine: Path
    """Folder for the lines that are no documents."""

    @property
    def dtype(self) -> np.dtype:
        """Of token ids as they are stored."""
        return np.dtype(f"<u{token_width(self.tokenizer.vocab_size)}")

    def judge(self, place: str, *, lines: int, bad: int) -> None:
        """Stop where of `lines` lines too many were bad; `file_build` has the same rule."""
        if too_many(bad, lines, self.max_bad_share):
            raise DataError(
                f"{place}: {bad:,} of {lines:,} lines are no documents, more than {TOLERATED_BAD_LINES} and more than"
                f" the allowed share of {self.max_bad_share:g}. They are in {self.quarantine}; repair the file, or"
                " allow more (data.raw.max_bad_share)"
            )


def training_documents(
    file: CorpusFile, after: FilePlace, encoding: Encoding, *, check: bool
) -> Generator[Taken, None, None]:
    """Every training document of `file` after a place, and then the end of the file.

    check: also encode the first of them without the word cache, and compare.
    """
    batch: list[_Text] = []
    characters = 0
    for text in _training_texts(file, after, encoding):
        batch.append(text)
        characters += len(text.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield from _encoded(batch, encoding, check=check)
            batch, characters, check = [], 0, False
    yield from _encoded(batch, encoding, check=check)


@dataclass(frozen=True, slots=True)
class _Text:
    """One training document, and how far the file has been read after it; without text: the end of the file."""

    text: str
    line: int
    end: int
    lines: int
    bad: int


def _training_texts(file: CorpusFile, after: FilePlace, encoding: Encoding) -> Iterator[_Text]:
    lines, bad = after.lines, after.bad
    bad_lines = BadLines(encoding.quarantine / f"{file.key}.jsonl")
    mark = Mark(after.line, after.end)
    for item in read_documents(file.raw, file.corpus, exclude=encoding.exclude, after=mark):
        lines += 1
        if isinstance(item, BadLine):
            bad += 1
            bad_lines.add(item)
        if lines % JUDGED_EVERY_LINES == 0:
            encoding.judge(file.raw.path, lines=lines, bad=bad)
        if isinstance(item, Document) and not encoding.is_held_out(item.text.encode()):
            yield _Text(item.text, item.line, item.end, lines, bad)
    encoding.judge(file.raw.path, lines=lines, bad=bad)
    yield _Text("", 0, 0, lines, bad)


def _encoded(batch: Sequence[_Text], encoding: Encoding, *, check: bool) -> Iterator[Taken]:
    """The documents of a batch; their ids are slices of one array, so that none is kept wider than on disk."""
    encoded = encoding.tokenizer.encode_batch([text.text for text in batch if text.text], check=check)
    stops = np.cumsum([len(ids) + 1 for ids in encoded]).tolist()
    ids = np.full(stops[-1] if stops else 0, encoding.tokenizer.eos_id, dtype=encoding.dtype)
    for own, stop in zip(encoded, stops):
        ids[stop - 1 - len(own) : stop - 1] = own
    starts = [0, *stops]
    for text, start, stop in zip(batch, starts, [*stops, starts[-1]]):  # the end of the file has an empty slice
        yield Taken(ids[start:stop], text.line, text.end, text.lines, text.bad)
