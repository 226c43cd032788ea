"""Files that grow while a run goes on, and outlast a disk that is full for a while.

What cannot be written waits: lines in memory, curves in the record that they are drawn from. It is written when there
is room again, in the order it came, and each file tells once that it waits.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Lines:
    """A text file that lines are appended to; each survives the death of this process once `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._told = False

    @property
    def waiting(self) -> bool:
        """Whether lines are in memory alone."""
        return bool(self._waiting)

    def append(self, line: str) -> None:
        """Add a line, or have it wait with a warning where the system refuses it."""
        self._waiting += line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._told:
                self._told = True
                warnings.warn(f"{self.path}: {error.strerror}; lines wait in memory for room on its disk", stacklevel=2)

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
        self._told = False

    def sync(self) -> None:
        """Have every line on the disk; raises OSError where that cannot be."""
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        """Write what waits, and close."""
        try:
            self._write()
        finally:
            self._file.close()


class Curves:
    """TensorBoard's files of a run, drawn anew from its metrics where writing them has failed.

    points: the (name, number) pairs of a metrics record.
    """

    def __init__(
        self, folder: Path, metrics: Lines, *, resumed_step: int, points: Callable[[Mapping[str, Any]], Sequence]
    ) -> None:
        self._folder, self._metrics, self._points = folder, metrics, points
        self._sure = resumed_step  # the last update whose points are known to be written
        self._writer: SummaryWriter | None = None
        self._open()

    def _open(self) -> None:
        self._writer = SummaryWriter(str(self._folder), purge_step=self._sure + 1, flush_secs=10)

    def add(self, record: Mapping[str, Any]) -> None:
        """Draw one update, and those before it that could not be drawn."""
        try:
            if self._writer is None:
                self._draw_again()
            else:
                self._draw(record)
        except OSError as error:
            self._give_up(error)

    def _draw(self, record: Mapping[str, Any]) -> None:
        assert self._writer is not None
        for name, number in self._points(record):
            self._writer.add_scalar(name, number, record["step"])

    def _draw_again(self) -> None:
        if self._metrics.waiting:
            return  # the disk is as full as it was
        self._open()
        with self._metrics.path.open("rb") as lines:
            for line in lines:
                record = json.loads(line)
                if record["step"] > self._sure:
                    self._draw(record)

    def _give_up(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        warnings.warn(f"{self._folder}: {error}; the curves are drawn when there is room on its disk", stacklevel=3)
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def sync(self, step: int) -> None:
        """Have the points up to update `step` written, if the disk lets them."""
        try:
            if self._writer is None:
                self._draw_again()
            if self._writer is not None:
                self._writer.flush()
                self._sure = step
        except OSError as error:
            self._give_up(error)

    def close(self, step: int) -> None:
        """Write what is left, and close."""
        self.sync(step)
        if self._writer is not None:
            self._writer.close()
