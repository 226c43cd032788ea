"""Where a run was told to begin, by --resume PATH, until it has: a start with `auto` before then begins there, too.

A job that is stopped while it starts is put back into its queue, and comes again with `auto`. RUN/.resume holds

    {"resume": PATH, "latest": which writing of `latest` there was, or null}

and counts until `latest` is written: by the first save, or at once where the run goes back to one of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.atomic import write_atomically


def note_intent(run_dir: Path, resume: str) -> None:
    """Remember PATH of --resume PATH, absolute. Raises OSError."""
    record = {"resume": str(Path(resume).absolute()), "latest": _writing_of_latest(run_dir)}
    write_atomically(run_dir / ".resume", (json.dumps(record) + "\n").encode())


def intended(run_dir: Path) -> str | None:
    """Where the run was told to begin and has not yet; None if it has, or was not told."""
    try:
        record = json.loads((run_dir / ".resume").read_text(encoding="utf-8"))
        resume, writing = record["resume"], record["latest"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return resume if isinstance(resume, str) and writing == _writing_of_latest(run_dir) else None


def _writing_of_latest(run_dir: Path) -> list[int] | None:
    try:
        found = (run_dir / "checkpoints" / "latest").stat()
    except FileNotFoundError:
        return None
    return [found.st_ino, found.st_mtime_ns]
