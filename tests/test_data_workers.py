"""Workers: results, progress, and every way a process can fail."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.document import DataError
from data_pipeline.workers import Report, run_jobs


def double(job: int, report: Report) -> int:
    report(f"at {job}")
    return 2 * job


def fail(job: int, report: Report) -> int:
    if job == 3:
        raise DataError("job 3 cannot be used")
    return job


def crash(job: int, report: Report) -> int:
    return 1 // (job - 3)


def disk_full(job: int, report: Report) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")


def die(job: int, report: Report) -> int:
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def collect(work: Any, jobs: list[int], workers: int) -> tuple[dict[int, int], list[tuple[int, str]]]:
    messages: list[tuple[int, str]] = []
    results = dict(
        run_jobs(
            work, jobs, workers=workers, on_progress=lambda job, message: messages.append((job, message))
        )
    )
    return results, messages


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_every_job_has_its_result_and_its_messages(workers: int) -> None:
    results, messages = collect(double, [1, 2, 3, 4, 5], workers)
    assert results == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10}
    assert sorted(messages) == [(job, f"at {job}") for job in (1, 2, 3, 4, 5)]
    assert collect(double, [], workers) == ({}, [])


@pytest.mark.parametrize("workers", [1, 2])
def test_input_that_cannot_be_used_is_named(workers: int) -> None:
    with pytest.raises(DataError, match="job 3 cannot be used"):
        collect(fail, [1, 2, 3, 4], workers)


def test_other_errors_carry_the_worker_s_traceback() -> None:
    with pytest.raises(RuntimeError, match="a worker process failed at 3:\n(.|\n)*ZeroDivisionError"):
        collect(crash, [1, 2, 3, 4], 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_system_errors_arrive_as_they_are(workers: int) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        collect(disk_full, [1, 2], workers)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "the disk")


def test_a_worker_that_is_killed_is_noticed() -> None:
    with pytest.raises(
        DataError, match="a worker process died at 3 without a word, as when the system runs out"
    ):
        collect(die, [1, 2, 3, 4], 2)


def answer_and_die(job: int, report: Report) -> int:
    threading.Timer(0.05, os._exit, args=(1,)).start()
    return job


def test_a_worker_that_dies_between_two_jobs_is_noticed() -> None:
    results = run_jobs(answer_and_die, [1, 2, 3, 4], workers=2, on_progress=lambda job, message: None)
    with pytest.raises(DataError, match="a worker process died at [34] without a word"):
        for _ in results:
            time.sleep(1)


def write_or_fail(job: Path, report: Report) -> None:
    """Hold a file while waiting to be stopped; the job that has no folder fails once the file is there."""
    if job.suffix:
        job.touch()
        try:
            report("writing")
            time.sleep(60)
        finally:
            job.unlink()
    while not (job / "file.txt").exists():
        time.sleep(0.01)
    raise DataError("failed")


def test_workers_that_are_stopped_tidy_up(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="failed"):
        list(run_jobs(write_or_fail, [tmp_path / "file.txt", tmp_path], workers=2, on_progress=lambda job, it: None))
    assert list(tmp_path.iterdir()) == []


PARENT = """
import sys, time, os
from data_pipeline.workers import run_jobs
import endless

if __name__ == "__main__":
    list(run_jobs(endless.work, [1, 2], workers=2, on_progress=lambda job, pid: print(pid, flush=True)))
"""
ENDLESS = """
import os, time

def work(job, report):
    while True:
        report(os.getpid())
        time.sleep(0.05)
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "endless.py").write_text(ENDLESS)
    root = Path(__file__).resolve().parent.parent
    parent = subprocess.Popen(
        [sys.executable, "parent.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    workers: set[int] = set()
    while len(workers) < 2:
        workers.add(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.02)
