"""The files by which hosts agree on one attempt, in the shared run folder. `roll` has the rules.

RUN/.hosts/
    NAME.lock                 held by the one supervisor of host NAME, which is named in it
    attempt-0003/             one start of all ranks, numbered
        beat-NAME             {"port": p, "resume": word}: NAME's supervisor is here, and what it would have the ranks
                              resume; while it lives it counts on in the file's time
        hosts                 the list of those that take part, as a hostfile; closes the attempt to others
        end-NAME              {"code": c, "words": text, "restart": bool}: on NAME the attempt is over, and why

A beat is a count set as a file's time of change, which needs no room on a full disk and no clock. Other files appear
whole. None is synced: they matter to those who live, not after a power cut.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moepp_ds.supervisor.hosts import Host, read_hostfile


@dataclass(frozen=True)
class End:
    """That an attempt is over on a host."""

    host: str
    code: int
    words: str
    restart: bool


class Attempt:
    """One numbered attempt of a run."""

    def __init__(self, folder: Path, number: int) -> None:
        """`folder` is RUN/.hosts."""
        self.number = number
        self._folder = folder / f"attempt-{number:04d}"

    @property
    def list_file(self) -> Path:
        """The list of those that take part, a hostfile."""
        return self._folder / "hosts"

    def arrive(self, name: str, *, port: int, resume: str) -> None:
        """Make the attempt if there is none, and say that a host is here, which port is free, and what to resume."""
        self._folder.mkdir(exist_ok=True)
        _put(self._folder / f"beat-{name}", {"port": port, "resume": resume})

    def arrival(self, name: str) -> tuple[int, str] | None:
        """The port that a host offered, and what it would resume; None while that cannot be seen."""
        note = read_record(self._folder / f"beat-{name}")
        return (int(str(note["port"])), str(note.get("resume", "auto"))) if note else None

    def write_beat(self, name: str, count: int) -> None:
        """Give a sign of life of a host that has arrived. Raises OSError."""
        os.utime(self._folder / f"beat-{name}", (count, count))

    def beat(self, name: str) -> int:
        """The count of a host's last beat; -1 where there has been none."""
        try:
            # opened, since a file system on a network looks anew then, and may not for a mere stat
            with (self._folder / f"beat-{name}").open("rb") as file:
                return int(os.fstat(file.fileno()).st_mtime)
        except OSError:
            return -1

    def close(self, hosts: Sequence[Host], *, by: str) -> None:
        """Make the list appear whole, unless another host was first: linking succeeds for one only."""
        draft = self._folder / f".hosts-{by}"
        draft.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), encoding="utf-8")
        with suppress(FileExistsError):
            os.link(draft, self.list_file)
        draft.unlink()

    def listed(self) -> list[Host] | None:
        """Those that take part; None while the list is open. Raises OSError."""
        return read_hostfile(self.list_file) if self.list_file.exists() else None

    def write_end(self, end: End) -> None:
        """Say that the attempt is over on a host. On a full disk the others find out by that host's silence."""
        with suppress(OSError):
            note = {"code": end.code, "words": end.words, "restart": end.restart}
            _put(self._folder / f"end-{end.host}", note)

    def ends(self) -> list[End]:
        """Where the attempt is over, by the hosts' names."""
        notes = [(path.name.removeprefix("end-"), read_record(path)) for path in sorted(self._folder.glob("end-*"))]
        return [
            End(name, int(str(note["code"])), str(note["words"]), restart=note["restart"] is True)
            for name, note in notes
            if note
        ]


def newest_attempt(folder: Path) -> Attempt | None:
    """The attempt with the highest number; None if there has been none."""
    attempts = attempts_since(folder, 0)
    return attempts[-1] if attempts else None


def attempts_since(folder: Path, number: int) -> list[Attempt]:
    """The attempts from a number on, in order."""
    names = (re.fullmatch(r"attempt-(\d+)", path.name) for path in folder.glob("attempt-*"))
    numbers = sorted(int(name[1]) for name in names if name)
    return [Attempt(folder, one) for one in numbers if one >= number]


def _put(path: Path, record: Mapping[str, object]) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(json.dumps(record) + "\n", encoding="utf-8")
    draft.replace(path)


def read_record(path: Path) -> dict[str, object] | None:
    """The JSON object in a file that another process writes; None where there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
