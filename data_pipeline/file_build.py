"""One raw file -> its train shard, its held-out shard, its quarantine and its record.

    1. Read documents and bad lines; bad lines go to the quarantine with their place, the reason and their
       bytes.
    2. Take documents until about a megabyte of text is together, and encode them in one call.
    3. The hash of each text says which of the two shards its ids go to.
    4. When the file is at its end both shards get their names; then, last, the record is written.

A file may have 10 bad lines, or `max_bad_share` of its lines if that is more. This is judged every 10,000
lines and at the file's end; one bad line more stops the build (`build` judges each corpus as a whole by the same
rule). The quarantine is kept in any case.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import orjson
from pydantic import TypeAdapter, ValidationError

from data_pipeline.atomic import commit, create_beside, write_atomically
from data_pipeline.document import BadLine, DataError, RawFile
from data_pipeline.held_out import HeldOutRule
from data_pipeline.manifest import SPLITS, FileRecord, Settings, Split, SplitRecord, checked_shard, shard_path
from data_pipeline.readers import read_documents
from data_pipeline.shard_writer import ShardWriter
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.workers import Report

TOLERATED_BAD_LINES = 10
JUDGED_EVERY_LINES = 10_000
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class FileJob:
    """One raw file to build."""

    root: str
    corpus: str
    raw: RawFile
    raw_bytes: int
    """Size of the raw file as it lies on disk."""
    settings: Settings
    max_bad_share: float

    @property
    def key(self) -> str:
        """Names the file within the set, as `FileRecord.key`."""
        return f"{self.corpus}/{self.raw.name}"

    def __str__(self) -> str:
        return self.raw.path


@dataclass(frozen=True, slots=True)
class Advance:
    """What a file's build has done since it last said so."""

    text_bytes: int
    tokens: int
    bad_lines: int


@dataclass(frozen=True, slots=True)
class _Done:
    """What is written when a file is complete: its record, and the input it was made from."""

    file: FileRecord
    modified_ns: int


def _record_path(job: FileJob) -> Path:
    return Path(job.root) / "records" / f"{job.key}.json"


def finished_record(job: FileJob) -> FileRecord | None:
    """The record of a file that needs no building: same input, shards in place. None otherwise."""
    try:
        done = TypeAdapter(_Done).validate_json(_record_path(job).read_bytes())
        for split in SPLITS:
            checked_shard(Path(job.root), job.settings.tokenizer, done.file, split)
    except (FileNotFoundError, ValidationError, DataError):
        return None
    status = os.stat(job.raw.path)
    same = (done.file.source, done.file.input_bytes, done.modified_ns) == (
        job.raw.source,
        status.st_size,
        status.st_mtime_ns,
    )
    return done.file if same else None


def build_file(job: FileJob, report: Report) -> FileRecord:
    """Build one raw file; `report` gets an `Advance` for every batch of documents."""
    info = job.settings.tokenizer
    tokenizer = load_tokenizer(Path(job.root, info.file), info.eos_token)
    rule = HeldOutRule(job.settings.held_out)
    status = os.stat(job.raw.path)
    with ExitStack() as stack:
        quarantine = stack.enter_context(_Quarantine(job))
        writers = {split: stack.enter_context(_writer(job, split)) for split in SPLITS}
        for texts in _batches(job, quarantine):
            tokens = 0
            encoded = [text.encode() for text in texts]
            splits: list[Split] = ["held_out" if rule(data) else "train" for data in encoded]
            ids = tokenizer.encode_batch(texts)
            for split, writer in writers.items():
                mine = [place for place, own in enumerate(splits) if own == split]
                writer.write(
                    [ids[place] for place in mine], text_bytes=sum(len(encoded[place]) for place in mine)
                )
                tokens += sum(len(ids[place]) + 1 for place in mine)
            report(Advance(sum(map(len, encoded)), tokens, quarantine.taken()))
    record = FileRecord(
        corpus=job.corpus,
        name=job.raw.name,
        source=job.raw.source,
        input_bytes=status.st_size,
        bad_lines=quarantine.lines,
        train=_split_record(writers["train"]),
        held_out=_split_record(writers["held_out"]),
    )
    write_atomically(_record_path(job), orjson.dumps(_Done(record, status.st_mtime_ns)))
    return record


def _writer(job: FileJob, split: Split) -> ShardWriter:
    info = job.settings.tokenizer
    return ShardWriter(
        shard_path(Path(job.root), job.key, split),
        vocab_size=info.vocab_size,
        eos_id=info.eos_id,
        fingerprint=info.fingerprint,
        part_tokens=job.settings.part_tokens,
    )


def _split_record(writer: ShardWriter) -> SplitRecord:
    header = writer.header
    if header is None:
        return SplitRecord()
    return SplitRecord(
        documents=header.documents,
        text_bytes=header.text_bytes,
        tokens=header.tokens,
        checksum=header.checksum,
    )


def _batches(job: FileJob, quarantine: _Quarantine) -> Iterator[list[str]]:
    """Texts of the file's documents in order, a batch at a time; bad lines go to the quarantine.

    The last batch may be empty, so that bad lines after the last document are reported too.
    """
    texts: list[str] = []
    characters = 0
    lines = 0
    for lines, item in enumerate(read_documents(job.raw, job.corpus), start=1):
        if isinstance(item, BadLine):
            quarantine.add(item)
        else:
            texts.append(item.text)
            characters += len(item.text)
        if lines % JUDGED_EVERY_LINES == 0:
            quarantine.judge(lines)
        if len(texts) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    quarantine.judge(lines)
    yield texts


class _Quarantine:
    """The bad lines of one file, in OUT/quarantine/<corpus>/<raw file>.jsonl; no bad lines, no file."""

    def __init__(self, job: FileJob) -> None:
        self.path = Path(job.root, "quarantine", f"{job.key}.jsonl")
        self.lines = 0
        self._job = job
        self._taken = 0
        self._last = ""
        self._file = create_beside(self.path)

    def add(self, bad: BadLine) -> None:
        """Copy a bad line: its place, why it is bad, and its bytes in base64."""
        entry = {
            "file": bad.file,
            "line": bad.line,
            "reason": bad.reason,
            "raw": base64.b64encode(bad.raw).decode(),
        }
        self._file.write(orjson.dumps(entry) + b"\n")
        self.lines += 1
        self._last = f"line {bad.line} ({bad.reason})"

    def taken(self) -> int:
        """Lines added since it was last asked."""
        new = self.lines - self._taken
        self._taken = self.lines
        return new

    def judge(self, lines: int) -> None:
        """Stop the build when of `lines` lines too many were bad."""
        allowed = max(TOLERATED_BAD_LINES, self._job.max_bad_share * lines)
        if self.lines > allowed:
            raise DataError(
                f"{self._job.raw.path}: {self.lines:,} of {lines:,} lines are no documents, more than"
                f" {TOLERATED_BAD_LINES} and more than the allowed share of {self._job.max_bad_share:g}; the"
                f" last is {self._last}. They are in {self.path}; repair the file, or allow more with"
                " --max-bad-share"
            )

    def __enter__(self) -> _Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if self.lines:
                commit(self._file, self.path)
            else:
                Path(self._file.name).unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)
