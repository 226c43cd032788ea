"""Lines that are no documents: set aside with their place, the reason and their bytes, and judged.

A file may have 10 bad lines, or `max_bad_share` of its lines if that is more. This is judged every 10,000
lines and at the file's end; one bad line more stops the build. The quarantine of a file that cannot be used is kept
too; only where the build is interrupted, what an earlier one left stays.
"""

from __future__ import annotations

import base64
from pathlib import Path
from types import TracebackType

import orjson

from data_pipeline.atomic import commit, create_beside
from data_pipeline.document import BadLine, DataError

TOLERATED_BAD_LINES = 10
JUDGED_EVERY_LINES = 10_000


def too_many(bad: int, lines: int, max_bad_share: float) -> bool:
    """Whether so many of so many lines may not be bad."""
    return bad > max(TOLERATED_BAD_LINES, max_bad_share * lines)


def quarantined(bad: BadLine) -> bytes:
    """A line of a quarantine: a bad line's place, why it is bad, and its bytes in base64, as JSON."""
    entry = {
        "file": bad.file,
        "line": bad.line,
        "reason": bad.reason,
        "raw": base64.b64encode(bad.raw).decode(),
    }
    return orjson.dumps(entry) + b"\n"


class Quarantine:
    """The bad lines of one raw file, as JSON lines in the file `path`; no bad lines, no file."""

    def __init__(self, path: Path, *, raw_path: str, max_bad_share: float) -> None:
        self.path = path
        self.lines = 0
        self._raw_path, self._max_bad_share = raw_path, max_bad_share
        self._taken = 0
        self._last = ""
        self._file = create_beside(path)

    def add(self, bad: BadLine) -> None:
        """Copy a bad line."""
        self._file.write(quarantined(bad))
        self.lines += 1
        self._last = f"line {bad.line} ({bad.reason})"

    def taken(self) -> int:
        """Lines added since it was last asked."""
        new = self.lines - self._taken
        self._taken = self.lines
        return new

    def judge(self, lines: int) -> None:
        """Stop the build when of `lines` lines too many were bad."""
        if too_many(self.lines, lines, self._max_bad_share):
            raise DataError(
                f"{self._raw_path}: {self.lines:,} of {lines:,} lines are no documents, more than"
                f" {TOLERATED_BAD_LINES} and more than the allowed share of {self._max_bad_share:g}; the"
                f" last is {self._last}. They are in {self.path}; repair the file, or allow more with"
                " --max-bad-share"
            )

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            try:
                if kind is not None and not issubclass(kind, DataError):
                    return
                if self.lines:
                    commit(self._file, self.path)
                else:
                    self.path.unlink(missing_ok=True)
            finally:
                Path(self._file.name).unlink(missing_ok=True)
