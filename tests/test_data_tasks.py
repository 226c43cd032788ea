"""Tasks: shares, their names in SLURM, and who may run beside whom."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from killed_builds import contents, moepp_data, run, run_killed
from raw_corpora import lines_of, write_corpora, write_raw, write_tokenizer

from data_pipeline.atomic import TEMPORARY
from data_pipeline.build import BuildReport, Watcher, build_set, finish_set
from data_pipeline.document import DataError
from data_pipeline.file_job import FileJob
from data_pipeline.tasks import Task, fingerprint, longest_first, parse_task, shares


@dataclass(frozen=True)
class Job:
    key: str
    size: int


def test_shares_are_disjoint_whole_and_balanced() -> None:
    rng = random.Random(0)
    for _ in range(50):
        jobs = [Job(f"file {number}", rng.randrange(1000)) for number in range(rng.randrange(40))]
        tasks = rng.randint(1, 9)
        dealt = shares(jobs, tasks)
        assert sorted(job.key for share in dealt for job in share) == sorted(job.key for job in jobs)
        assert dealt == shares(rng.sample(jobs, len(jobs)), tasks), "the order of the list does not matter"
        loads = [sum(job.size for job in share) for share in dealt]
        assert max(loads) - min(loads) <= max((job.size for job in jobs), default=0)
        assert all(share == longest_first(share) for share in dealt)


def test_shares_by_hand() -> None:
    jobs = [Job("a", 5), Job("b", 9), Job("c", 4), Job("d", 4), Job("e", 0)]
    dealt = [[job.key for job in share] for share in shares(jobs, 3)]
    assert dealt == [["b"], ["a", "e"], ["c", "d"]]
    assert shares(jobs[:1], 2) == [[Job("a", 5)], []]


def test_the_fingerprint_of_a_list() -> None:
    files = [("a", 1), ("b", 2), ("c", 12)]
    assert fingerprint(files) == fingerprint(files[::-1])
    assert len({fingerprint(changed) for changed in (files, files[:2], [("a", 2), ("b", 1), ("c", 12)])}) == 3


def test_names_of_tasks() -> None:
    assert parse_task("3/8") == Task(3, 8)
    for text in ("0/8", "9/8", "1/0"):
        with pytest.raises(DataError, match=f"there is no task {text}: tasks are counted from 1"):
            parse_task(text)
    for text in ("", "3", "3/8/1", "-1/8", "a/b", "SLURM"):
        with pytest.raises(DataError, match=re.escape(f"--task {text!r} is neither i/n, such as 1/8")):
            parse_task(text)


def array(place: int, first: int, last: int, count: int) -> dict[str, str]:
    numbers = {"ID": place, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


def test_places_in_a_slurm_array() -> None:
    assert [parse_task("slurm", array(place, 0, 3, 4)) for place in range(4)] == [Task(n, 4) for n in (1, 2, 3, 4)]
    assert parse_task("slurm", array(8, 1, 8, 8)) == Task(8, 8)
    assert [parse_task("slurm", array(place, 2, 12, 3)).number for place in (2, 7, 12)] == [1, 2, 3]
    assert parse_task("slurm", array(5, 5, 5, 1)) == Task(1, 1)
    for irregular in (array(2, 1, 4, 3), array(2, 1, 7, 4), array(9, 1, 8, 8), array(1, 1, 8, 1)):
        with pytest.raises(DataError, match="in a job array that is not regular"):
            parse_task("slurm", irregular)
    said = (
        "(SLURM_ARRAY_TASK_ID=3, SLURM_ARRAY_TASK_MIN=1, SLURM_ARRAY_TASK_MAX=7, SLURM_ARRAY_TASK_COUNT=3), where the"
        " task has no place; submit with --array=1-3, or give --task i/n"
    )
    with pytest.raises(DataError, match=re.escape(said)):
        parse_task("slurm", array(3, 1, 7, 3))
    with pytest.raises(DataError, match=r"outside a SLURM job array \(SLURM_ARRAY_TASK_ID='', .*or give --task i/n"):
        parse_task("slurm", {})


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Path]:
    return write_corpora(tmp_path / "raw")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer.json")


def build(root: Path, tokenizer: Path, raw: dict[str, Path], **changes: object) -> BuildReport:
    return build_set(root, tokenizer_file=tokenizer, corpora=raw, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("tasks", [1, 4, 9])
def test_tasks_and_finish_make_the_same_bytes(
    tmp_path: Path, raw: dict[str, Path], tokenizer: Path, tasks: int
) -> None:
    whole = build(tmp_path / "whole", tokenizer, raw)
    reports = [build(tmp_path / "out", tokenizer, raw, task=Task(number, tasks)) for number in range(tasks, 0, -1)]
    assert sum(report.built for report in reports) == 6
    assert sorted(file.key for report in reports for file in report.manifest.files) == [
        file.key for file in whole.manifest.files
    ]
    assert not (tmp_path / "out/manifest.json").exists()
    assert build(tmp_path / "out", tokenizer, raw, task=Task(1, tasks)).built == 0
    report = finish_set(tmp_path / "out", corpora=raw)
    assert (report.built, report.kept) == (0, 6) and report.manifest == whole.manifest
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_finish_names_what_is_not_built(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=re.escape(f"{out} holds nothing that was built: settings.json is missing")):
        finish_set(out, corpora=raw)
    build(out, tokenizer, raw, task=Task(2, 3))
    with pytest.raises(DataError, match=r"of 6 files are not built, such as .*: run --task 1/3, 3/3 again, and then"):
        finish_set(out, corpora=raw)
    build(out, tokenizer, raw, task=Task(1, 3))
    build(out, tokenizer, raw, task=Task(3, 3))
    write_raw(raw["pile"] / "train/09.jsonl", lines_of(["w1"]))
    with pytest.raises(DataError, match=r"1 of 7 files are not built, such as pile/train/09.jsonl: run --task \d/3"):
        finish_set(out, corpora=raw)


def test_finish_names_what_it_leaves_out(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    build(tmp_path / "out", tokenizer, raw, task=Task(1, 1))
    said: list[str] = []

    class Listener(Watcher):
        def say(self, text: str) -> None:
            said.append(text)

    assert len(finish_set(tmp_path / "out", corpora={"pile": raw["pile"]}, watcher=Listener()).manifest.files) == 2
    assert [text.partition(" is not")[0] for text in said] == [
        "warning: what was built of dolma", "warning: what was built of redpajama"
    ]
    said.clear()
    assert len(finish_set(tmp_path / "out", corpora=raw, watcher=Listener()).manifest.files) == 6
    assert len(finish_set(tmp_path / "out", corpora={"pile": raw["pile"]}, watcher=Listener()).manifest.files) == 6
    assert not said


def test_finish_judges_whole_corpora(tmp_path: Path, tokenizer: Path) -> None:
    for number in range(3):
        write_raw(tmp_path / f"pile/{number}.jsonl", b"bad\n" * 4)
    raw = {"pile": tmp_path / "pile"}
    for number in (1, 2):
        build(tmp_path / "out", tokenizer, raw, task=Task(number, 2))
    with pytest.raises(DataError, match="pile: 12 of 12 lines are no documents"):
        finish_set(tmp_path / "out", corpora=raw)


HOLD = """
import fcntl, sys
files = []
for word in sys.argv[1:]:
    kind, path = word.split(":", 1)
    files.append(open(path, "a+b"))
    fcntl.flock(files[-1], fcntl.LOCK_SH if kind == "shared" else fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


@contextmanager
def another_holds(*locks: str) -> Iterator[None]:
    """Another program holds locks, given as `shared:PATH` or `alone:PATH`, and is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *locks], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def test_who_may_run_beside_whom(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    out, locks = tmp_path / "out", tmp_path / "out/.locks"
    build(out, tokenizer, raw, task=Task(1, 3))
    with another_holds(f"shared:{locks}/set", f"alone:{locks}/task-1"):  # task 1 of 3 is running
        for whole in (lambda: build(out, tokenizer, raw), lambda: finish_set(out, corpora=raw)):
            with pytest.raises(DataError, match=re.escape(f"another build is writing to {out}; wait for it to end")):
                whole()
        with pytest.raises(DataError, match=re.escape(f"task 1 is building into {out} already; wait for it")):
            build(out, tokenizer, raw, task=Task(1, 3))
        with pytest.raises(DataError, match="task 2/4 would take another share .*: they are 3 tasks, or see other raw"):
            build(out, tokenizer, raw, task=Task(2, 4))
        with pytest.raises(DataError, match="task 2/3 would take another share"):
            build(out, tokenizer, {"pile": raw["pile"]}, task=Task(2, 3))
        build(out, tokenizer, raw, task=Task(2, 3))
    with another_holds(f"alone:{locks}/set"):
        with pytest.raises(DataError, match="a whole build, or finish, is writing to .*; wait for it to end"):
            build(out, tokenizer, raw, task=Task(3, 3))
    build(out, tokenizer, raw, task=Task(4, 4))  # nobody is running: another number of tasks is fine
    assert len(build(out, tokenizer, raw).manifest.files) == 6


RELEASE = """
import fcntl, pathlib, sys, time
file = open(sys.argv[1], "a+b")
fcntl.flock(file, fcntl.LOCK_SH)
print("held", flush=True)
time.sleep(1)
pathlib.Path(sys.argv[2]).touch()
"""


class AfterWorkers(Watcher):
    """Is told that a build begins only when workers of a killed one have ended."""

    def __init__(self, ended: Path) -> None:
        self.ended, self.begun = ended, False

    def begin(self, jobs: list[FileJob], kept: int) -> None:
        assert self.ended.exists()
        self.begun = True


@pytest.mark.parametrize("killed", ["workers", "workers-1", "workers-3"])
def test_tasks_wait_for_the_workers_of_killed_builds(
    tmp_path: Path, raw: dict[str, Path], tokenizer: Path, killed: str
) -> None:
    """Of a whole build, of the same task, and of another task of another number of them, which had other shares."""
    out, ended = tmp_path / "out", tmp_path / "ended"
    build(out, tokenizer, raw, task=Task(1, 3))
    process = subprocess.Popen(
        [sys.executable, "-c", RELEASE, str(out / ".locks" / killed), str(ended)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    watcher = AfterWorkers(ended)
    build(out, tokenizer, raw, task=Task(1, 4 if killed == "workers-3" else 3), watcher=watcher)
    assert watcher.begun and process.wait() == 0


def test_a_damaged_list_of_tasks_is_none(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    out = tmp_path / "out"
    build(out, tokenizer, raw, task=Task(1, 3))
    (out / ".locks/tasks.json").write_bytes(b"")
    with pytest.raises(DataError, match="run `moepp-data build` again, and then finish"):
        finish_set(out, corpora=raw)
    build(out, tokenizer, raw, task=Task(2, 3))
    with pytest.raises(DataError, match="run --task 3/3 again, and then finish"):
        finish_set(out, corpora=raw)


def test_tasks_leave_what_others_are_writing(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    out = tmp_path / "out"
    build(out, tokenizer, raw, task=Task(1, 2))
    build(out, tokenizer, raw, task=Task(2, 2))
    folder, key = out / "shards/dolma/wiki", "wiki-0.json.gz"
    own, other = folder / f"{TEMPORARY}abcd_123-{key}.train", folder / f"{TEMPORARY}abcd_123-{key}.train.train"
    (out / f"records/dolma/wiki/{key}.json").unlink()
    own.touch()
    other.touch()
    for number in (1, 2):
        build(out, tokenizer, raw, task=Task(number, 2))
    assert other.exists() and not own.exists()
    finish_set(out, corpora=raw)
    assert not other.exists()


def test_settings_are_fixed_by_the_first_task(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    build(tmp_path / "out", tokenizer, raw, task=Task(1, 2), held_out=0.1)
    with pytest.raises(DataError, match="was begun with other settings: held-out share 0.1 then and 0.2 now"):
        build(tmp_path / "out", tokenizer, raw, task=Task(2, 2), held_out=0.2)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_tasks_end_with_the_same_bytes(tmp_path: Path, tokenizer: Path, kills: int) -> None:
    raw = write_corpora(tmp_path / "raw", documents=3000)
    words = [word for name, path in raw.items() for word in (f"--{name}", path)]
    options = ("--tokenizer", tokenizer, *words)
    out, whole = tmp_path / "out", tmp_path / "whole"
    seconds = run([moepp_data("build", whole, *options)])
    tasks = [moepp_data("build", out, *options, "--task", f"{number}/2", "--workers", number) for number in (1, 2)]
    finish = moepp_data("finish", out, *words)
    run_killed([*tasks, finish], out, expected=whole, seconds=3 * seconds, kills=kills, seed=kills)
