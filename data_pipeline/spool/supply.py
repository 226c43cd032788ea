"""Chunks as they are asked for: waiting for one, and seeing to it that somebody makes it.

Who waits for a chunk whose source no process builds starts a builder, for this source and for those dealt to the
same one. So the first reader starts them all, and when it ends another takes over. A builder that fails is an
error of the reader that started it; the others, waiting on, start one of their own and meet the same error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orjson

import data_pipeline
from data_pipeline.document import DataError
from data_pipeline.spool.chunks import Chunk, chunk_numbers, chunk_path, open_chunk
from data_pipeline.spool.folder import Reader, is_settled, lock_source, source_folder
from data_pipeline.spool.linear import SourceState
from data_pipeline.spool.plan import ANSWER_MARK, BuilderJob, Known, SpoolPlan

POLL_SECONDS = 0.01
FIRST_WORD_SECONDS = 20.0
"""A wait is reported after so long, and again each time it has doubled."""
GONE_LOOKS = 2
"""Looks at which a chunk is missing before all that a settled builder keeps: no accident of two processes."""


class Supply:
    """The chunks of a spool for one process; asking from several threads is safe."""

    def __init__(self, plan: SpoolPlan, reader: Reader) -> None:
        self._plan, self._reader, self._root = plan, reader, Path(plan.root)
        self._identity = bytes.fromhex(plan.identity)
        self._capacity = {source.name: source.capacity for source in plan.sources}
        self._mates = {name: group for group in plan.builders() for name in group}
        self._needed: dict[str, int] = {}
        self._known: dict[str, Known] = {}
        self._open: dict[tuple[str, int], Chunk] = {}
        self._builders: list[subprocess.Popen[bytes]] = []
        self._failure = ""
        self._cause: ChildProcessError | None = None
        self._changing = threading.RLock()
        self._closed = threading.Event()
        self.epoch_tokens: dict[str, int] = {}
        """Length of an epoch of each source that has one behind it."""

    @property
    def begun(self) -> bool:
        """Whether it was said what is needed."""
        return bool(self._needed)

    def begin(self, needed: Mapping[str, int], known: Mapping[str, Known]) -> None:
        """Need the chunks of each source from these on, which can be made from the states that are known.

        Builders start now, where nobody builds, so that they run ahead also of chunks that are there.
        """
        with self._changing:
            self._stop_builders()
            self._open.clear()
            self._needed, self._known = dict(needed), dict(known)
            self._learn({name: one.state.epoch_tokens for name, one in known.items()})
            self._reader.need(self._needed)
            for source in self._needed:
                self._see_to(source)

    def need(self, needed: Mapping[str, int]) -> None:
        """Need the chunks of each source from these on; a source that is further already stays."""
        with self._changing:
            later = {name: max(number, self._needed[name]) for name, number in needed.items()}
            if later != self._needed:
                self._needed = later
                for name, number in [place for place in self._open if place[1] < later[place[0]]]:
                    del self._open[name, number]
                self._reader.need(later)

    def chunk(self, source: str, number: int) -> Chunk:
        """A chunk, waited for. Raises DataError where it cannot come."""
        chunk = self._open.get((source, number))
        return chunk if chunk is not None else self._wait(source, number)

    def tokens(self, source: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens of a source's stream from position `start` on."""
        size, filled = self._plan.chunk_tokens, 0
        while filled < len(out):
            number, offset = divmod(start + filled, size)
            piece = self.chunk(source, number).tokens[offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)

    def state_before(self, source: str, number: int) -> SourceState:
        """The state of a source's stream before a chunk; waited for where neither it nor the one before is there."""
        if number == 0:
            return SourceState()
        known = self._known.get(source)
        if known is not None and known.number == number:
            return known.state
        before = None
        if (source, number) not in self._open:
            path = chunk_path(source_folder(self._root, source), number - 1)
            before = open_chunk(path, number=number - 1, identity=self._identity)
        return self.chunk(source, number).states.before if before is None else before.states.after

    def close(self) -> None:
        """End the builders this process has started; who waits for a chunk gets an error."""
        self._closed.set()
        with self._changing:
            self._stop_builders()
            self._open.clear()
            self._reader.close()

    def _stop_builders(self) -> None:
        for process in self._builders:
            process.kill()  # what it writes is whole or not there
        for process in self._builders:
            _answer(process)
        self._builders.clear()

    def _wait(self, source: str, number: int) -> Chunk:
        path = chunk_path(source_folder(self._root, source), number)
        watch = _Watch(self._root, source, number)
        while True:
            self._check_reach(source, number)
            chunk = open_chunk(path, number=number, identity=self._identity)
            if chunk is not None:
                return self._keep(source, number, chunk)
            if self._closed.is_set():
                raise DataError(f"the spool {self._root} was closed while a row was waited for")
            with self._changing:
                self._check_builders()
                self._see_to(source)
            watch.look()
            self._closed.wait(POLL_SECONDS)

    def _check_reach(self, source: str, number: int) -> None:
        needed, capacity = self._needed[source], self._capacity[source]
        if number < needed:
            raise DataError(f"a row of source {source!r} was asked for that had been released (chunk {number})")
        if number >= needed + capacity:
            raise DataError(
                f"a row of source {source!r} lies {number - needed} chunks of {self._plan.chunk_tokens:,} tokens after"
                f" the first that is still in use, and the spool holds {capacity} of this source; raise"
                " data.raw.disk_bytes, or lower train.batch_tokens"
            )

    def _keep(self, source: str, number: int, chunk: Chunk) -> Chunk:
        with self._changing:
            self._open[source, number] = chunk
            self._learn({source: chunk.states.after.epoch_tokens})
        return chunk

    def _learn(self, epoch_tokens: Mapping[str, int | None]) -> None:
        self.epoch_tokens.update({name: tokens for name, tokens in epoch_tokens.items() if tokens is not None})

    def _check_builders(self) -> None:
        """Raise what ended a builder, now and whenever a chunk is not there from now on."""
        for process in self._builders:
            if not self._failure and process.poll() is not None:
                self._builders = [other for other in self._builders if other is not process]
                self._failure = _answer(process)
                if self._failure:
                    continue
                self._cause = ChildProcessError(process.returncode)  # not the input's fault: it may help to try again
                self._failure = (
                    f"a builder of the spool {self._root} ended with code {process.returncode} and no word, as when it"
                    " is killed or the system runs out of memory; start the run again, with --resume auto"
                )
        if self._failure:
            raise DataError(self._failure) from self._cause

    def _see_to(self, source: str) -> None:
        """Start a builder for a source and its mates, where nobody builds them."""
        locks = {}
        try:
            lock = lock_source(self._root, source)
            if lock is None or self._closed.is_set():
                return
            locks[source] = lock
            for mate in self._mates[source]:
                if mate != source and (lock := lock_source(self._root, mate)) is not None:
                    locks[mate] = lock
            job = BuilderJob(plan=self._plan, sources=list(locks), known=self._known, parent=os.getpid())
            self._builders.append(_start(job, [lock.fileno() for lock in locks.values()]))
        finally:
            for lock in locks.values():
                lock.close()


class _Watch:
    """One wait for a chunk: says how long it takes, and sees when it would be in vain."""

    def __init__(self, root: Path, source: str, number: int) -> None:
        self._root, self._source, self._number = root, source, number
        self._started = self._looked = time.monotonic()
        self._next_word = FIRST_WORD_SECONDS
        self._looks_gone = 0

    def look(self) -> None:
        """Called over and over; looks at the folder once a second. Raises DataError where the chunk is gone."""
        now = time.monotonic()
        if now < self._looked + 1:
            return
        self._looked, seconds = now, now - self._started
        settled = is_settled(self._root, self._source)
        present = chunk_numbers(source_folder(self._root, self._source))
        gone = settled and bool(present) and present[0] > self._number
        self._looks_gone = self._looks_gone + 1 if gone else 0
        if self._looks_gone >= GONE_LOOKS:
            raise DataError(
                f"chunk {self._number} of source {self._source!r} is gone from the spool {self._root}, which serves"
                " another run that is further on; give this run another folder (data.path)"
            )
        if seconds > self._next_word:
            self._next_word *= 2
            there = f"{present[0]} to {present[-1]} are there" if present else "none is there yet"
            print(
                f"waiting for raw text to be encoded: chunk {self._number} of {self._source} for {seconds:.0f} s"
                f" ({there}; {self._root})",
                file=sys.stderr,
                flush=True,
            )


def _start(job: BuilderJob, locks: list[int]) -> subprocess.Popen[bytes]:
    """Start a builder process, which inherits `locks`."""
    home = str(Path(data_pipeline.__file__).parent.parent)
    path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH")) if part)
    process = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.spool.builder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=locks,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdin is not None
    try:
        with process.stdin:
            process.stdin.write(orjson.dumps(job, default=lambda model: model.model_dump()))
    except BrokenPipeError:
        pass  # it ended at once, which is found out when a chunk is waited for
    return process


def _answer(process: subprocess.Popen[bytes]) -> str:
    """What a builder that has ended, or is ending, has said; empty if nothing."""
    assert process.stdout is not None
    with process.stdout:
        _, mark, said = process.stdout.read().rpartition(ANSWER_MARK)
    process.wait()
    return orjson.loads(said) if mark else ""
