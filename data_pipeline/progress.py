"""Progress for people: a bar on a terminal, one plain line now and then anywhere else (logs, batch jobs)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from data_pipeline.build import Watcher
from data_pipeline.describe import amount
from data_pipeline.document import counted
from data_pipeline.file_build import Advance
from data_pipeline.file_job import FileJob
from data_pipeline.manifest import FileRecord

PLAIN_EVERY_SECONDS = 10.0
_FIRST_RATIO = 2.5
"""Text bytes per raw byte before any file is done: compressed JSON lines hold about that."""


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.description}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


class BuildProgress(Watcher):
    """Shows a build: files done, text, tokens, speed, bad lines, and the time left. Use as a context manager.

    A raw file's size is known and how much text is in it is not, so the bar counts raw bytes: files that are
    done in full, files under way by their text and the ratio of text to raw bytes seen so far.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = _bar(console)
        self._task = self._bar.add_task("", total=None)
        self._started = self._printed = time.monotonic()
        self._files = self._done_files = self._total = self._raw_bytes = self._done_text = 0
        self._under_way: dict[str, tuple[int, int]] = {}
        self._text = self._tokens = self._bad_lines = 0

    def __enter__(self) -> BuildProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, jobs: list[FileJob], kept: int) -> None:
        """See `Watcher`."""
        self._files = len(jobs)
        self._total = sum(job.size for job in jobs)
        self._bar.update(self._task, total=self._total)
        kept_too = f"; {kept:,} already built" if kept else ""
        self._console.print(f"building {counted(len(jobs), 'file')}, {amount(self._total)}B{kept_too}", highlight=False)

    def advance(self, job: FileJob, done: Advance) -> None:
        """See `Watcher`."""
        _, text = self._under_way.get(job.key, (0, 0))
        self._under_way[job.key] = (job.size, text + done.text_bytes)
        self._text += done.text_bytes
        self._tokens += done.tokens
        self._bad_lines += done.bad_lines
        self._show()

    def end_file(self, job: FileJob, record: FileRecord) -> None:
        """See `Watcher`."""
        self._done_text += self._under_way.pop(job.key, (0, 0))[1]
        self._raw_bytes += job.size
        self._done_files += 1
        self._show()

    def step(self, what: str, done: int, of: int) -> None:
        """See `Watcher`."""
        self._update(f"{what}: {done:,}/{of:,}", completed=done, total=of)

    def say(self, text: str) -> None:
        """See `Watcher`."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        ratio = self._done_text / self._raw_bytes if self._done_text else _FIRST_RATIO
        under_way = sum(min(size, text / ratio) for size, text in self._under_way.values())
        completed = self._raw_bytes + under_way
        seconds = max(time.monotonic() - self._started, 1e-9)
        left = timedelta(seconds=round(seconds * (self._total - completed) / max(completed, 1)))
        line = (
            f"{self._done_files:,}/{self._files:,} files  {amount(self._text)}B text"
            f" ({self._text / seconds / 1e6:.1f} MB/s)  {amount(self._tokens)} tokens"
            f" ({amount(self._tokens / seconds)}/s)  {self._bad_lines:,} bad lines  {left} left"
        )
        self._update(line, completed=completed)

    def _update(self, line: str, *, completed: float, total: float | None = None) -> None:
        self._bar.update(self._task, completed=completed, total=total, description=line)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed > PLAIN_EVERY_SECONDS:
            self._printed = now
            self._console.print(line, highlight=False)


@contextmanager
def simple_bar(console: Console, what: str) -> Iterator[Callable[[int], None]]:
    """A bar without an end: yields a function that adds to the amount shown. Nothing on a non-terminal."""
    with _bar(console) as bar:
        task = bar.add_task(what, total=None)
        seen = 0

        def add(size: int) -> None:
            nonlocal seen
            seen += size
            bar.update(task, description=f"{what} {amount(seen)}")

        yield add
