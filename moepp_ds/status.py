"""status.json of a run folder: how the run stands, for a supervisor, for `--resume auto`, and for people.

{"state": "running|completed|stopped|failed", "step": n, "message": text, "checkpoint": folder, "time": when,
"host": name, "pid": n}, and "restart": false where another start would fail in the same way, true where a run that
stopped was not asked to. The checkpoint is the one that the run stands on, null while it has none: its newest, or until
it saves, the one that it went on from, of this run or another.
Rank 0 writes it. If that one can no longer, the supervisor of its host says how the run ended.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Literal

from data_pipeline.atomic import write_atomically

State = Literal["running", "completed", "stopped", "failed"]


def write_status(
    run_dir: Path,
    state: State,
    *,
    step: int,
    message: str = "",
    checkpoint: str | None = None,
    restart: bool | None = None,
) -> None:
    """Replace status.json: the old one or the new one is there at any time. Raises OSError.

    restart: whether a supervisor is to start the run again, where the state alone does not say.
    """
    status = {"state": state, "step": step, "message": message, "checkpoint": checkpoint}
    status |= {} if restart is None else {"restart": restart}
    status |= {"time": time_now(), "host": socket.gethostname(), "pid": os.getpid()}
    write_atomically(run_dir / "status.json", (json.dumps(status) + "\n").encode())


def time_now() -> str:
    """The time to print and to log, with its zone; nothing is decided by it."""
    return f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}"
