"""A checkpoint's files without any engine: chunks and their checksums, ranges read once, folders found by name."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from damage import flip, set_index
from safetensors.torch import load_file
from torch import Tensor

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.chunks import CHUNK_BYTES, ChunkReader, chunk_ranges, prove_chunks, write_chunks
from moepp_ds.checkpoint.compare import compare
from moepp_ds.checkpoint.errors import DamagedCheckpoint
from moepp_ds.checkpoint.files import candidates, find_checkpoint, name_latest, publish, read_index, step_of
from moepp_ds.checkpoint.fingerprints import Fingerprints
from moepp_ds.checkpoint.retention import (
    delete,
    left_behind,
    left_by_killed_saves,
    set_aside,
    set_aside_before,
    set_aside_old,
    too_old,
)
from moepp_ds.checkpoint.tensors import StoredTensors, Wanted, write_fragments
from moepp_ds.checkpoint.verify import find_damage
from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.checkpoint.writer import write_weights
from moepp_ds.fingerprint import partial_fingerprint

MIB = 2**20


def test_where_chunks_lie() -> None:
    assert chunk_ranges(4096, 4096) == [(0, 4096)]
    assert chunk_ranges(4096, 4100) == [(0, 4096), (4096, 4100)]
    edge = 4096 + CHUNK_BYTES
    assert chunk_ranges(4096, edge) == [(0, 4096), (4096, edge)]
    assert chunk_ranges(4096, edge + 1) == [(0, 4096), (4096, edge), (edge, edge + 1)]


@pytest.mark.parametrize("sizes", [[], [1], [CHUNK_BYTES], [CHUNK_BYTES - 1, 2], [3, 2 * CHUNK_BYTES, 5], [1000] * 9])
def test_chunks_are_read_as_they_were_written(tmp_path: Path, sizes: list[int]) -> None:
    header, content = b"h" * 4096, random.Random(1).randbytes(sum(sizes))
    ends = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    pieces = (memoryview(content)[start:stop] for start, stop in zip(ends, ends[1:]))
    note = write_chunks(tmp_path / "file", header, pieces)
    assert (tmp_path / "file").read_bytes() == header + content
    assert (note["bytes"], note["header"]) == (4096 + len(content), 4096)
    assert len(note["chunks"]) == len(chunk_ranges(4096, note["bytes"]))
    reader = ChunkReader(tmp_path, {"file": note})
    assert bytes(reader.header("file")) == header
    for offset in sorted({0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, len(content) - 1} & set(range(len(content)))):
        end = min((offset // CHUNK_BYTES + 1) * CHUNK_BYTES, len(content))
        assert bytes(reader.rest_of_chunk("file", 4096 + offset)) == content[offset:end]
    assert reader.damage("file") == []


def test_pieces_may_share_their_memory(tmp_path: Path) -> None:
    buffer = bytearray(1000)

    def pieces() -> Iterator[memoryview]:
        for number in range(5):
            buffer[:] = bytes([number]) * 1000
            yield memoryview(buffer)

    write_chunks(tmp_path / "file", b"h" * 4096, pieces())
    assert (tmp_path / "file").read_bytes()[4096:] == b"".join(bytes([number]) * 1000 for number in range(5))


def test_disks_that_want_another_alignment(tmp_path: Path) -> None:
    """Chunks where nothing goes past the system's cache are written and proven through it."""
    content = random.Random(2).randbytes(5000)
    note = write_chunks(tmp_path / "file", b"h" * 100, [memoryview(content)])
    assert (tmp_path / "file").read_bytes() == b"h" * 100 + content
    prove_chunks(tmp_path / "file", note)


@pytest.mark.parametrize("place", [0, 4095, 4096, 9000])
def test_a_disk_that_holds_something_else(tmp_path: Path, place: int) -> None:
    file = tmp_path / "file"
    note = write_chunks(file, b"h" * 4096, [memoryview(bytes(5000))])
    prove_chunks(file, note)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file does not hold what was written to it: bytes \d+ to \d+"):
        prove_chunks(file, note)
    file.write_bytes(content[:5000])
    with pytest.raises(CheckpointError, match="file does not hold what was written to it"):
        prove_chunks(file, note)
    file.unlink()
    with pytest.raises(CheckpointError, match="file cannot be read back: .*No such file"):
        prove_chunks(file, note)


def test_what_is_read_is_what_is_wanted_and_no_chunk_twice(tmp_path: Path) -> None:
    """Fragments in two files and in no order; ranges across them, across chunks, and out of order."""
    values = torch.arange(10 * MIB, dtype=torch.float32)
    other = torch.arange(7, dtype=torch.float32)
    cut = 3 * MIB + 5
    notes = {
        "a": write_fragments(tmp_path / "a", {("weight", "w", cut): values[cut:], ("weight", "x", 0): other}),
        "b": write_fragments(tmp_path / "b", {("exp_avg", "x", 0): -other, ("weight", "w", 0): values[:cut]}),
    }
    assert set(load_file(tmp_path / "a")) == {f"weight|w|{cut}", "weight|x|0"}  # any program can read it
    stored = StoredTensors(tmp_path, notes)
    stored.check_whole({"w": [10, MIB], "x": [7]}, ("weight",))
    with pytest.raises(DamagedCheckpoint, match="exp_avg of w: without a gap the checkpoint holds 0 of its"):
        stored.check_whole({"w": [10 * MIB]}, ("exp_avg",))
    wanted = [
        Wanted("weight", "w", 9 * MIB, torch.empty(MIB)),
        Wanted("weight", "x", 2, torch.empty(3)),
        Wanted("weight", "w", cut - 4, torch.empty(8)),
        Wanted("exp_avg", "x", 0, torch.empty(7)),
        Wanted("weight", "w", 0, torch.empty(9 * MIB)),
    ]
    os.sync()
    read_before = bytes_read()
    stored.read(wanted)
    size = sum(note["bytes"] for note in notes.values())
    assert bytes_read() - read_before <= size  # although several lie in the same chunks
    for one in wanted:
        whole = {"w": values, "x": other if one.kind == "weight" else -other}[one.name]
        assert torch.equal(one.target, whole[one.start : one.start + len(one.target)])


def bytes_read() -> int:
    """What this process has read from files, cached or not."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def test_every_changed_byte_of_many_chunks_is_found(tmp_path: Path) -> None:
    """A file of four chunks: the chunk that has the byte is refused, by its place, and no other."""
    weights = torch.randn(12 * MIB, generator=torch.Generator().manual_seed(0))
    folder = write_weights(tmp_path, [("w", 0, weights)], shapes={"w": [12 * MIB]}, step=0, facts={})
    file = folder / "part-00000.safetensors"
    note = read_index(folder)["files"][file.name]
    assert len(note["chunks"]) == 4
    draw = random.Random(2)
    for start, stop in chunk_ranges(note["header"], note["bytes"]) * 2:
        place = draw.randrange(start, stop)
        flip(file, place)
        said = f"does not match its checksums in bytes {start} to {stop}; use another checkpoint"
        assert [line.split(".safetensors ")[1].partition(" (")[0] for line in find_damage(folder)] == [said]
        with pytest.raises(DamagedCheckpoint, match=said):
            WeightReader(folder).read("w")
        flip(file, place)
    assert find_damage(folder) == []
    reader = WeightReader(folder)
    flip(file, note["header"] + 2 * CHUNK_BYTES)
    assert torch.equal(reader.read("w", 0, 8 * MIB), weights[: 8 * MIB])  # what is whole can be read
    with pytest.raises(DamagedCheckpoint):
        reader.read("w", 8 * MIB, 8 * MIB + 1)


def test_fingerprints_add_up_and_name_experts() -> None:
    shapes = {"a.weight": [4, 6], "b.moe.experts.down_EFD": [3, 2, 4]}
    weights = {name: torch.randn(24, generator=torch.Generator().manual_seed(len(name))) for name in shapes}

    def of(weights: dict[str, Tensor], cuts: list[int]) -> Fingerprints:
        ranks = []
        for start, stop in zip([0, *cuts], [*cuts, 24]):
            ranks.append(Fingerprints(shapes))
            for name, values in weights.items():
                ranks[-1].add(name, start, values[start:stop])
        whole = Fingerprints(shapes)
        whole.add_sums(rank.sums for rank in ranks)
        return whole

    alone = of(weights, [])
    assert alone.sums["a.weight"] == [partial_fingerprint(weights["a.weight"])]
    experts = weights["b.moe.experts.down_EFD"].view(3, 8)
    assert alone.sums["b.moe.experts.down_EFD"] == [partial_fingerprint(expert) for expert in experts]
    assert [len(prints) for prints in alone.facts().values()] == [1, 3]
    assert all(len(number) == 16 for prints in alone.facts().values() for number in prints)
    for cuts in ([8], [1, 2, 23], [5, 8, 12, 16]):
        of(weights, cuts).check(alone.facts())
    exchanged = {**weights, "b.moe.experts.down_EFD": experts[[0, 2, 1]].flatten()}
    with pytest.raises(DamagedCheckpoint) as found:
        of(exchanged, [10]).check(alone.facts())
    assert [line.split(":")[0] for line in str(found.value).splitlines()[1:]] == [
        "  b.moe.experts.down_EFD, expert 1",
        "  b.moe.experts.down_EFD, expert 2",
    ]


def test_weights_that_are_not_their_fingerprints(tmp_path: Path) -> None:
    folder = write_weights(tmp_path, [("w", 0, torch.ones(6))], shapes={"w": [6]}, step=0, facts={})
    set_index(folder, lambda index: index["fingerprints"].update(w=["0" * 16]))
    said = "the weights are not the ones that were saved"
    assert len(find_damage(folder)) == 1 and said in find_damage(folder)[0]
    reader = WeightReader(folder)
    assert reader.read("w", 0, 5).tolist() == [1.0] * 5  # a part has none
    with pytest.raises(DamagedCheckpoint, match=f"{said}; use another checkpoint:\n  w: fingerprint .* instead of 00"):
        reader.read("w")


def hold(root: Path, *steps: int, latest: str | None = None) -> None:
    for step in steps:
        (root / f"step-{step:08d}").mkdir(parents=True)
        (root / f"step-{step:08d}" / "index.json").write_text("{}")
    if latest is not None:
        (root / "latest").write_text(latest)


@pytest.mark.parametrize(
    "latest, expected",
    [
        ("step-00000020\n", [20, 10]),
        ("step-00000030\n", [30, 20, 10]),
        ("step-00000025\n", [20, 10]),  # killed while a resumed run put another in its place
        ("stap-00000020\n", [30, 20, 10]),
        ("\x80\0", [30, 20, 10]),
        ("", [30, 20, 10]),
        (None, [30, 20, 10]),
    ],
)
def test_candidates(tmp_path: Path, latest: str | None, expected: list[int]) -> None:
    """From the one that `latest` names down; later ones are of what a resumed run left behind."""
    assert candidates(tmp_path / "none") == []
    hold(tmp_path, 10, 20, 30, latest=latest)
    for name in ("step-00000040", ".step-00000050.partial", "step-x"):  # without an index, or without a name
        (tmp_path / name).mkdir()
    for name in ("step-20", "step-000000020", "step-000000\u0662\u0660"):  # a step has one name
        shutil.copytree(tmp_path / "step-00000010", tmp_path / name)
    (tmp_path / "step-00000001").write_text("a file")
    assert candidates(tmp_path) == [tmp_path / f"step-{step:08d}" for step in expected]


@contextmanager
def no_more_files() -> Iterator[None]:
    """Inside, this process can open no file: an error of the machine, which says nothing of the file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path: Path) -> None:
    """For damage an older checkpoint is taken, and without `latest` the newest of an abandoned branch."""
    hold(tmp_path, 10, 20, 30, latest="step-00000010")
    note = write_chunks(tmp_path / "file", b"h" * 4096, [memoryview(bytes(5000))])
    reader = ChunkReader(tmp_path, {"file": note})
    for read in (
        lambda: read_index(tmp_path / "step-00000010"),
        lambda: reader.header("file"),
        lambda: find_checkpoint(tmp_path),
    ):
        with pytest.raises(CheckpointError, match="Too many open files") as error, no_more_files():
            read()
        assert type(error.value) is CheckpointError
    latest = tmp_path / "latest"
    latest.unlink()
    latest.mkdir()
    for find in (candidates, find_checkpoint):
        with pytest.raises(CheckpointError, match="latest cannot be read: .*Is a directory.*; repair it, or name"):
            find(tmp_path)


def test_an_index_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """It is for the reader to name; the others are found."""
    hold(tmp_path, 10, 20, latest="step-00000020")
    index = tmp_path / "step-00000020/index.json"
    index.unlink()
    index.symlink_to("x" * 300)  # another error than that it is missing
    assert find_checkpoint(tmp_path) == index.parent
    assert candidates(tmp_path) == [index.parent, tmp_path / "step-00000010"]
    with pytest.raises(DamagedCheckpoint, match=r"index.json cannot be read: .*File name too long"):
        read_index(index.parent)


def test_what_cannot_be_published_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()  # it cannot be replaced by a file
    for _ in range(2):
        with pytest.raises(CheckpointError, match="step-00000000 cannot be written: .*[Dd]irectory"):
            write_weights(tmp_path, [("w", 0, torch.ones(6))], shapes={"w": [6]}, step=0, facts={})
        assert sorted(path.name for path in tmp_path.iterdir()) in (["latest"], ["latest", "step-00000000"])
        (tmp_path / "step-00000000").mkdir(exist_ok=True)
        (tmp_path / "step-00000000/index.json").write_text("of before")
    assert (tmp_path / "step-00000000/index.json").read_text() == "of before"


def test_latest_is_put_back_where_a_save_was_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written already, and perhaps not safe from a power cut."""
    partial = tmp_path / ".step-00000020.partial"
    for before in (None, "step-00000010\n"):
        hold(tmp_path, *([10] if before else []), latest=before)
        partial.mkdir()
        synced = iter([None, None, OSError("the disk is gone")])

        def sync(folder: Path) -> None:
            problem = next(synced, None)
            if problem:
                raise problem

        monkeypatch.setattr("moepp_ds.checkpoint.files.sync_folder", sync)
        monkeypatch.setattr("data_pipeline.atomic.sync_folder", sync)
        with pytest.raises(OSError, match="the disk is gone"):
            publish(partial, tmp_path / "step-00000020")
        assert partial.exists() and not (tmp_path / "step-00000020").exists()
        assert ((tmp_path / "latest").read_text() if before else None) == before
        assert (tmp_path / "latest").exists() == bool(before)
        partial.rmdir()


def test_an_index_that_could_not_be_read_is_never_published(tmp_path: Path) -> None:
    facts = {"routing": {"bias_LE": [[float("nan")]], "share_LE": None}}
    with pytest.raises(CheckpointError, match="index.json is no index of a checkpoint: routing.bias_LE.0.0: .*finite"):
        write_weights(tmp_path, [("w", 0, torch.ones(6))], shapes={"w": [6]}, step=0, facts=facts)
    assert list(tmp_path.iterdir()) == []


def test_what_retention_hides_and_deletes(tmp_path: Path) -> None:
    hold(tmp_path, 1, 2, 3, 9)
    (tmp_path / ".step-00000007.partial").mkdir()
    old = set_aside_old(tmp_path / "step-00000003", keep=2)
    assert [path.name for path in old] == [".step-00000001.old-0", ".step-00000007.partial"]
    delete(old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000009"]
    delete([tmp_path / "gone"])  # by another process
    set_aside([tmp_path / "step-00000001"])
    with pytest.warns(UserWarning, match="cannot be deleted: .*/proc/self/status"):
        delete([Path("/proc/self/status")])


def test_what_a_resumed_run_has_passed_does_not_count(tmp_path: Path) -> None:
    hold(tmp_path, 1, 2, 3, 5, 7)
    newest, before = tmp_path / "step-00000006", tmp_path / "step-00000002"
    hold(tmp_path, 6)
    assert [step_of(path) for path in too_old(newest, keep=2, before=before)] == [1, 3, 5]
    assert [step_of(path) for path in too_old(newest, keep=9, before=before)] == [3, 5]
    assert [step_of(path) for path in too_old(newest, keep=2)] == [1, 2, 3]


def test_milestones_stay_and_do_not_count(tmp_path: Path) -> None:
    hold(tmp_path, 0, 4, 5, 6, 8, 9, 10, 12)

    def gone(newest: int, **options: int | Path) -> list[int]:
        return [step_of(path) for path in too_old(tmp_path / f"step-{newest:08d}", **options)]  # type: ignore[arg-type]

    assert gone(10, keep=2) == [0, 4, 5, 6, 8]
    assert gone(10, keep=2, keep_every=4) == [5, 6]
    assert gone(12, keep=2, keep_every=4) == [5, 6]  # the newest is one, and two others stay
    assert gone(10, keep=1, keep_every=5) == [4, 6, 8]
    assert gone(12, keep=9, keep_every=4, before=tmp_path / "step-00000006") == [8, 9, 10]  # of what was left behind
    delete(set_aside_old(tmp_path / "step-00000012", keep=1, keep_every=4))
    assert sorted(step_of(path) for path in tmp_path.iterdir()) == [0, 4, 8, 10, 12]


def test_latest_names_what_a_run_goes_on_from(tmp_path: Path) -> None:
    hold(tmp_path, 1, 2, 3, latest="step-00000003\n")
    one = tmp_path / "step-00000001"
    assert left_behind(one) == [tmp_path / "step-00000002", tmp_path / "step-00000003"]
    assert left_behind(tmp_path / "step-00000003") == []
    assert name_latest(one) and find_checkpoint(tmp_path) == one and candidates(tmp_path) == [one]
    written = (tmp_path / "latest").stat().st_ino
    assert not name_latest(one) and (tmp_path / "latest").stat().st_ino == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *(f"step-0000000{n}" for n in (1, 2, 3))]


def test_two_may_delete_at_once(tmp_path: Path) -> None:
    """Each takes what it finds, nobody warns, and what a save has set aside to put back is left to it."""
    for number in range(4):
        hold(tmp_path, *range(1, 30))
        for path in tmp_path.glob("step-*"):
            for file in range(5):
                (path / str(file)).touch()
        newest = tmp_path / "step-00000029"
        with warnings.catch_warnings(), ThreadPoolExecutor(3) as threads:
            warnings.simplefilter("error")
            for done in [threads.submit(prune_once, newest) for _ in range(3)]:
                done.result()
        assert [path.name for path in tmp_path.iterdir()] == [newest.name]
        shutil.rmtree(newest)
    for name in (".step-00000028.old-0", ".step-00000029.old-0", ".step-00000030.old-1", ".step-00000001.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in set_aside_before(newest)] == [".step-00000028.old-0"]


def test_what_killed_saves_have_left_goes_before_the_next_one(tmp_path: Path) -> None:
    hold(tmp_path, 20, latest="step-00000020")
    hidden = [".step-00000010.old-0", ".step-00000020.old-0", ".step-00000030.old-0"]
    for name in (*hidden, ".step-00000025.partial", ".unfinished-x-latest"):
        (tmp_path / name).mkdir()
    found = left_by_killed_saves(tmp_path, tmp_path / "step-00000020")
    assert [path.name for path in found] == [hidden[0], ".step-00000025.partial", ".unfinished-x-latest"]
    assert hidden[0] not in [path.name for path in left_by_killed_saves(tmp_path, None)]


def test_what_is_listed_and_not_found_does_not_hold_up_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(path: Path) -> None:
        raise FileNotFoundError(path)

    hold(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lost)
    with pytest.warns(UserWarning, match="cannot be deleted: .*listed but not found.*step-00000001"):
        delete([tmp_path / "step-00000001"])


def prune_once(newest: Path) -> None:
    set_aside(too_old(newest, keep=1))
    delete(set_aside_before(newest))


def test_of_a_checkpoint_that_was_moved_away_the_link_is_deleted(tmp_path: Path) -> None:
    hold(tmp_path / "archive", 1)
    hold(tmp_path / "run", 2)
    (tmp_path / "run/step-00000001").symlink_to(tmp_path / "archive/step-00000001")
    delete(set_aside_old(tmp_path / "run/step-00000002", keep=1))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000002"]
    assert (tmp_path / "archive/step-00000001/index.json").exists()


def test_older_and_newer_formats_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_weights(tmp_path, [("w", 0, torch.ones(6))], shapes={"w": [6]}, step=0, facts={})
    text = (folder / "index.json").read_text()
    for number in ("1", "3", '"2"', "null", "[]"):
        (folder / "index.json").write_text(text.replace('"format": 2', f'"format": {number}'))
        with pytest.raises(DamagedCheckpoint, match="index.json has format .*, this version reads 2; use the version"):
            read_index(folder)
    for note in (
        *({"chunks": []}, {"header": 7}, {"bytes": 4000}, {"header": CHUNK_BYTES + 1}),
        *({"bytes": 2**60}, {"bytes": 4120.0}, {"bytes": "4120"}, {"header": "4096"}),
    ):
        (folder / "index.json").write_text(text)
        set_index(folder, lambda index: index["files"]["part-00000.safetensors"].update(note))
        with pytest.raises(DamagedCheckpoint, match="index.json is no index of a checkpoint: files"):
            read_index(folder)


def test_headers_that_lie(tmp_path: Path) -> None:
    """With checksums that are right: what a header says is never used to read outside of the file."""

    def refused(header: dict[str, object] | bytes, said: str, length: int = 4088) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        padded = length.to_bytes(8, "little") + text.ljust(4088)
        note = write_chunks(tmp_path / "file", padded, [memoryview(bytes(64))])
        with pytest.raises(DamagedCheckpoint, match=f"file holds no fragments of a checkpoint: .*{said}"):
            StoredTensors(tmp_path, {"file": note})

    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    for change, said in (
        ({"data_offsets": [0, 60]}, "another size"),
        ({"data_offsets": [4, 68]}, "outside"),
        ({"data_offsets": [-64, 0]}, "outside"),
        ({"shape": [15], "data_offsets": [2, 62]}, "outside"),
        ({"shape": [4, 4]}, "too many values"),
        ({"shape": [True]}, "another size"),
        ({"shape": ["16"]}, "another size"),
        ({"dtype": "F16"}, "F16 instead of F32"),
    ):
        refused({"weight|w|0": {**entry, **change}}, said)
    refused({"weight|w|x": entry}, "invalid literal")
    refused({"weight": entry}, "not enough values")
    refused({"weight|w|0": 3}, "")
    refused([], "")  # type: ignore[arg-type]
    refused(b"\x80\x04", "")
    refused({"weight|w|0": entry}, "another length", length=17)
    half = {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}
    refused({"weight|w|0": entry, "weight|w|16": entry}, "one behind the other")  # it gives more than it holds
    refused({"weight|w|0": entry, "weight|x|0": half}, "one behind the other")
    refused({"weight|w|0": half}, "one behind the other")


def test_what_differs(tmp_path: Path) -> None:
    shapes = {"a": [3], "b.experts.x": [2, 2]}
    facts = {"recipe": {"train": {"max_lr": 0.1}, "name": "x"}}
    pieces = [("a", 0, torch.tensor([1.0, 2.0, 3.0])), ("b.experts.x", 0, torch.zeros(4))]

    def made(name: str, changed: list[tuple[str, int, Tensor]], **other: object) -> Path:
        return write_weights(
            tmp_path / name, changed, shapes=other.get("shapes", shapes), step=0, facts=other.get("facts", facts)
        )  # type: ignore[arg-type]

    one = made("one", pieces)
    same = compare(one, made("same", pieces[::-1]))
    assert same.identical and same.weights == {}
    other = compare(one, made("other", [("a", 0, torch.tensor([1.0, 2.5, 2.75])), pieces[1]], facts={"recipe": {}}))
    assert not other.identical and other.weights == {"a": 0.5}
    assert other.recipe == [("train.max_lr", 0.1, None), ("name", "x", None)]
    minus = compare(one, made("minus", [pieces[0], ("b.experts.x", 0, -torch.zeros(4))]))
    assert not minus.identical and minus.weights == {"b.experts.x": 0.0}  # of other bits, and equal
    larger = compare(one, made("larger", [pieces[0], ("c", 0, torch.ones(4))], shapes={"a": [3], "c": [4]}))
    assert larger.shapes == [("b.experts.x", [2, 2], None), ("c", None, [4])] and larger.weights == {}
    flip(one / "part-00000.safetensors", -1)
    with pytest.raises(CheckpointError, match="does not match its checksums"):
        compare(one, tmp_path / "same/step-00000000")
