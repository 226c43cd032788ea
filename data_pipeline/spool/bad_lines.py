"""The lines of raw files that are no documents, set aside while training goes on."""

from __future__ import annotations

from pathlib import Path

import orjson

from data_pipeline.document import BadLine
from data_pipeline.quarantine import quarantined


class BadLines:
    """The bad lines of one raw file, as JSON lines, each once however often the file is read.

    No bad lines, no file. Like the quarantine of a build, but added to: the file may be read in many turns, by one
    process after another.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[int] | None = None

    def add(self, bad: BadLine) -> None:
        """Copy a bad line that is not there yet."""
        if self._known is None:
            self._known = self._read()
        if bad.line in self._known:
            return
        self._known.add(bad.line)
        with open(self.path, "ab") as file:
            file.write(quarantined(bad))

    def _read(self) -> set[int]:
        """Line numbers that are there; an entry that a killed process left unfinished is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            file.truncate(len(whole))
        return {orjson.loads(entry)["line"] for entry in whole.split(b"\n") if entry}
