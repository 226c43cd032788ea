"""Lines for whoever watches a run. The run does not depend on them: what must not be lost is in its folder."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def print_line(line: str, *, error: bool = False) -> None:
    """Print a line at once. Where nobody reads any more (`| tee` that is gone), or the disk is full, it is lost."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        _silence(stream)
    except OSError:  # a full disk may have room for a later line
        pass


def flush_output() -> None:
    """Before a process ends: what cannot be printed any more must not change its exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _silence(stream)


def _silence(stream: TextIO) -> None:
    """Have nothing read what is printed from now on, and what is still waiting to be."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
