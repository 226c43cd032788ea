"""Conservation: what the raw files hold against what the shards hold, to the token; and the mixture's
exactness.

The raw files are read and encoded once more, document by document, each with one end-of-document id. The
shards' own tokens are counted, not what the manifest says of them. Nothing is shared with `build` but the
readers and the tokenizer. Of a deduplicated set, which documents are duplicates is taken from its build.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.document import BadLine, DataError, PassedOver, RawFile, counted
from data_pipeline.file_job import read_dropped
from data_pipeline.manifest import SPLITS, FileRecord, Settings, TokenizerInfo, read_manifest, shard_path
from data_pipeline.readers import raw_files, read_documents
from data_pipeline.shards import CHUNK_BYTES, Shard
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.workers import Report, run_jobs

DEVIATION_BOUND = 1.1
"""Rows by which a source may be off its share at any prefix of the stream."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a file holds, or several; every non-blank line is in one of documents, bad lines, excluded, duplicates."""

    documents: int = 0
    """Those to train on and those held out."""
    tokens: int = 0
    """Of these documents."""
    bad_lines: int = 0
    excluded: int = 0
    duplicates: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*map(sum, zip(astuple(self), astuple(other))))

    def __str__(self) -> str:
        parts = [counted(self.documents, "document"), counted(self.tokens, "token")]
        parts += [counted(self.bad_lines, "bad line")]
        parts += [f"{self.excluded:,} excluded"] if self.excluded else []
        parts += [counted(self.duplicates, "duplicate")] if self.duplicates else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Counted:
    """Raw files against shards, by source label."""

    raw: Mapping[str, Tally]
    shards: Mapping[str, Tally]
    problems: list[str]
    """One message for each file whose numbers differ, or that is on one side only; empty when all agree."""


@dataclass(frozen=True, slots=True)
class _CountJob:
    corpus: str
    raw: RawFile
    root: str
    settings: Settings

    def __str__(self) -> str:
        return self.raw.path


def count_set(
    root: Path,
    corpora: Mapping[str, str | Path],
    *,
    workers: int = 1,
    on_file: Callable[[RawFile], None] = lambda file: None,
) -> Counted:
    """Count the corpora given as {corpus name: folder} again and compare them with the set at `root`."""
    if not corpora:
        raise DataError("nothing to count: name at least one corpus folder (--redpajama, --dolma or --pile)")
    manifest = read_manifest(root)
    info = manifest.settings.tokenizer
    jobs = [
        _CountJob(name, file, str(root), manifest.settings)
        for name, file in raw_files(corpora, split_bytes=manifest.settings.split_bytes)
    ]
    listed = {file.key: file for file in manifest.files if file.corpus in corpora}
    raw: dict[str, Tally] = {}
    shards: dict[str, Tally] = {}
    problems = []
    for job, there in run_jobs(_count_file, jobs, workers=workers, on_progress=lambda job, message: None):
        source = job.raw.source
        raw[source] = raw.get(source, Tally()) + there
        record = listed.pop(f"{job.corpus}/{job.raw.name}", None)
        if record is None:
            problems.append(f"{job.raw.path} is not in the set: run `moepp-data build` again to add it")
        else:
            here = _count_shards(root, record, info)
            shards[source] = shards.get(source, Tally()) + here
            if here != there:
                problems.append(f"{job.raw.path} holds {there}; its shards hold {here}")
        on_file(job.raw)
    for record in listed.values():
        shards[record.source] = shards.get(record.source, Tally()) + _count_shards(root, record, info)
        problems.append(f"the set holds {record.key}, which is not among the raw files any more")
    return Counted(raw, shards, problems)


def _count_file(job: _CountJob, report: Report) -> Tally:
    root, settings = Path(job.root), job.settings
    tokenizer = load_tokenizer(root / settings.tokenizer.file, settings.tokenizer.eos_token)
    left_out = read_dropped(root, f"{job.corpus}/{job.raw.name}")  # ascending
    documents = tokens = bad_lines = excluded = duplicates = 0
    for item in read_documents(job.raw, job.corpus, exclude=settings.pile_exclude):
        if isinstance(item, BadLine):
            bad_lines += 1
        elif isinstance(item, PassedOver):
            excluded += 1
        elif duplicates < len(left_out) and left_out[duplicates] == documents + duplicates:
            duplicates += 1
        else:
            documents += 1
            tokens += len(tokenizer.encode_batch([item.text])[0]) + 1
    return Tally(documents, tokens, bad_lines, excluded, duplicates)


def _count_shards(root: Path, record: FileRecord, info: TokenizerInfo) -> Tally:
    """Tokens and end-of-document ids that lie in a file's shards."""
    total = Tally(bad_lines=record.bad_lines, excluded=record.excluded, duplicates=record.duplicates)
    for split in SPLITS:
        if record.split(split).documents:
            tokens = Shard(shard_path(root, record.key, split)).tokens
            ends = sum(
                int(np.count_nonzero(tokens[start : start + CHUNK_BYTES] == info.eos_id))
                for start in range(0, len(tokens), CHUNK_BYTES)
            )
            total += Tally(documents=ends, tokens=len(tokens))
    return total
