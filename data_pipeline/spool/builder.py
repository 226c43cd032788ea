"""A builder: the process that makes the chunks of some sources, ahead of those who read them.

    1. It is started by a reader with a plan, and holds the locks of its sources from before its start to its end.
    2. Each source begins where its chunks on disk end, if they hold what is needed, and otherwise at the last
       known state before that: of a chunk on disk, of the checkpoint, or the beginning.
    3. Of the sources that have room the one whose next chunk is wanted soonest gets it. A full one waits until no
       reader needs any longer what it began with, which is then deleted.
    4. It ends when the process that started it is gone, and with a message when something is wrong.

Whenever it is killed, what is on disk is whole chunks, and another builder goes on from there.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator
from pathlib import Path

import numpy as np
import orjson
from pydantic import TypeAdapter

from data_pipeline.atomic import clear_unfinished
from data_pipeline.document import DataError
from data_pipeline.spool.chunks import States, chunk_numbers, chunk_path, open_chunk, read_states, write_chunk
from data_pipeline.spool.documents import Encoding, training_documents
from data_pipeline.spool.folder import needed_by_readers, say_settled, source_folder
from data_pipeline.spool.linear import FilePlace, LinearStream, SourceState, Taken, Totals
from data_pipeline.spool.plan import ANSWER_MARK, BuilderJob, Known, SourcePlan, SpoolPlan

IDLE_SECONDS = 0.1
PARENT_WATCHED_SECONDS = 0.2
OTHER_FILES = 64
"""Descriptors that a builder needs beside those of its raw files."""


class SourceBuilder:
    """Makes the chunks of one source and deletes those that nobody needs any more.

    On disk are the chunks from `first` to the one before `next`.
    """

    def __init__(
        self, plan: SpoolPlan, source: SourcePlan, encoding: Encoding, *, needed: int, known: Known | None
    ) -> None:
        self.source, self._plan, self._encoding = source, plan, encoding
        self._folder = source_folder(Path(plan.root), source.name)
        self._identity = bytes.fromhex(plan.identity)
        self._checked: set[int] = set()
        clear_unfinished(self._folder)
        self.needed = needed
        """The first chunk that a reader still needs, as far as is known."""
        self.first, self.next, state = self._resume(known)
        self._stream = LinearStream(
            source.name,
            names=[file.key for file in source.files],
            open_file=self._open_file,
            seed=plan.seed,
            interleave=plan.interleave,
            part_tokens=plan.raw.part_tokens,
            end_epoch=self._judge_epoch,
            state=state,
        )

    def _resume(self, known: Known | None) -> tuple[int, int, SourceState]:
        """(first chunk kept, next to make, state before that); chunks that do not lead up to it are deleted."""
        present, states = set(), {0: SourceState()}
        if known is not None:
            states[known.number] = known.state
        for number in chunk_numbers(self._folder):
            found = read_states(chunk_path(self._folder, number), identity=self._identity)
            if found is not None:
                present.add(number)
                states[number], states[number + 1] = found.before, found.after
        begin = following = max(number for number in states if number <= self.needed)
        while following in present:
            following += 1
        first = begin - 1 if begin == following and begin - 1 in present else begin
        for number in chunk_numbers(self._folder):
            if not first <= number < following:
                chunk_path(self._folder, number).unlink()
        if following - 1 in present:
            last = open_chunk(chunk_path(self._folder, following - 1), number=following - 1, identity=self._identity)
            assert last is not None
            return first, following, last.states.after
        return first, following, states[following]

    def _open_file(self, number: int, place: FilePlace) -> Generator[Taken, None, None]:
        check = number not in self._checked
        self._checked.add(number)
        return training_documents(self.source.files[number], place, self._encoding, check=check)

    def _judge_epoch(self, totals: Totals) -> None:
        name, seq_len = self.source.name, self._plan.seq_len
        if totals.tokens < seq_len + 1:
            raise DataError(
                f"source {name!r} has {totals.tokens:,} tokens, fewer than one row of {seq_len} + 1; add files to it,"
                " shorten data.seq_len, or leave it out of data.mixture"
            )
        self._encoding.judge(f"source {name}", lines=totals.lines, bad=totals.bad)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another chunk."""
        return self.next - self.first >= self.source.capacity

    @property
    def deadline(self) -> tuple[float, float]:
        """What is smaller where the next chunk is wanted sooner.

        The rows of the window in use are drawn all over it, so its chunks are wanted at once; those of the window
        after it when its rows are used up, which takes the longer the smaller the source's share is.
        """
        ahead = (self.next - self.needed) * self._plan.chunk_tokens / (self._plan.window * self._plan.seq_len)
        return int(ahead) / self.source.weight, ahead

    def make_chunk(self) -> None:
        """Make the next chunk."""
        tokens = np.empty(self._plan.chunk_tokens, dtype=self._encoding.dtype)
        before = self._stream.state()
        self._stream.read(tokens)
        path = chunk_path(self._folder, self.next)
        states = States(before, self._stream.state())
        write_chunk(path, tokens, states, number=self.next, identity=self._identity)
        self.next += 1

    def delete_released(self) -> None:
        """Delete the chunks before those needed, but for the newest: its end is where the stream goes on."""
        while self.first < min(self.needed, self.next - 1):
            chunk_path(self._folder, self.first).unlink(missing_ok=True)
            self.first += 1


def build(job: BuilderJob) -> None:
    """Make chunks until killed. Raises what goes wrong."""
    root = Path(job.plan.root)
    plans = [source for source in job.plan.sources if source.name in job.sources]
    _allow_open_files(sum(min(job.plan.interleave, len(source.files)) for source in plans))
    encoding = job.plan.encoding()
    said = [need for need in needed_by_readers(root) if need is not None]
    builders = [
        SourceBuilder(
            job.plan,
            source,
            encoding,
            needed=min((need[source.name] for need in said), default=0),
            known=job.known.get(source.name),
        )
        for source in plans
    ]
    for source in plans:
        say_settled(root, source.name)
    while True:
        needs = needed_by_readers(root)
        said = [need for need in needs if need is not None]
        for builder in builders:
            builder.needed = min((need[builder.source.name] for need in said), default=builder.needed)
            if len(said) == len(needs):
                builder.delete_released()
        with_room = [builder for builder in builders if not builder.is_full]
        if with_room:
            min(with_room, key=lambda builder: builder.deadline).make_chunk()
        else:
            time.sleep(IDLE_SECONDS)


def _allow_open_files(count: int) -> None:
    """Let this process have as many files open as it reads side by side."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise DataError(
            f"{count:,} raw files would be read side by side, and a process may have {hard:,} open here (ulimit -Hn);"
            " lower data.interleave or raise data.raw.builders"
        )
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_WATCHED_SECONDS)
    os._exit(1)


def describe_failure(error: Exception, root: str) -> str:
    """What a user should know of what ended a builder."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space is left for the spool {root}, which takes up to data.raw.disk_bytes; make room or lower that,"
            " and start the run again"
        )
    if isinstance(error, OSError):
        return f"{error} (while raw files were read ahead of training)"
    return f"a builder of the spool failed:\n{''.join(traceback.format_exception(error))}"


def main() -> int:
    """Read a `BuilderJob` as JSON from standard input and build; what goes wrong is said on standard output."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # SIGUSR1 is SLURM's, before the time is up
        signal.signal(number, signal.SIG_IGN)  # a stop asked of the whole group: training still needs its rows
    job = TypeAdapter(BuilderJob).validate_json(sys.stdin.buffer.read())
    threading.Thread(target=_end_with_parent, args=(job.parent,), daemon=True).start()
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        build(job)
    except Exception as error:  # handed to the reader who started this process
        answer.write(ANSWER_MARK + orjson.dumps(describe_failure(error, job.plan.root)))
        answer.flush()
    return 1


if __name__ == "__main__":
    sys.exit(main())
