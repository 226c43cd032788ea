"""How much disk a build will take, from the raw bytes that are left and the ratio seen so far."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.document import DataError
from data_pipeline.file_job import FileJob
from data_pipeline.manifest import SPLITS, FileRecord, Settings
from data_pipeline.shards import token_width
from data_pipeline.text_hashes import DOCUMENT

COMPRESSED_TOKENS = 0.6
"""Tokens per raw byte before a file is done: about 2.5 bytes of text a compressed byte, 4 a token."""
PLAIN_TOKENS = 0.23
"""The same for plain JSON lines, of which about nine tenths are text."""


class SpaceEstimate:
    """Keeps count of what is built of a set's files, and what the rest will take."""

    def __init__(self, root: Path, settings: Settings, jobs: Iterable[FileJob]) -> None:
        self._root, self._settings = root, settings
        self._width = token_width(settings.tokenizer.vocab_size)
        self._left = {job.key: job for job in jobs}
        self._seen: dict[bool, tuple[int, int]] = {}

    def built(self, job: FileJob, record: FileRecord) -> None:
        """Count a file that is done."""
        self._left.pop(job.key, None)
        raw, out = self._seen.get(_is_plain(job), (0, 0))
        self._seen[_is_plain(job)] = (raw + job.size, out + self._output_bytes(record))

    def _output_bytes(self, record: FileRecord) -> int:
        per_document = 8 + (DOCUMENT.itemsize if self._settings.dedup else 0)
        return sum(
            self._width * record.split(split).tokens + per_document * record.split(split).documents for split in SPLITS
        )

    def _ratio(self, plain: bool) -> float:
        """Bytes that a byte of a plain or of a compressed raw file becomes."""
        raw, out = self._seen.get(plain, (0, 0))
        return out / raw if raw else self._width * (PLAIN_TOKENS if plain else COMPRESSED_TOKENS)

    def foreseen(self) -> str:
        """What the files that are left will take, in words, and whether the disk has it."""
        needed, free, left = self._missing()
        text = f"about {size(needed)} will be written for {size(left)} of raw files; {size(free)} are free"
        return text + (": too little, so make room or stop here" if needed > free else "")

    def shortage(self) -> str:
        """How much is missing on a disk that is full, in words."""
        needed, free, left = self._missing()
        if not self._left:
            return (
                f"no space is left for {self._root}: all files are built, but each worker that takes duplicates out"
                f" writes a file's shards anew before it deletes the old ones, and {size(free)} are free; make room for"
                " the largest, and run the same command again"
            )
        room = f"make room for about {size(needed - free)} more"
        if needed <= free:
            room = "make room, or see whether a quota or the number of files is what is used up"
        return (
            f"no space is left for {self._root}: the {size(left)} of raw files still to build take about"
            f" {size(needed)}, and {size(free)} are free; finished files are kept: {room}, and run the same command"
            " again"
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Where the disk is full, say about how much is missing."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(self.shortage()) from error

    def _missing(self) -> tuple[float, int, int]:
        """(bytes that the rest will take, bytes that are free, raw bytes that are left)."""
        needed = sum(job.size * self._ratio(_is_plain(job)) for job in self._left.values())
        return needed, shutil.disk_usage(self._root).free, sum(job.size for job in self._left.values())


def size(count: float) -> str:
    """Bytes for people: 0.3 MB, 12.0 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _is_plain(job: FileJob) -> bool:
    return job.raw.path.endswith((".jsonl", ".json", ".ndjson"))
