"""Locks: shared, alone, refused; and given back by a killed holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.document import DataError
from data_pipeline.locks import Taken, at_work, held, is_free, take


def test_locks(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock, shared=True), held(lock, shared=True):
        assert not is_free(lock)
        with pytest.raises(DataError, match="taken"):
            with held(lock, refusal="taken"):
                pass
    assert is_free(lock)
    with held(lock), pytest.raises(DataError, match="taken"), held(lock, shared=True, refusal="taken"):
        pass


def test_a_lock_for_life_names_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("process 1 on a host of the past\n")
    with take(lock):
        for shared in (False, True):
            with pytest.raises(Taken, match=rf"lock is held by process {os.getpid()} on ") as taken:
                take(lock, shared=shared)
            assert taken.value.by.startswith(f"process {os.getpid()} on ")
    with take(lock, shared=True), take(lock, shared=True), pytest.raises(Taken, match="held by another process"):
        take(lock)
    assert is_free(lock)


def test_work_for_a_dead_build_does_not_begin(tmp_path: Path) -> None:
    lock = tmp_path / "lock"

    def broken(message: None) -> None:
        assert not is_free(lock)
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError), at_work(str(lock), broken):
        raise AssertionError("it has begun")
    with at_work(str(lock), lambda message: None):
        assert not is_free(lock)
    assert is_free(lock)


def test_a_killed_holder_gives_its_lock_back(tmp_path: Path) -> None:
    hold = "import pathlib, sys; from data_pipeline.locks import held\n"
    hold += "with held(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    assert not is_free(tmp_path / "lock")
    process.kill()
    process.communicate()
    with held(tmp_path / "lock", refusal="taken"):
        pass
