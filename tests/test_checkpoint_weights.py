"""Checkpoints of weights alone: written piece by piece or not at all, read without DeepSpeed, damage found first."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from damage import Bomb, flip, set_index
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.chunks import chunk_ranges, digest
from moepp_ds.checkpoint.errors import DamagedCheckpoint
from moepp_ds.checkpoint.files import find_checkpoint, read_index
from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.checkpoint.writer import write_weights

SHAPES = {"a.weight": [3, 4], "b.experts.down_EFD": [2, 2, 5]}
A = torch.arange(12, dtype=torch.float64).view(3, 4) / 7
B = torch.arange(20, dtype=torch.bfloat16).view(2, 2, 5) / 4
PIECES = [("b.experts.down_EFD", 10, B[1]), ("a.weight", 0, A), ("b.experts.down_EFD", 0, B[0])]


def write(root: Path, pieces: Any = PIECES, *, file_bytes: int = 2**20) -> Path:
    return write_weights(root, pieces, shapes=SHAPES, step=0, facts={"origin": {"seed": 3}}, file_bytes=file_bytes)


@pytest.mark.parametrize("file_bytes", [2**20, 64, 48, 8, 4])
def test_what_is_written_is_read_whatever_the_size_of_files(tmp_path: Path, file_bytes: int) -> None:
    folder = write(tmp_path, file_bytes=file_bytes)
    assert folder == tmp_path / "step-00000000" == find_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000000"]
    index = read_index(folder)
    assert (index["kinds"], index["step"], index["updates"], index["origin"]) == (["weight"], 0, 0, {"seed": 3})
    parts = [f"part-{number:05d}.safetensors" for number in range(len(index["files"]))]
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", *parts]
    assert len(parts) == {2**20: 1, 64: 3, 48: 3, 8: 16, 4: 32}[file_bytes]
    for part in parts:
        with safe_open(folder / part, framework="pt") as stored:
            sizes = [stored.get_tensor(key).nbytes for key in stored.keys()]
        assert 0 < sum(sizes) <= file_bytes
    reader = WeightReader(folder)
    assert reader.shapes == SHAPES and reader.index == index
    assert torch.equal(reader.read("a.weight"), A.flatten().float())
    assert torch.equal(reader.read("b.experts.down_EFD"), B.flatten().float())
    for start in range(21):
        for stop in range(start, 21):
            found = reader.read("b.experts.down_EFD", start, stop)
            assert found.dtype == torch.float32 and torch.equal(found, B.flatten().float()[start:stop])


def test_ranges_that_are_not_there(tmp_path: Path) -> None:
    reader = WeightReader(write(tmp_path))
    with pytest.raises(CheckpointError, match="holds no parameter a.weigth; did you mean a.weight?"):
        reader.read("a.weigth")
    with pytest.raises(CheckpointError, match="holds no parameter zzz$"):
        reader.read("zzz")
    for start, stop in ((-1, 3), (0, 13), (5, 4), (13, None)):
        with pytest.raises(CheckpointError, match="a.weight of .* has elements 0 to 12, and .* were asked for"):
            reader.read("a.weight", start, stop)


def test_memory_of_the_giver_is_its_own_again(tmp_path: Path) -> None:
    """A source that uses one buffer for all its pieces changes nothing that it gave before."""

    def from_one_buffer() -> Iterator[tuple[str, int, Tensor]]:
        buffer = torch.empty(20)
        for name, start, tensor in PIECES:
            given = buffer[: tensor.numel()]
            given.copy_(tensor.flatten())
            yield name, start, given

    reader = WeightReader(write(tmp_path, from_one_buffer()))
    assert torch.equal(reader.read("b.experts.down_EFD"), B.flatten().float())


STREAMED = """
import resource, sys, torch
from pathlib import Path
from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.checkpoint.writer import write_weights
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
pieces = (("w", start, torch.full((2**20,), float(start))) for start in range(0, 2**26, 2**20))
before = peak()
folder = write_weights(Path(sys.argv[1]), pieces, shapes={"w": [2**26]}, step=0, facts={}, file_bytes=2**24)
assert WeightReader(folder).read("w", 2**25 - 1, 2**25 + 1).tolist() == [2**25 - 2**20, 2**25]
print(peak() - before)
"""


def test_the_whole_is_never_in_memory(tmp_path: Path) -> None:
    """256 MiB in files of 16: neither writing nor reading a part of it takes more than a few files' worth."""
    command = [sys.executable, "-c", STREAMED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * 2**20
    assert len(list((tmp_path / "step-00000000").glob("part-*"))) == 16
    shutil.rmtree(tmp_path)  # pytest would keep it


def test_shapes_and_strides_do_not_matter(tmp_path: Path) -> None:
    """Elements come in the order of the tensor's indices, also where its memory is transposed, or has no axis."""
    transposed = torch.empty(4, 3).t().copy_(A)
    pieces = [("a.weight", 0, transposed[:2]), ("a.weight", 8, transposed[2, :3]), ("a.weight", 11, A[2, 3])]
    reader = WeightReader(write(tmp_path, [*pieces, PIECES[0], PIECES[2], ("a.weight", 12, torch.empty(0))]))
    assert torch.equal(reader.read("a.weight"), A.flatten().float())


REFUSED: dict[str, tuple[list[tuple[str, int, Tensor]], str]] = {
    "unknown": ([("a.wieght", 0, A)], "the model has no parameter a.wieght; did you mean a.weight?"),
    "outside": ([("a.weight", 1, A)], "a.weight has elements 0 to 12, and 1 to 13 came"),
    "negative": ([("a.weight", -1, A[0])], "a.weight has elements 0 to 12, and -1 to 3 came"),
    "twice": ([*PIECES, ("a.weight", 4, A[1])], "a.weight: elements 4 to 8 came, and 0 to 12 had come before; each"),
    "overlap": (
        [("a.weight", 0, A[0]), ("a.weight", 8, A[2]), ("a.weight", 3, A[1, :2])],
        "a.weight: elements 3 to 5 came, and 0 to 4 had come before",
    ),
    "overlap with what follows": (
        [("a.weight", 8, A[2]), ("a.weight", 5, A[1])],
        "a.weight: elements 5 to 9 came, and 8 to 12 had come before",
    ),
    "gaps": (
        [("a.weight", 0, A[0]), ("a.weight", 8, A[2])],
        "2 parameters did not come whole:\n  a.weight: elements 4 to 8 of 12 are missing\n"
        "  b.experts.down_EFD: nothing came",
    ),
    "end": (PIECES[1:], "1 parameters did not come whole:\n  b.experts.down_EFD: elements 10 to 20 of 20 are missing"),
    "nothing": ([], "2 parameters did not come whole:\n  a.weight: nothing came"),
    "integers": ([("a.weight", 0, A.long())], "a.weight comes as torch.int64; weights must be floating point numbers"),
    "nan": ([*PIECES[:1], ("a.weight", 0, A.log())], "a.weight has values that are not finite numbers in fp32"),
    "too large": ([("a.weight", 0, A * 1e300)], "a.weight has values that are not finite numbers in fp32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_model_leaves_nothing(tmp_path: Path, name: str) -> None:
    pieces, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        write(tmp_path, pieces, file_bytes=16)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, int, Tensor]]:
        yield PIECES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, broken(), file_bytes=16)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CheckpointError, match="part-00000.safetensors cannot be written"):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/step-00000000 cannot be written: .*; free its disk or name"):
        write(tmp_path / "file")


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-00000000.partial").mkdir()
    (tmp_path / ".step-00000000.partial/part-00009.safetensors").write_bytes(b"half")
    folder = write(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "part-00000.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000000"]


# -- damage ------------------------------------------------------------------------------------------------------


PART = "part-00000.safetensors"


def replace_part(folder: Path, content: bytes) -> None:
    """Put other bytes into the file of weights, with checksums that are right."""
    (folder / PART).write_bytes(content)
    header = min(8 + int.from_bytes(content[:8], "little"), len(content))
    chunks = [digest(content[start:stop]) for start, stop in chunk_ranges(header, len(content))]
    note = {"bytes": len(content), "header": header, "chunks": chunks}
    set_index(folder, lambda index: index["files"].update({PART: note}))


def part_of(tmp_path: Path, tensors: dict[str, Tensor]) -> bytes:
    save_file(tensors, tmp_path / "made")
    return (tmp_path / "made").read_bytes()


WHOLE = {"weight|a.weight|0": torch.zeros(12), "weight|b.experts.down_EFD|0": torch.zeros(20)}
DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a byte": (lambda folder, _: flip(folder / PART, -3), f"{PART} does not match its checksums in bytes 4096 to 4224"),
    "its header": (lambda folder, _: flip(folder / PART, 12), f"{PART} does not match its .* in bytes 0 to 4096; use"),
    "cut off": (lambda folder, _: os.truncate(folder / PART, 100), f"{PART} has 100 bytes instead of"),
    "a loop": (
        lambda folder, _: [(folder / PART).unlink(), (folder / PART).symlink_to(PART)],
        f"{PART} cannot be read: .*; use another",
    ),
    "no file": (lambda folder, _: (folder / PART).unlink(), f"{PART} is missing"),
    "no index": (lambda folder, _: (folder / "index.json").unlink(), "is no checkpoint: it holds no index.json"),
    "index": (lambda folder, _: flip(folder / "index.json", -5), "index.json does not match its checksum"),
    "deep index": (lambda folder, _: (folder / "index.json").write_text("[" * 10**5), "index.json is damaged"),
    "path": (
        lambda folder, _: set_index(folder, lambda index: index["files"].update({"../x": index["files"].pop(PART)})),
        "index.json is no index of a checkpoint: files.*pattern",
    ),
    "no shapes": (
        lambda folder, _: set_index(folder, lambda index: index.pop("parameters")),
        "index.json is no index of a checkpoint: parameters: Field required",
    ),
    "a parameter more": (
        lambda folder, _: set_index(folder, lambda index: index["parameters"].update({"c": [2]})),
        "weight of c: without a gap the checkpoint holds 0 of its 2 elements",
    ),
    "bf16": (
        lambda folder, made: replace_part(folder, part_of(made, {"weight|a.weight|0": A.bfloat16().flatten()})),
        f"{PART} holds no fragments of a checkpoint: weight.a.weight.0 is BF16 instead of F32",
    ),
    "an axis more": (
        lambda folder, made: replace_part(folder, part_of(made, {"weight|a.weight|0": A.float()})),
        f"{PART} holds no fragments of a checkpoint",
    ),
    "another's names": (
        lambda folder, made: replace_part(folder, part_of(made, {"lm_head.weight": A.float().flatten()})),
        f"{PART} holds no fragments of a checkpoint",
    ),
    "overlap": (
        lambda folder, made: replace_part(folder, part_of(made, {**WHOLE, "weight|a.weight|4": torch.zeros(8)})),
        "weight of a.weight: elements 4 to 12 are there twice; use another",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_when_it_is_opened_or_read(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    folder = write(tmp_path / "checkpoints")
    damage(folder, tmp_path)
    with pytest.raises(DamagedCheckpoint, match=message):
        reader = WeightReader(folder)
        for parameter in reader.shapes:
            reader.read(parameter)


def test_latest_names_a_checkpoint_or_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    paths = (b"../step-00000000", b"step-00000000/../step-00000000", b".")
    for name in (b"step-00000007\n", *paths, b"", b"\xff\xfe\0", b"x" * 9999, b"step-" + b"1" * 9999):
        (tmp_path / "latest").write_bytes(name)
        with pytest.raises(CheckpointError, match="latest names .*, which is no checkpoint; name one by its folder"):
            find_checkpoint(tmp_path)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match="latest cannot be read: .* directory.*; repair it, or name a checkpoint"):
        find_checkpoint(tmp_path)


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    folder = write(tmp_path / "checkpoints")
    for name in ("pytorch_model.bin", "part-00001.safetensors", "mp_rank_00_model_states.pt"):
        (folder / name).write_bytes(bomb)
    assert torch.equal(WeightReader(folder).read("a.weight"), A.flatten().float())  # they are not even looked at
    replace_part(folder, bomb)
    with pytest.raises(CheckpointError, match=f"{PART} holds no fragments of a checkpoint"):
        WeightReader(folder)
    (folder / "index.json").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        WeightReader(folder)
    (tmp_path / "checkpoints/latest").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        find_checkpoint(tmp_path / "checkpoints")
    assert not exploded.exists()
    pickle.loads(bomb)  # it is a bomb
    assert exploded.exists()


def test_looking_at_a_model_loads_no_deepspeed() -> None:
    modules = "checkpoint.weights, moepp_ds.start, moepp_ds.generate, moepp_ds.trace, moepp_ds.sweep"
    look = f"import sys, moepp_ds.{modules}; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
