"""moepp_ds.records on a disk that fills up and has room again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from small_disk import run_on_small_disk

from moepp_ds.records import Lines

FILL = """
import json, os, pathlib, sys, warnings
warnings.simplefilter("always")
disk = pathlib.Path(sys.argv[1])
def fill():
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(512))
        except OSError:
            pass
"""


def test_lines_are_there_at_once_and_in_order(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "log")
    for number in range(3):
        lines.append(f"line {number} \udcff")
        assert (tmp_path / "log").read_bytes().count(b"\n") == number + 1
    assert not lines.waiting
    lines.close()
    assert Lines(tmp_path / "log").path.read_text() == "".join(f"line {n} \\udcff\n" for n in range(3))


def test_lines_wait_for_room(tmp_path: Path) -> None:
    program = FILL + """
from moepp_ds.records import Lines
lines = Lines(disk / "log")
lines.append("first")
fill()
for number in range(20):
    lines.append(f"{number:04} " + "x" * 2000)
assert lines.waiting
try:
    lines.sync()
except OSError as error:
    print("sync:", error.strerror)
(disk / "filler").unlink()
lines.append("last")
assert not lines.waiting
lines.close()
print(json.dumps((disk / "log").read_text().splitlines()))
"""
    done = run_on_small_disk(tmp_path / "disk", "128k", program, str(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr
    said, lines = done.stdout.splitlines()
    assert said == "sync: No space left on device"
    assert json.loads(lines) == ["first", *(f"{number:04} " + "x" * 2000 for number in range(20)), "last"]
    assert done.stderr.count("lines wait in memory for room on its disk") == 1


def test_a_run_s_curves_are_drawn_when_there_is_room(tmp_path: Path) -> None:
    program = FILL + """
from moepp_ds.monitor import RunFolder
folder = RunFolder(disk, tensorboard=True, resumed_step=0)
def record(steps):
    for step in steps:
        folder.record({"step": step, "loss": float(step), "layers": [{"share": {"ffn": 0.5}}] * 20})
record(range(1, 4))
folder.sync()
fill()
record(range(4, 40))
(disk / "filler").unlink()
record(range(40, 45))
folder.sync()
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
curves = EventAccumulator(str(disk / "tensorboard"))
curves.Reload()
steps = [point.step for point in curves.Scalars("train/loss")]
lines = [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()]
folder.close()
print(json.dumps([steps, lines, len(list((disk / "tensorboard").iterdir()))]))
"""
    done = run_on_small_disk(tmp_path / "disk", "512k", program, str(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr
    curves, lines, files = json.loads(done.stdout.splitlines()[-1])
    assert curves == lines == list(range(1, 45)) and files == 1
    assert done.stderr.count("the curves are drawn when there is room") == 1 and "Traceback" not in done.stderr


def test_curves_that_find_no_room_of_their_own(tmp_path: Path) -> None:
    """While the metrics do: an event is cut off where the disk ends, and completed later; its reader waits."""
    program = FILL + """
from moepp_ds.records import Curves, Lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
metrics = Lines(pathlib.Path(sys.argv[2]) / "metrics.jsonl")  # on another disk
points = lambda record: [(f"a/{number:03}", record["loss"]) for number in range(60)]
curves = Curves(disk / "tensorboard", metrics, resumed_step=2, points=points)
def record(steps):
    for step in steps:
        metrics.append(json.dumps({"step": step, "loss": float(step)}))
        curves.add({"step": step, "loss": float(step)})
def shown():
    seen = EventAccumulator(str(disk / "tensorboard"))
    seen.Reload()
    return [(point.step, point.value) for point in seen.Scalars("a/059")]
record(range(1, 5))
fill()
record(range(5, 20))
curves.sync(19)
few = shown()
(disk / "filler").unlink()
curves.sync(19)
assert shown() == [(step, float(step)) for step in range(1, 20)], shown()
assert few == shown()[: len(few)] and len(few) < 19
record([20])
curves.close(20)
assert len(shown()) == 20
"""
    (tmp_path / "other").mkdir()
    done = run_on_small_disk(tmp_path / "disk", "64k", program, str(tmp_path / "disk"), str(tmp_path / "other"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the curves are drawn when there is room") == 1 and "Traceback" not in done.stderr


def test_nothing_is_warned_of_where_there_is_room(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = Lines(tmp_path / "log")
        lines.append("a")
        lines.sync()
        lines.close()
    with pytest.raises(ValueError, match="closed"):
        lines.append("b")
