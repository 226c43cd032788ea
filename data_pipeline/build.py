"""Raw files -> shards: the offline preparation, restartable at every file.

    1. Lock the set; fix or compare its settings (tokenizer, held-out share, part length, ...).
    2. List the raw files of each corpus. A file whose record and shards are in place is kept as it is.
    3. Every other file by itself, in this process or in several, the largest first: read, set bad lines aside,
       split off held-out documents, encode about a megabyte at a time, append to two shards, write the file's
       record last.
    4. When all files are done: take duplicates out, if that was asked for; judge each corpus's bad lines as a
       whole (many small files may each have a few); write the manifest.

Steps 1 to 3 may be dealt out to independent tasks, each with a share of the files and perhaps on a machine of
its own; `finish_set` then does step 4.

A shard depends on its raw file and the settings alone (and on the other files' texts with deduplication), and
every output is renamed into place when complete, so a build that was killed at any moment, started again, ends
with the same bytes as one that was not.

What happens to one file is in `file_build`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.dedup import deduplicate
from data_pipeline.document import DataError, RawFile, counted
from data_pipeline.file_build import Advance, build_file
from data_pipeline.file_job import FileJob, read_done
from data_pipeline.held_out import HeldOutRule
from data_pipeline.manifest import (
    DEFAULT_SPLIT_BYTES,
    MANIFEST,
    FileRecord,
    Manifest,
    Settings,
    read_manifest,
    write_manifest,
)
from data_pipeline.quarantine import TOLERATED_BAD_LINES, too_many
from data_pipeline.readers import checked_sets, corpus_around, raw_files
from data_pipeline.set_locks import number_of_tasks, one_task, settling, whole_set
from data_pipeline.set_settings import read_settings, settle, tokenizer_info
from data_pipeline.shards import DEFAULT_PART_TOKENS
from data_pipeline.space import SpaceEstimate
from data_pipeline.tasks import Task, fingerprint, longest_first, shares
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.workers import run_jobs

Corpora = Mapping[str, str | Path]
"""{corpus name: where its files are}."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """How a build ended."""

    manifest: Manifest
    """Of the whole set; of a task, only what it built and kept, which is not written."""
    built: int
    """Files built now."""
    kept: int
    """Files that an earlier build had finished."""

    @property
    def without_held_out(self) -> list[str]:
        """Labels with text to train on and none held out, whose validation loss will not be known."""
        files = self.manifest.files
        held_out = {file.source for file in files if file.held_out.documents}
        return sorted({file.source for file in files if file.train.documents} - held_out)


class Watcher:
    """Is told how a build goes; this one says nothing, `progress.BuildProgress` draws it."""

    def begin(self, jobs: list[FileJob], kept: int) -> None:
        """Called once: the files to build, and the number of those already built."""

    def advance(self, job: FileJob, done: Advance) -> None:
        """Called about once per megabyte of text."""

    def end_file(self, job: FileJob, record: FileRecord) -> None:
        """Called when a file is complete."""

    def step(self, what: str, done: int, of: int) -> None:
        """Called while duplicates are taken out: how much of what is done."""

    def say(self, text: str) -> None:
        """Called with a sentence that people should read."""


def build_set(
    root: Path,
    *,
    tokenizer_file: Path,
    corpora: Corpora,
    held_out: float = 0.005,
    workers: int = 1,
    max_bad_share: float = 0.001,
    eos: str | None = None,
    part_tokens: int = DEFAULT_PART_TOKENS,
    split_bytes: int = DEFAULT_SPLIT_BYTES,
    pile_exclude: Sequence[str] = (),
    dedup: bool = False,
    task: Task | None = None,
    watcher: Watcher | None = None,
) -> BuildReport:
    """Build the shard set at `root` from corpora, or the share of it that is one task's.

    Corpora built into `root` before and not named now stay in the set; with `dedup` all have to be named.
    Raises DataError for input that cannot be used, for a folder that another build is writing to, and for
    settings other than the folder's.
    """
    watcher = watcher or Watcher()
    _check_arguments(corpora, max_bad_share, workers=workers, part_tokens=part_tokens, split_bytes=split_bytes)
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(root)):  # `Path` has made one slash of two
        raise DataError(f"{root} is a URL, and shards are read through memory maps; build into a local folder")
    HeldOutRule(held_out)
    raw = raw_files(corpora, split_bytes=split_bytes)
    _refuse_nested(root, corpora)
    loaded = load_tokenizer(tokenizer_file, eos)
    if loaded.plain_because:
        watcher.say(f"no word cache for this tokenizer, so a slower build: {'; '.join(loaded.plain_because)}")
    settings = Settings(
        tokenizer=tokenizer_info(loaded, f"tokenizer/{tokenizer_file.name}"),
        held_out=held_out,
        part_tokens=part_tokens,
        split_bytes=split_bytes,
        pile_exclude=checked_sets(pile_exclude),
        dedup=dedup,
    )
    root.mkdir(parents=True, exist_ok=True)
    if task is None:
        with whole_set(root) as lock:
            settings = settle(root, settings, tokenizer_file)
            jobs = _jobs(root, raw, settings, max_bad_share, lock)
            build = _Build(root, settings, jobs, corpora, workers, watcher)
            with build.space.watched():
                build.build_files()
                return build.complete()
    plan = fingerprint((f"{corpus}/{file.name}", file.size) for corpus, file in raw)
    with one_task(root, task, plan) as lock:
        with settling(root):
            settings = settle(root, settings, tokenizer_file)
        jobs = shares(_jobs(root, raw, settings, max_bad_share, lock), task.of)[task.number - 1]
        build = _Build(root, settings, jobs, corpora, workers, watcher)
        with build.space.watched():
            build.build_files()
        return build.report()


def finish_set(
    root: Path,
    *,
    corpora: Corpora,
    workers: int = 1,
    max_bad_share: float = 0.001,
    watcher: Watcher | None = None,
) -> BuildReport:
    """Make a whole set of what tasks have built of `corpora` at `root`.

    Raises DataError naming the files that are not built, and the tasks whose they are.
    """
    watcher = watcher or Watcher()
    _check_arguments(corpora, max_bad_share, workers=workers)
    settings = read_settings(root)
    raw = raw_files(corpora, split_bytes=settings.split_bytes)
    with whole_set(root) as lock:
        jobs = _jobs(root, raw, settings, max_bad_share, lock)
        build = _Build(root, settings, jobs, corpora, workers, watcher)
        build.refuse_unbuilt()
        with build.space.watched():
            return build.complete()


class _Build:
    """A build under way, of all files of some corpora or of a task's share of them; the set is locked."""

    def __init__(
        self, root: Path, settings: Settings, jobs: Sequence[FileJob], corpora: Corpora, workers: int, watcher: Watcher
    ) -> None:
        self._root, self._settings, self._jobs = root, settings, jobs
        self._workers, self._watcher = workers, watcher
        before = read_manifest(root).files if (root / MANIFEST).exists() else ()
        self._others = self._other_corpora([file for file in before if file.corpus not in corpora])
        listed = {job.key for job in jobs}
        self._vanished = [file for file in before if file.corpus in corpora and file.key not in listed]
        self._records = {job.key: done.file for job in jobs if (done := read_done(job))}
        self._kept = len(self._records)
        self.space = SpaceEstimate(root, settings, jobs)
        for job in jobs:
            if job.key in self._records:
                self.space.built(job, self._records[job.key])

    def build_files(self) -> None:
        """Build what is not built yet."""
        todo = longest_first(job for job in self._jobs if job.key not in self._records)
        self._watcher.begin(todo, self._kept)
        if todo:
            self._watcher.say(self.space.foreseen())
        for job, record in run_jobs(build_file, todo, workers=self._workers, on_progress=self._watcher.advance):
            self._records[job.key] = record
            self.space.built(job, record)
            self._watcher.end_file(job, record)

    def refuse_unbuilt(self) -> None:
        """Raise DataError when a file is not built, with the tasks that have to run again."""
        todo = {job.key for job in self._jobs if job.key not in self._records}
        if not todo:
            return
        tasks = number_of_tasks(self._root)
        dealt = enumerate(shares(self._jobs, tasks), start=1) if tasks else ()
        lacking = [f"{number}/{tasks}" for number, share in dealt if todo & {job.key for job in share}]
        again = f"run --task {', '.join(lacking)} again" if lacking else "run `moepp-data build` again"
        raise DataError(
            f"{len(todo):,} of {len(self._jobs):,} files are not built, such as {min(todo)}: {again}, and then finish"
        )

    def complete(self) -> BuildReport:
        """With all files built: take out duplicates, judge the corpora, write the manifest."""
        if self._settings.dedup:
            self._deduplicate()
        for corpus in sorted({job.corpus for job in self._jobs}):
            self._judge(corpus)
        self._name_left_out()
        report = self.report(self._others)
        write_manifest(self._root, report.manifest)
        return report

    def report(self, others: Sequence[FileRecord] = ()) -> BuildReport:
        """How it went, with the files built and kept, and `others`."""
        files = sorted([*others, *self._records.values()], key=lambda file: file.key)
        return BuildReport(Manifest(settings=self._settings, files=files), len(self._records) - self._kept, self._kept)

    def _other_corpora(self, others: list[FileRecord]) -> list[FileRecord]:
        """Files of earlier builds whose corpus is not part of this one; with deduplication there may be none."""
        if others and self._settings.dedup:
            missing = ", ".join(f"--{corpus}" for corpus in sorted({file.corpus for file in others}))
            raise DataError(
                f"{self._root} is deduplicated, and the first of equal texts is looked for in all its corpora together;"
                f" name {missing} too"
            )
        return others

    def _name_left_out(self) -> None:
        """Say what was built here and will not be in the set: files that are gone, corpora that were not named."""
        if self._vanished:
            tokens = sum(file.train.tokens + file.held_out.tokens for file in self._vanished)
            self._watcher.say(
                f"warning: gone from the raw files, and so from the set: {counted(len(self._vanished), 'file')} with"
                f" {counted(tokens, 'token')}, such as {self._vanished[0].key}; restore what is gone and build again"
                " to keep it"
            )
        listed = {record.corpus for record in (*self._records.values(), *self._others)}
        for corpus in sorted({path.name for path in (self._root / "records").iterdir()} - listed):
            self._watcher.say(
                f"warning: what was built of {corpus} is not in the set; to have it there, name --{corpus} too"
            )

    def _deduplicate(self) -> None:
        documents = sum(file.documents for file in self._records.values())
        self._watcher.say(f"looking for equal texts among {counted(documents, 'document')}")
        watcher = self._watcher
        for job, record in deduplicate(
            self._root, self._jobs, workers=self._workers, on_step=watcher.step, on_rebuild=watcher.advance
        ):
            self._records[job.key] = record

    def _judge(self, corpus: str) -> None:
        """Stop where a corpus as a whole has too many bad lines."""
        files = [record for record in self._records.values() if record.corpus == corpus]
        bad = sum(file.bad_lines for file in files)
        lines = bad + sum(file.documents + file.excluded for file in files)
        if too_many(bad, lines, max_bad_share := self._jobs[0].max_bad_share):
            raise DataError(
                f"{corpus}: {bad:,} of {lines:,} lines are no documents, more than {TOLERATED_BAD_LINES} and more than"
                f" the allowed share of {max_bad_share:g}. They are in {self._root / 'quarantine' / corpus}; repair the"
                " files, or allow more with --max-bad-share (what is built is kept)"
            )


def _refuse_nested(root: Path, corpora: Corpora) -> None:
    """Refuse a set inside a corpus's folder: its quarantine would be read as raw data by the next build."""
    around = corpus_around(root, corpora)
    if around:
        name, folder = around
        raise DataError(
            f"{root} lies in the folder of --{name}, {folder}, so what is written there would be read as raw"
            " data; build into a folder outside the corpora"
        )


def _jobs(
    root: Path, raw: Sequence[tuple[str, RawFile]], settings: Settings, max_bad_share: float, lock: str
) -> list[FileJob]:
    return [FileJob(str(root), corpus, file, settings, max_bad_share, lock) for corpus, file in raw]


def _check_arguments(corpora: Corpora, max_bad_share: float, **counts: int) -> None:
    if not corpora:
        raise DataError("nothing to build: name at least one corpus (--redpajama, --dolma or --pile)")
    for name, number in counts.items():
        if number < 1:
            raise DataError(f"{name} is {number}; it must be at least 1")
    if not 0 <= max_bad_share <= 1:
        raise DataError(f"max_bad_share is {max_bad_share}; it is a share of a file's lines, in [0, 1]")
