"""Exact deduplication: of equal texts in a set, all but the first are taken out of the shards.

The first is the first in the order of (source label, file name, line). Texts are compared by 16-byte hashes.

    1. Each file's build has left the hashes of its documents (`text_hashes`). Documents whose hashes lie in one
       of B equal ranges form a bucket; B is such that a bucket fits in memory.
    2. Bucket by bucket: gather its documents from all files, sort them by hash, and write down the place of
       every document that equals one before it.
    3. File by file: the places that all buckets name are what should be out of its shards. Nothing to do when
       just these are out. When fewer are, the shards are written again without the others, from their own
       tokens. When one is out that should stay (the file that had it before was taken away), the file is built
       again from the raw file first.

What remains is a function of the raw files and settings alone, whatever was built, stopped or killed before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.atomic import remove, write_atomically
from data_pipeline.document import DataError
from data_pipeline.file_build import Advance, rebuild, shard_writer, split_record
from data_pipeline.file_job import Done, FileJob, read_done, read_dropped, write_done
from data_pipeline.locks import at_work
from data_pipeline.manifest import SPLITS, FileRecord, Split, shard_path
from data_pipeline.shard_writer import ShardWriter
from data_pipeline.shards import Shard
from data_pipeline.text_hashes import DOCUMENT, hashes_path, runs
from data_pipeline.workers import Report, run_jobs

BUCKET_BYTES = 1 << 26
"""Hashes of a bucket; sorting them takes about three times as much memory."""
COPIED_TOKENS = 1 << 22
"""Tokens that are copied at a time, where a single document has no more."""


@dataclass(frozen=True, slots=True)
class _BucketJob:
    root: str
    keys: tuple[str, ...]
    """All files of the set, in the order in which the first of equal texts is looked for."""
    bucket: int
    buckets: int
    lock: str


@dataclass(frozen=True, slots=True)
class _DropJob:
    file: FileJob
    place: int
    """Of the file among all `files`."""
    files: int
    buckets: int

    def __str__(self) -> str:
        return str(self.file)


def deduplicate(
    root: Path,
    jobs: Sequence[FileJob],
    *,
    workers: int,
    on_step: Callable[[str, int, int], None] = lambda what, done, of: None,
    on_rebuild: Callable[[FileJob, Advance], None] = lambda job, done: None,
) -> Iterator[tuple[FileJob, FileRecord]]:
    """Take duplicates out of the shards of all files of the set at `root`, which are built.

    Yields each file with its new record. Nobody else may be writing to the set. `on_step` is told what is done, as
    (what, how many, of how many), `on_rebuild` of the progress of files that have to be built again.
    """
    jobs = sorted(jobs, key=lambda job: (job.raw.source, job.raw.name, job.corpus))
    keys = tuple(job.key for job in jobs)
    size = sum(hashes_path(root, key).stat().st_size for key in keys)
    buckets = -(-size // BUCKET_BYTES) or 1
    merged = _merged(root)
    if merged.exists():  # of an interrupted build
        shutil.rmtree(merged)
    merged.mkdir(parents=True)
    bucket_jobs = [_BucketJob(str(root), keys, bucket, buckets, jobs[0].lock) for bucket in range(buckets)]
    merging = run_jobs(_merge_bucket, bucket_jobs, workers=workers, on_progress=lambda job, message: None)
    for done, _ in enumerate(merging, start=1):
        on_step("looking for equal texts", done, buckets)
    drop_jobs = [_DropJob(job, place, len(jobs), buckets) for place, job in enumerate(jobs)]
    dropped = run_jobs(
        _drop, drop_jobs, workers=workers, on_progress=lambda job, message: on_rebuild(job.file, message)
    )
    for done, (drop_job, record) in enumerate(dropped, start=1):
        on_step("taking them out of the shards", done, len(jobs))
        yield drop_job.file, record
    shutil.rmtree(merged)


def _merged(root: Path) -> Path:
    """Folder of the buckets' findings: for F files, F + 1 places of where each file's begin, and then they."""
    return root / "dedup" / ".merged"


def _merge_bucket(job: _BucketJob, report: Report) -> None:
    """Write down the documents of one range of hashes that equal an earlier one."""
    root = Path(job.root)
    with at_work(job.lock, report):
        slices, files = [np.empty(0, dtype=DOCUMENT)], [np.empty(0, dtype=np.int64)]
        for file, key in enumerate(job.keys):
            for run in runs(hashes_path(root, key)):
                start, stop = (_position(run, bucket, job.buckets) for bucket in (job.bucket, job.bucket + 1))
                slices.append(np.array(run[start:stop]))  # a copy: each map that is kept is a file that is open
                files.append(np.full(stop - start, file))
        documents, file_of = np.concatenate(slices), np.concatenate(files)
        order = np.lexsort((documents["low"], documents["high"]))  # stable: equal texts stay in the set's order
        high, low = documents["high"][order], documents["low"][order]
        repeated = order[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
        places, file_of = documents["place"][repeated], file_of[repeated]
        in_order = np.lexsort((places, file_of))
        begins = np.searchsorted(file_of[in_order], np.arange(len(job.keys) + 1))
        np.concatenate([begins.astype("<u8"), places[in_order]]).tofile(_merged(root) / str(job.bucket))


def _position(run: np.ndarray, bucket: int, buckets: int) -> int:
    """Where in a run the documents of a bucket begin."""
    limit = bucket * (1 << 64) // buckets
    return len(run) if limit >> 64 else int(np.searchsorted(run["high"], np.uint64(limit)))


def _wanted(job: _DropJob) -> np.ndarray:
    """Places of a file's documents that should not be in its shards, ascending uint64."""
    found = [np.empty(0, dtype="<u8")]
    for bucket in range(job.buckets):
        path = _merged(Path(job.file.root)) / str(bucket)
        begin, end = np.fromfile(path, dtype="<u8", count=2, offset=8 * job.place).tolist()
        found.append(np.fromfile(path, dtype="<u8", count=end - begin, offset=8 * (job.files + 1 + begin)))
    return np.sort(np.concatenate(found))


def _drop(job: _DropJob, report: Report) -> FileRecord:
    """Bring the shards of one file to the state that is wanted; its record."""
    file = job.file
    with at_work(file.lock, report):
        done = read_done(file)
        if done is None:
            raise DataError(f"what was built of {file} has changed since; run the same command again")
        wanted, dropped = _wanted(job), read_dropped(Path(file.root), file.key)
        if np.array_equal(wanted, dropped):
            return done.file
        if not np.isin(dropped, wanted).all():
            before, done = done, rebuild(file, report)
            if before.hashes != done.hashes:
                raise DataError(f"{file} has changed while the set was being built; run the same command again")
            dropped = dropped[:0]
        return _without(file, done, dropped=dropped, wanted=wanted) if len(wanted) else done.file


def _without(file: FileJob, done: Done, *, dropped: np.ndarray, wanted: np.ndarray) -> FileRecord:
    """Write a file's shards, which lack the documents `dropped`, again without those of `wanted`."""
    with ExitStack() as stack:
        writers = [stack.enter_context(shard_writer(file, split)) for split in SPLITS]
        copies = [_Copy(file, split, writer) for split, writer in zip(SPLITS, writers)]
        for run in runs(file.hashes_path):
            documents = run[np.argsort(run["place"])]
            is_in, stays = (_is_none_of(documents["place"], places) for places in (dropped, wanted))
            for held_out, copy in enumerate(copies):
                own = is_in & (documents["text"] & 1 == held_out)
                copy.write(stays[own], documents["text"][own] >> 1)
        for copy in copies:
            copy.end()
        remove(file.record_path)
    write_atomically(file.dropped_path, wanted.tobytes())
    train, held_out_record = map(split_record, writers)
    record = replace(done.file, train=train, held_out=held_out_record, duplicates=len(wanted))
    write_done(file, replace(done, file=record))
    return record


def _is_none_of(run: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether each of a run's places is none of `places`, both ascending; bool [run]."""
    near = places[slice(*np.searchsorted(places, run[[0, -1]] + np.array([0, 1], dtype=np.uint64)))]
    return np.isin(run, near, invert=True)


class _Copy:
    """Copies the documents of a shard that stay, in constant memory."""

    def __init__(self, file: FileJob, split: Split, writer: ShardWriter) -> None:
        self._path = shard_path(Path(file.root), file.key, split)
        self._shard = Shard(self._path) if self._path.exists() else None
        self._writer = writer
        self._at = 0

    def write(self, stays: np.ndarray, text_bytes: np.ndarray) -> None:
        """Go on with the next documents: whether each stays, bool [n], and the bytes of its text, uint64 [n]."""
        if not len(stays):
            return
        if self._shard is None or self._at + len(stays) > len(self._shard.ends):
            raise self._unequal()
        start = int(self._shard.ends[self._at - 1]) if self._at else 0
        ends = self._shard.ends[self._at : self._at + len(stays)].astype(np.int64)
        marks = np.arange(start + COPIED_TOKENS, ends[-1], COPIED_TOKENS)
        borders = np.unique(np.concatenate([[0], np.searchsorted(ends, marks), [len(ends)]])).tolist()
        lengths = np.diff(ends, prepend=start)
        for first, last in pairwise(borders):
            here, long = stays[first:last], lengths[first:last]
            tokens = self._shard.tokens[ends[first] - long[0] : ends[last - 1]]
            self._writer.write_tokens(
                tokens[np.repeat(here, long)],
                np.cumsum(long[here]),
                text_bytes=int(text_bytes[first:last][here].sum()),
            )
        self._at += len(stays)

    def end(self) -> None:
        """Check that all documents of the shard were gone through."""
        if self._at != (len(self._shard.ends) if self._shard else 0):
            raise self._unequal()

    def _unequal(self) -> DataError:
        return DataError(
            f"shard {self._path} has other documents than the hashes of its build; delete it and run the same"
            " command again"
        )
