"""One raw file -> its train shard, its held-out shard, its quarantine and its record.

    1. Read documents and bad lines; bad lines go to the quarantine.
    2. Take documents until about a megabyte of text is together, and encode them in one call; the beginning of a
       file's first such text also without the word cache, to compare.
    3. The hash of each text says which of the two shards its ids go to.
    4. At the file's end, if the file is still what was listed, the old record is deleted, shards (and, with
       deduplication, the hashes of the texts) get their names, and then, last, the new record is written.

How many lines may be bad is `quarantine`'s rule; `build` judges each corpus as a whole by the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.atomic import clear_unfinished_of, remove
from data_pipeline.document import BadLine, DataError, Document
from data_pipeline.file_job import Done, FileJob, write_done
from data_pipeline.held_out import HeldOutRule
from data_pipeline.locks import at_work
from data_pipeline.manifest import SPLITS, FileRecord, Split, SplitRecord, shard_path
from data_pipeline.quarantine import JUDGED_EVERY_LINES, Quarantine
from data_pipeline.readers import read_documents, refuse_changed
from data_pipeline.shard_writer import ShardWriter
from data_pipeline.text_hashes import HashWriter
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.workers import Report

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Advance:
    """What a file's build has done since it last said so."""

    text_bytes: int
    tokens: int
    bad_lines: int


def build_file(job: FileJob, report: Report) -> FileRecord:
    """Build one raw file; `report` gets an `Advance` for every batch of documents."""
    with at_work(job.lock, report):
        return rebuild(job, report).file


def rebuild(job: FileJob, report: Report) -> Done:
    """`build_file` for who holds the job's lock already; what was done of the file before is replaced."""
    _clear_unfinished(job)
    info = job.settings.tokenizer
    tokenizer = load_tokenizer(Path(job.root, info.file), info.eos_token)
    rule = HeldOutRule(job.settings.held_out)
    with ExitStack() as stack:
        quarantine = stack.enter_context(_quarantine(job))
        writers = {split: stack.enter_context(shard_writer(job, split)) for split in SPLITS}
        hashes = stack.enter_context(HashWriter(job.hashes_path)) if job.settings.dedup else None
        reading = _Reading(job, quarantine)
        checked = False
        for texts in reading.batches():
            encoded = [text.encode() for text in texts]
            held_out = [rule(data) for data in encoded]
            try:
                ids = tokenizer.encode_batch(texts, check=not checked)
            except DataError as error:
                raise DataError(f"{job}: {error}") from error
            checked = checked or bool(texts)
            for split, writer in writers.items():
                mine = [place for place, own in enumerate(held_out) if own == (split == "held_out")]
                writer.write([ids[place] for place in mine], text_bytes=sum(len(encoded[place]) for place in mine))
            if hashes:
                hashes.write(encoded, held_out)
            report(Advance(sum(map(len, encoded)), sum(map(len, ids)) + len(ids), quarantine.taken()))
        refuse_changed(job.raw)
        remove(job.record_path)
        remove(job.dropped_path)
    record = FileRecord(
        corpus=job.corpus,
        name=job.raw.name,
        source=job.raw.source,
        input_bytes=job.raw.size,
        bad_lines=quarantine.lines,
        excluded=reading.excluded,
        train=split_record(writers["train"]),
        held_out=split_record(writers["held_out"]),
    )
    done = Done(record, job.raw.version, hashes.checksum if hashes else "")
    write_done(job, done)
    return done


def _quarantine(job: FileJob) -> Quarantine:
    path = Path(job.root, "quarantine", f"{job.key}.jsonl")
    return Quarantine(path, raw_path=job.raw.path, max_bad_share=job.max_bad_share)


def _clear_unfinished(job: FileJob) -> None:
    """Delete what an interrupted build of this file left."""
    shards = [shard_path(Path(job.root), job.key, split) for split in SPLITS]
    quarantine = Path(job.root, "quarantine", f"{job.key}.jsonl")
    for path in (*shards, quarantine, job.hashes_path, job.dropped_path, job.record_path):
        clear_unfinished_of(path)


def shard_writer(job: FileJob, split: Split) -> ShardWriter:
    """A writer for the shard of one split of a file."""
    info = job.settings.tokenizer
    return ShardWriter(
        shard_path(Path(job.root), job.key, split),
        vocab_size=info.vocab_size,
        eos_id=info.eos_id,
        fingerprint=info.fingerprint,
        part_tokens=job.settings.part_tokens,
    )


def split_record(writer: ShardWriter) -> SplitRecord:
    """What a writer has written, once its block has ended."""
    header = writer.header
    if header is None:
        return SplitRecord()
    return SplitRecord(
        documents=header.documents,
        text_bytes=header.text_bytes,
        tokens=header.tokens,
        checksum=header.checksum,
    )


class _Reading:
    """The documents of one raw file, in batches; bad lines go to the quarantine."""

    def __init__(self, job: FileJob, quarantine: Quarantine) -> None:
        self._job, self._quarantine = job, quarantine
        self.excluded = 0
        """Documents passed over so far."""

    def batches(self) -> Iterator[list[str]]:
        """Texts in order, a batch at a time; some are empty, so that of lines without any texts is reported too."""
        job, quarantine = self._job, self._quarantine
        texts: list[str] = []
        characters = lines = 0
        for lines, item in enumerate(
            read_documents(job.raw, job.corpus, exclude=job.settings.pile_exclude), start=1
        ):
            if isinstance(item, Document):
                texts.append(item.text)
                characters += len(item.text)
            elif isinstance(item, BadLine):
                quarantine.add(item)
            else:
                self.excluded += 1
            judged = lines % JUDGED_EVERY_LINES == 0
            if judged:
                quarantine.judge(lines)
            if judged or len(texts) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield texts
                texts, characters = [], 0
        quarantine.judge(lines)
        yield texts
