"""Files that grow while a run goes on, and outlast a disk that is full for a while.

What cannot be written waits: lines in memory, curves in the record that they are drawn from. It is written when there
is room again, in the order it came, and each file tells once that it waits.
"""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


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
    """TensorBoard's file of a run. What it misses for want of room is drawn from the run's metrics once there is some.

    Written here and now, an event for each update: SummaryWriter's thread prints a traceback for each write that a full
    disk refuses, and takes what it had with it. An event that was cut off is completed first when there is room;
    TensorBoard waits for its end.

    points: the (name, number) pairs of a metrics record.
    """

    def __init__(
        self, folder: Path, metrics: Lines, *, resumed_step: int, points: Callable[[Mapping[str, Any]], Sequence]
    ) -> None:
        self._folder, self._metrics, self._points = folder, metrics, points
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab", buffering=0)
        # What an earlier start has drawn after this update is not shown any more.
        purge = Event(step=resumed_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._waiting = _framed(Event(file_version="brain.Event:2")) + _framed(purge)
        self._drawn = resumed_step
        self._behind = self._told = False

    def add(self, record: Mapping[str, Any]) -> None:
        """Draw one update, and those before it that could not be drawn."""
        if self._behind:
            self.sync(record["step"])
            return
        try:
            self._draw(record)
        except OSError as error:
            self._wait(error)

    def _draw(self, record: Mapping[str, Any]) -> None:
        values = [Summary.Value(tag=name, simple_value=number) for name, number in self._points(record)]
        self._waiting += _framed(Event(step=record["step"], summary=Summary(value=values)))
        self._drawn = record["step"]
        self._write()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _wait(self, error: OSError) -> None:
        self._behind = True
        if not self._told:
            self._told = True
            said = f"{self._folder}: {error.strerror}; the curves are drawn when there is room on its disk"
            warnings.warn(said, stacklevel=3)

    def sync(self, step: int) -> None:
        """Have the points up to update `step` written, if the disk lets them."""
        if not self._behind or self._metrics.waiting:  # the record comes first, and what is drawn is read from it
            return
        try:
            self._write()
            if self._drawn < step:
                with self._metrics.path.open("rb") as lines:
                    for line in lines:
                        record = json.loads(line)
                        if record["step"] > self._drawn:
                            self._draw(record)
            self._behind = self._told = False
        except OSError as error:
            self._wait(error)

    def close(self, step: int) -> None:
        """Write what is left, and close."""
        self.sync(step)
        self._file.close()


def _framed(event: Event) -> bytes:
    """An event of now as TensorBoard's files have it, with its length and checksums."""
    event.wall_time = time.time()
    frame = BytesIO()
    RecordWriter(frame).write(event.SerializeToString())
    return frame.getvalue()
