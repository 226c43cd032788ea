"""Raw files -> shards: the offline preparation, restartable at every file.

    1. Lock the folder; fix or check the set's settings (tokenizer, held-out share, part length).
    2. List the raw files of each corpus. A file whose record and shards are in place is kept as it is.
    3. Every other file by itself, in this process or in several: read, set bad lines aside, split off
       held-out documents, encode about a megabyte at a time, append to two shards, write the file's record
       last.
    4. When all files are done, judge each corpus's bad lines as a whole (many small files may each have a few)
       and write the manifest.

A shard depends on its raw file and the settings alone, and every output is renamed into place when complete,
so a build that was killed at any moment, started again, ends with the same bytes as one that was not.

What happens to one file is in `file_build`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from pydantic import TypeAdapter, ValidationError

from data_pipeline.atomic import clear_unfinished, write_atomically
from data_pipeline.document import DataError
from data_pipeline.file_build import TOLERATED_BAD_LINES, Advance, FileJob, build_file, finished_record
from data_pipeline.held_out import HeldOutRule
from data_pipeline.manifest import (
    MANIFEST,
    SPLITS,
    FileRecord,
    Manifest,
    Settings,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from data_pipeline.readers import reader_for
from data_pipeline.shards import DEFAULT_PART_TOKENS
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.workers import run_jobs


@dataclass(frozen=True, slots=True)
class BuildReport:
    """How a build ended."""

    manifest: Manifest
    built: int
    """Files built now."""
    kept: int
    """Files that an earlier build had finished."""


class Watcher:
    """Is told how a build goes; this one says nothing, `progress.BuildProgress` draws it."""

    def begin(self, jobs: list[FileJob], kept: int) -> None:
        """Called once: the files to build, and the number of those already built."""

    def advance(self, job: FileJob, done: Advance) -> None:
        """Called about once per megabyte of text."""

    def end_file(self, job: FileJob, record: FileRecord) -> None:
        """Called when a file is complete."""


def build_set(
    root: Path,
    *,
    tokenizer_file: Path,
    corpora: Mapping[str, Path],
    held_out: float = 0.005,
    workers: int = 1,
    max_bad_share: float = 0.001,
    eos: str | None = None,
    part_tokens: int = DEFAULT_PART_TOKENS,
    watcher: Watcher | None = None,
) -> BuildReport:
    """Build the shard set at `root` from corpora given as {corpus name: folder}.

    Corpora built into `root` before and not named now stay in the set. Raises DataError for input that cannot
    be used, for a folder that another build is writing to, and for settings other than the folder's.
    """
    watcher = watcher or Watcher()
    _check_arguments(corpora, held_out, workers, max_bad_share, part_tokens)
    _refuse_nested(root, corpora)
    raw = [(name, file) for name, path in corpora.items() for file in reader_for(name).find_files(path)]
    tokenizer = load_tokenizer(tokenizer_file, eos)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root), _space_watched(root):
        clear_unfinished(root)
        settings = _settle(root, tokenizer, tokenizer_file, held_out, part_tokens)
        jobs = [
            FileJob(str(root), name, file, os.path.getsize(file.path), settings, max_bad_share)
            for name, file in raw
        ]
        records = {job.key: record for job in jobs if (record := finished_record(job))}
        todo = [job for job in jobs if job.key not in records]
        watcher.begin(todo, len(records))
        kept = len(records)
        for job, record in run_jobs(build_file, todo, workers=workers, on_progress=watcher.advance):
            records[job.key] = record
            watcher.end_file(job, record)
        for name in corpora:
            _judge_corpus(root, name, [record for record in records.values() if record.corpus == name], max_bad_share)
        files = [*_other_corpora(root, corpora), *records.values()]
        manifest = Manifest(settings=settings, files=sorted(files, key=lambda file: file.key))
        write_manifest(root, manifest)
    return BuildReport(manifest=manifest, built=len(todo), kept=kept)


def _check_arguments(
    corpora: Mapping[str, Path], held_out: float, workers: int, max_bad_share: float, part_tokens: int
) -> None:
    if not corpora:
        raise DataError("nothing to build: name at least one corpus folder (--redpajama, --dolma or --pile)")
    if workers < 1 or part_tokens < 1 or not 0 <= max_bad_share <= 1:
        raise DataError(
            f"workers {workers} and part_tokens {part_tokens} must be at least 1, max_bad_share"
            f" {max_bad_share} in [0, 1]"
        )
    HeldOutRule(held_out)


def _refuse_nested(root: Path, corpora: Mapping[str, Path]) -> None:
    """Refuse a set inside a corpus: its quarantine would be read as raw data by the next build."""
    out = Path(os.path.realpath(root))
    for name, path in corpora.items():
        folder = Path(os.path.realpath(path))
        if folder in (out, *out.parents):
            raise DataError(
                f"{root} lies in the folder of --{name}, {path}, so what is written there would be read as raw"
                " data; build into a folder outside the corpora"
            )


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the folder's lock. The kernel owns it, so it ends with the process, even a killed one."""
    with open(root / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another build is writing to {root}; wait for it to end, or build into another folder"
            ) from None
        yield


@contextmanager
def _space_watched(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"no space is left for {root}; finished files are kept: make room and run the same command again"
        ) from error


def _settle(
    root: Path, tokenizer: Tokenizer, tokenizer_file: Path, held_out: float, part_tokens: int
) -> Settings:
    """Fix the set's settings at the first build, check them at later ones; put the tokenizer beside the
    shards."""
    settings = Settings(
        tokenizer=TokenizerInfo(
            file=f"tokenizer/{tokenizer_file.name}",
            kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            eos_token=tokenizer.eos_token,
            eos_id=tokenizer.eos_id,
            fingerprint=tokenizer.fingerprint,
        ),
        held_out=held_out,
        part_tokens=part_tokens,
    )
    path = root / "settings.json"
    if path.exists():
        before = _read_settings(path)
        settings = replace(settings, tokenizer=replace(settings.tokenizer, file=before.tokenizer.file))
        if before != settings:
            raise DataError(
                f"{root} was begun with other settings: {_differences(before, settings)}; build into another"
                " folder, or delete this one"
            )
    else:
        write_atomically(path, orjson.dumps(settings, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomically(root / settings.tokenizer.file, tokenizer_file.read_bytes())
    return settings


def _differences(before: Settings, now: Settings) -> str:
    pairs = [
        ("tokenizer", before.tokenizer.fingerprint[:12], now.tokenizer.fingerprint[:12]),
        ("held-out share", before.held_out, now.held_out),
        ("part length", before.part_tokens, now.part_tokens),
    ]
    return ", ".join(f"{name} {old} then and {new} now" for name, old, new in pairs if old != new)


def _read_settings(path: Path) -> Settings:
    try:
        return TypeAdapter(Settings).validate_json(path.read_bytes())
    except ValidationError:
        raise DataError(f"{path} is damaged; build into another folder, or delete this one") from None


def _judge_corpus(root: Path, corpus: str, files: Sequence[FileRecord], max_bad_share: float) -> None:
    """Stop where a corpus as a whole has too many bad lines, by the rule that `file_build` has for one file."""
    bad = sum(file.bad_lines for file in files)
    lines = bad + sum(file.split(split).documents for file in files for split in SPLITS)
    if bad > max(TOLERATED_BAD_LINES, max_bad_share * lines):
        raise DataError(
            f"{corpus}: {bad:,} of {lines:,} lines are no documents, more than {TOLERATED_BAD_LINES} and more than"
            f" the allowed share of {max_bad_share:g}. They are in {root / 'quarantine' / corpus}; repair the files,"
            " or allow more with --max-bad-share (what is built is kept)"
        )


def _other_corpora(root: Path, corpora: Mapping[str, Path]) -> list[FileRecord]:
    """Files of earlier builds whose corpus is not part of this one."""
    if not (root / MANIFEST).exists():
        return []
    return [file for file in read_manifest(root).files if file.corpus not in corpora]
