"""Jobs in parallel processes that cannot outlive their parent.

Each worker is a fresh interpreter at the other end of a pipe. It takes a job, sends any number of progress
messages and then the result, and takes the next. When the parent dies, however it dies, the next message
finds the pipe broken and the worker ends; when a worker dies, the parent sees its end of the pipe close. When
one job fails the others are stopped where they are, by an exception that lets them tidy up; as this may not
be granted them either (kill -9), whatever jobs write must be written atomically.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, TypeVar

from data_pipeline.document import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[Any], None]


def run_jobs(
    work: Callable[[Job, Report], Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    on_progress: Callable[[Job, Any], None],
) -> Iterator[tuple[Job, Result]]:
    """Run `work(job, report)` for every job and yield (job, result) as they end, in any order.

    `report(message)` inside a job calls `on_progress(job, message)` here; `report(None)` calls nothing, and like any
    other raises where the parent is dead. With one worker (or one job) everything runs in this process. `work`,
    jobs, messages and results must be picklable otherwise. Raises the DataError or OSError of a job that failed;
    any other exception of a worker comes as a RuntimeError with its traceback.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, work(job, partial(_pass_on, on_progress, job))
    else:
        yield from _in_processes(work, jobs, workers=min(workers, len(jobs)), on_progress=on_progress)


def _pass_on(on_progress: Callable[[Job, Any], None], job: Job, message: Any) -> None:
    if message is not None:
        on_progress(job, message)


def _in_processes(
    work: Callable[[Job, Report], Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    on_progress: Callable[[Job, Any], None],
) -> Iterator[tuple[Job, Result]]:
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(jobs))
    busy: dict[Connection, Job] = {}
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            busy[ours] = waiting.pop()
            _give(ours, busy[ours])
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                kind, message = _receive(pipe, busy[pipe])
                if kind == "progress":
                    _pass_on(on_progress, busy[pipe], message)
                    continue
                yield busy.pop(pipe), message
                if waiting:
                    busy[pipe] = waiting.pop()
                    _give(pipe, busy[pipe])
                else:
                    pipe.close()
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()


def _give(pipe: Connection, job: Any) -> None:
    try:
        pipe.send(job)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the worker is dead, which is said when its answer is waited for


def _receive(pipe: Connection, job: Any) -> tuple[str, Any]:
    try:
        kind, message = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise DataError(
            f"a worker process died at {job} without a word, as when the system runs out of memory; finished"
            " files are kept: run the same command again, with fewer --workers"
        ) from None
    if kind == "unusable":
        raise DataError(message)
    if kind == "system":
        raise OSError(*message)
    if kind == "crashed":
        raise RuntimeError(f"a worker process failed at {job}:\n{message}")
    return kind, message


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit


def _serve(pipe: Connection, work: Callable[[Any, Report], Any]) -> None:
    """A worker: jobs until the pipe is closed at the other end."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        while True:
            job = pipe.recv()
            try:
                answer = "result", work(job, lambda message: pipe.send(("progress", message)))
            except DataError as error:
                answer = "unusable", str(error)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except OSError as error:
                answer = "system", (error.errno, error.strerror or str(error), error.filename)
            except Exception:
                answer = "crashed", traceback.format_exc()
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        pass  # the parent is gone or wants no more
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to tidy up
