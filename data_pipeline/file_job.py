"""One raw file to build, and how a build knows what is done of it.

The record OUT/records/<corpus>/<raw file>.json is written last and deleted before anything that it speaks of
is replaced. So a file that has a record is complete, whenever a build was killed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from data_pipeline.atomic import write_atomically
from data_pipeline.document import DataError, RawFile
from data_pipeline.manifest import SPLITS, FileRecord, Settings, checked_shard
from data_pipeline.text_hashes import DOCUMENT, hashes_path


@dataclass(frozen=True, slots=True)
class FileJob:
    """One raw file to build."""

    root: str
    corpus: str
    raw: RawFile
    settings: Settings
    max_bad_share: float
    lock: str
    """A lock that is held, shared, while the file is written: a killed build's workers may live on a little."""

    @property
    def key(self) -> str:
        """Names the file within the set, as `FileRecord.key`."""
        return f"{self.corpus}/{self.raw.name}"

    @property
    def size(self) -> int:
        """Bytes of the raw file as stored."""
        return self.raw.size

    @property
    def record_path(self) -> Path:
        """Where the record lies."""
        return Path(self.root, "records", f"{self.key}.json")

    @property
    def hashes_path(self) -> Path:
        """Where the hashes of the documents' texts lie, with deduplication."""
        return hashes_path(Path(self.root), self.key)

    @property
    def dropped_path(self) -> Path:
        """Where the places of the documents left out as duplicates lie, if any are."""
        return dropped_path(Path(self.root), self.key)

    def __str__(self) -> str:
        return self.raw.path


@dataclass(frozen=True, slots=True)
class Done:
    """What is written when a file is complete: its record, and what it was made from."""

    file: FileRecord
    version: str
    """The raw file's."""
    hashes: str = ""
    """Checksum of the documents' hashes, with deduplication."""


_DONE = TypeAdapter(Done)  # made once: that takes longer than reading a record


def read_done(job: FileJob) -> Done | None:
    """The record of a file that needs no building: same input, everything in place. None otherwise."""
    try:
        done = _DONE.validate_json(job.record_path.read_bytes())
        for split in SPLITS:
            checked_shard(Path(job.root), job.settings.tokenizer, done.file, split)
        if job.settings.dedup:
            _check_dedup(job, done.file)
    except (FileNotFoundError, ValidationError, DataError):
        return None
    same = (done.file.source, done.file.input_bytes, done.version) == (job.raw.source, job.raw.size, job.raw.version)
    return done if same else None


def _check_dedup(job: FileJob, file: FileRecord) -> None:
    if job.hashes_path.stat().st_size != file.documents * DOCUMENT.itemsize:
        raise DataError(f"{job.hashes_path} is damaged")
    if len(read_dropped(Path(job.root), file.key)) != file.duplicates:
        raise DataError(f"{job.dropped_path} is damaged")


def write_done(job: FileJob, done: Done) -> None:
    """Write the record, after everything else."""
    write_atomically(job.record_path, orjson.dumps(done))


def dropped_path(root: Path, file_key: str) -> Path:
    """OUT/dedup/<corpus>/<raw file>.dropped: ascending uint64, little-endian; no duplicates, no file."""
    return root / "dedup" / f"{file_key}.dropped"


def read_dropped(root: Path, file_key: str) -> np.ndarray:
    """Places of the documents of a file that its shards do not have because they are duplicates, uint64 [n]."""
    path = dropped_path(root, file_key)
    return np.fromfile(path, dtype="<u8") if path.exists() else np.empty(0, dtype="<u8")
