"""Checks of moepp_ds.checkpoint in real ranks; tests/test_checkpoint.py starts them, one world after the other.

    ... --module tests.programs.checkpoint_checks FOLDER PART

FOLDER is shared by the parts: what one world saved, another loads.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from safetensors import safe_open
from torch import Tensor

from data_pipeline.atomic import TEMPORARY
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.chunks import digest
from moepp_ds.checkpoint.errors import DamagedCheckpoint
from moepp_ds.checkpoint.files import find_checkpoint, read_index, write_index
from moepp_ds.checkpoint.fragments import optimizer_facts
from moepp_ds.checkpoint.live import Saver, load_checkpoint
from moepp_ds.checkpoint.tensors import write_fragments
from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.checkpoint.writer import write_weights
from moepp_ds.engine import join_ranks
from tests.programs import checks, tiny

RANKS = join_ranks()
FOLDER = Path(sys.argv[1])
TWO_BY_TWO, ONE, BACK = FOLDER / "two_by_two", FOLDER / "one", FOLDER / "back"
FACTS = {"recipe": {"name": "tiny"}, "data": {"rows": 24}}


def stored_arrays(folder: Path) -> dict[str, Tensor]:
    """`kind|name` -> the flat global array, put together from the files alone."""
    index = read_index(folder)
    arrays: dict[str, Tensor] = {}
    for file in index["files"]:
        with safe_open(folder / file, framework="pt") as stored:
            for key in stored.keys():
                kind, name, start = key.split("|")
                size = int(torch.tensor(index["parameters"][name]).prod())
                array = arrays.setdefault(f"{kind}|{name}", torch.full((size,), torch.nan))
                values = stored.get_tensor(key)
                assert values.dtype == torch.float32 and values.ndim == 1
                array[int(start) : int(start) + len(values)] = values
    return arrays


def save(engine: Any, root: Path, step: int, *, keep: int = 9) -> Path:
    saver = Saver(engine, root, keep=keep)
    saver.save(step=step, facts=FACTS)
    folder = saver.complete()
    saver.close()
    dist.barrier()
    assert folder is not None
    return folder


def trained(ways: int, steps: int, precision: str = "fp32") -> tuple[Any, Any]:
    """A recipe and its engine after that many updates."""
    asked = tiny.recipe(expert_parallel=ways, precision=precision)
    engine = tiny.engine_for(asked, RANKS)
    tiny.train(engine, asked, RANKS, range(steps))
    return asked, engine


def resumed(ways: int, folder: Path, precision: str = "fp32") -> tuple[Any, Any]:
    """A recipe and its engine, fresh but for what it loaded."""
    asked = tiny.recipe("train.seed=7", expert_parallel=ways, precision=precision)
    engine = tiny.engine_for(asked, RANKS)
    load_checkpoint(engine, folder)
    return asked, engine


def on_first(action: Callable[[], object]) -> None:
    """Do something to shared files, once."""
    if RANKS.is_first:
        action()
    dist.barrier()


# -- part save: two ranks --------------------------------------------------------------------------------------


def files_hold_what_the_ranks_hold() -> None:
    """Also leaves the checkpoint that other worlds load, and how the run went on."""
    asked, engine = trained(2, 3)
    folder = save(engine, TWO_BY_TWO, 3)
    assert folder == TWO_BY_TWO / "step-00000003" == find_checkpoint(TWO_BY_TWO)
    files = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", *files]
    index = read_index(folder)
    assert (index["format"], index["step"], index["updates"]) == (2, 3, 3)
    assert index["layout"] == {"world": 2, "zero_stage": 2}
    assert {key: index[key] for key in FACTS} == FACTS
    assert index["parameters"]["blocks.1.moe.experts.down_EFD"] == [4, 24, 16]
    arrays = tiny.global_arrays(engine)
    tiny.same(stored_arrays(folder), arrays)
    going_on = tiny.train(engine, asked, RANKS, range(3, 6))
    on_first(lambda: (FOLDER / "going_on.json").write_text(json.dumps(going_on)))


def going_on() -> list[tuple[float, float]]:
    return [tuple(pair) for pair in json.loads((FOLDER / "going_on.json").read_text())]


def _exact(precision: str, step: int) -> None:
    asked, engine = trained(2, step, precision)
    folder = save(engine, FOLDER / f"exact-{precision}-{step}", step)
    before = tiny.train(engine, asked, RANKS, range(step, step + 3))
    asked, again = resumed(2, folder, precision)
    assert again.global_steps == step
    assert tiny.train(again, asked, RANKS, range(step, step + 3)) == before
    tiny.same(tiny.global_arrays(again), tiny.global_arrays(engine))


def same_layout_continues_digit_for_digit_in_fp32() -> None:
    _exact("fp32", 3)


def same_layout_continues_digit_for_digit_in_bf16() -> None:
    _exact("bf16", 2)


def checkpoint_before_the_first_update() -> None:
    _exact("fp32", 0)


def continues(ways: int, folder: Path, root: Path | None = None) -> None:
    """Load on this layout: the same bits; save them from here: the same bits; train on: the same losses."""
    asked, engine = resumed(ways, folder)
    stored = stored_arrays(TWO_BY_TWO / "step-00000003")
    tiny.same(tiny.global_arrays(engine), stored)
    if root is not None:
        tiny.same(stored_arrays(save(engine, root, 3)), stored)
    losses = torch.tensor(tiny.train(engine, asked, RANKS, range(3, 6)))
    torch.testing.assert_close(losses, torch.tensor(going_on()), rtol=1e-5, atol=0)


def loads_without_expert_parallelism() -> None:
    continues(1, TWO_BY_TWO / "step-00000003", FOLDER / "two_by_one")


def weights_alone_go_on_with_a_new_optimizer() -> None:
    """Loaded into an engine that has trained, too: moments are zero again, and no update is counted."""
    reader, root = WeightReader(TWO_BY_TWO / "step-00000003"), FOLDER / "alone"
    weights = {name: reader.read(name) for name in reader.shapes}
    pieces = [(name, 0, weight) for name, weight in weights.items()]
    on_first(lambda: write_weights(root, pieces, shapes=reader.shapes, step=0, facts=FACTS, file_bytes=4096))
    _, engine = trained(2, 2)
    index = load_checkpoint(engine, root / "step-00000000")
    assert (index["kinds"], index["step"], engine.global_steps) == (["weight"], 0, 0)
    assert optimizer_facts(engine)["updates"] == 0
    expected = {f"weight|{name}": weight for name, weight in weights.items()}
    for kind in ("exp_avg", "exp_avg_sq"):
        expected |= {f"{kind}|{name}": torch.zeros_like(weight) for name, weight in weights.items()}
    tiny.same(tiny.global_arrays(engine), expected)


# -- part one: one rank; part back: two ranks again ----------------------------------------------------------


def one_rank_loads_what_two_saved() -> None:
    continues(1, TWO_BY_TWO / "step-00000003", ONE)
    continues(1, FOLDER / "two_by_one" / "step-00000003")


def two_ranks_load_what_one_saved() -> None:
    continues(2, ONE / "step-00000003", BACK)
    continues(1, ONE / "step-00000003")


# -- publishing ------------------------------------------------------------------------------------------------


Watcher = Callable[[str, list[str]], object]
WATCHERS: list[Watcher] = []


def _tell_watchers(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHERS and event in ("open", "os.rename", "shutil.rmtree"):
        names = [Path(os.fspath(path)).name for path in arguments[:2] if isinstance(path, (str, os.PathLike))]
        for watcher in list(WATCHERS):
            watcher(event.rpartition(".")[2], names)


sys.addaudithook(_tell_watchers)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Show the watcher what this rank does to which names, just before; what it raises comes from that call."""
    WATCHERS.append(watcher)
    try:
        yield
    finally:
        WATCHERS.remove(watcher)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise TimeoutError("what was waited for did not come within 10 s")


def latest_moves_last() -> None:
    _, engine = trained(2, 1)
    root, seen = FOLDER / "order", []
    save(engine, root, 1)

    def note(event: str, names: list[str]) -> None:
        if event == "open" and names[0] in (FOLDER.name, root.name, ".step-00000002.partial"):
            seen.append(f"open {names[0]}")
        elif event != "open":
            seen.append(f"{event} {' '.join(TEMPORARY if TEMPORARY in name else name for name in names)}")

    with watching(note):
        save(engine, root, 2, keep=1)
    if RANKS.is_first:
        assert seen == [
            "open .step-00000002.partial",  # to make a temporary file there
            f"rename {TEMPORARY} index.json",
            "open .step-00000002.partial",  # to sync it, as those that follow, but for one
            f"open {FOLDER.name}",
            "rename .step-00000002.partial step-00000002",
            "open order",
            "open order",  # to make a temporary file there
            f"rename {TEMPORARY} latest",
            "open order",
            "rename step-00000001 .step-00000001.old-0",
            "rmtree .step-00000001.old-0",
        ], seen
    else:
        assert seen == []


def old_one_that_cannot_be_deleted_is_warned_of_and_tried_again() -> None:
    _, engine = trained(2, 1)
    root = FOLDER / "stuck"
    save(engine, root, 1)
    stuck = ("rename", "step-00000001")

    def refuse(event: str, names: list[str]) -> None:
        if (event, names[0]) == stuck:
            raise PermissionError(f"{event} {names[0]} is not allowed")

    def save_warned(step: int, said: str) -> None:
        text = f"{said}; the next save tries again"
        warned = pytest.warns(UserWarning, match=text) if RANKS.is_first else nullcontext()
        with warned, watching(refuse):
            assert save(engine, root, step, keep=1) == find_checkpoint(root)
        dist.barrier()

    save_warned(2, "step-00000001 is not allowed")
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    stuck = ("rmtree", ".step-00000001.old-0")
    save_warned(3, "old-0 is not allowed")
    assert sorted(path.name for path in root.iterdir()) == [".step-00000001.old-0", "latest", "step-00000003"]
    stuck = ("rmtree", ".step-00000003.old-0")
    save_warned(3, "old-0 is not allowed")  # saved again, by a resumed run
    assert sorted(path.name for path in root.iterdir()) == [".step-00000003.old-0", "latest", "step-00000003"]
    dist.barrier()
    save(engine, root, 3, keep=1)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000003"]


def old_ones_are_deleted_and_later_ones_do_not_count() -> None:
    _, engine = trained(2, 1)
    root = FOLDER / "keep"

    def steps() -> list[int]:
        dist.barrier()
        return sorted(int(path.name[5:]) for path in root.glob("step-*"))

    for step in (1, 2, 3):
        save(engine, root, step, keep=2)
    assert steps() == [2, 3]
    save(engine, root, 9, keep=2)
    assert steps() == [3, 9]
    save(engine, root, 4, keep=2)  # by a run that was resumed from 3
    assert steps() == [3, 4, 9]
    assert find_checkpoint(root) == root / "step-00000004"
    save(engine, root, 9, keep=1)
    assert steps() == [9]
    assert find_checkpoint(root) == root / "step-00000009"
    assert not list(root.glob(".*"))


def half_written_folders_are_ignored_and_cleared() -> None:
    _, engine = trained(2, 1)
    root = FOLDER / "half"
    assert find_checkpoint(root) is None
    save(engine, root, 1)

    def kill_while_saving() -> None:
        for step in (2, 8):
            (root / f".step-{step:08d}.partial").mkdir()
            (root / f".step-{step:08d}.partial" / "rank-00000-of-00002.safetensors").write_bytes(b"\0" * 100)
            (root / f".step-{step:08d}.partial" / "rank-00003-of-00004.json").write_text("{}")

    on_first(kill_while_saving)
    assert find_checkpoint(root) == root / "step-00000001"
    folder = save(engine, root, 2)
    tiny.same(stored_arrays(folder), tiny.global_arrays(engine))
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001", "step-00000002"]


@contextmanager
def files_of_at_most(size: int, *, rank: int) -> Iterator[None]:
    """On one rank the disk seems full: no file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == RANKS.rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failed_save_is_known_to_all_ranks_and_leaves_the_one_before() -> None:
    asked, engine = trained(2, 1)
    root = FOLDER / "full"
    folder = save(engine, root, 1)
    arrays = tiny.global_arrays(engine)
    for rank in (0, 1):
        with files_of_at_most(6000, rank=rank):
            message = f"no checkpoint of update 2: .*rank-0000{rank}-of-00002.safetensors cannot be written"
            with pytest.raises(CheckpointError, match=message):
                save(engine, root, 2)
    dist.barrier()
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]
    assert find_checkpoint(root) == folder
    tiny.same(stored_arrays(folder), arrays)
    dist.barrier()
    tiny.train(engine, asked, RANKS, [1])  # the run is alive
    assert save(engine, root, 2) == find_checkpoint(root)


def bytes_that_change_on_the_way_to_the_disk_are_found() -> None:
    _, engine = trained(2, 1)
    root = FOLDER / "changed"
    folder = save(engine, root, 1)
    size = (folder / SECOND).stat().st_size
    header = read_index(folder)["files"][SECOND]["header"]
    for place, where in ((-5, f"bytes {header} to {size}"), (12, f"bytes 0 to {header}")):
        changed = False

        def change(event: str, names: list[str]) -> None:
            nonlocal changed
            file = root / ".step-00000002.partial" / SECOND
            if event == "open" and names[0] == SECOND and file.exists() and not changed:  # to be read back
                changed = True
                wait_until(lambda: file.stat().st_size == size)
                flip(file, place)

        message = rf"no checkpoint of update 2: rank 1: .*{SECOND} does not hold what was written to it: {where}"
        with pytest.raises(CheckpointError, match=message), watching(change):
            save(engine, root, 2)
        assert changed == (RANKS.rank == 1)
        dist.barrier()
        assert find_checkpoint(root) == folder
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]
        dist.barrier()


def ranks_that_do_not_share_the_folder_are_found_out() -> None:
    _, engine = trained(2, 1)
    message = f"no checkpoint of update 1: rank 0: .*{SECOND} is missing, as rank 0 sees it; the run folder must be one"
    with pytest.raises(CheckpointError, match=message):
        save(engine, FOLDER / f"local-{RANKS.rank}", 1)
    assert list((FOLDER / f"local-{RANKS.rank}").iterdir()) == []


def folder_that_cannot_be_made() -> None:
    _, engine = trained(2, 1)
    on_first(lambda: (FOLDER / "occupied").write_text("a file"))
    with pytest.raises(CheckpointError, match="no checkpoint of update 1: .*occupied"):
        save(engine, FOLDER / "occupied", 1)


# -- refusing ----------------------------------------------------------------------------------------------------


def refuses(
    damage: Callable[[Path], object], message: str, *overrides: str, name: str = "step-00000003"
) -> None:
    """Loading a damaged copy of the checkpoint raises the message on every rank and changes nothing."""
    copy = FOLDER / "damaged" / name
    on_first(lambda: shutil.rmtree(copy.parent, ignore_errors=True))
    on_first(lambda: shutil.copytree(TWO_BY_TWO / "step-00000003", copy))
    on_first(lambda: damage(copy))
    asked = tiny.recipe("train.seed=7", *overrides, expert_parallel=2)
    engine = tiny.engine_for(asked, RANKS)
    before = tiny.global_arrays(engine)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(engine, copy)
    tiny.same(tiny.global_arrays(engine), before)
    assert engine.global_steps == 0


SECOND = "rank-00001-of-00002.safetensors"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def damaged_byte() -> None:
    refuses(lambda folder: flip(folder / SECOND, 12), rf"{SECOND} does not match its checksums in bytes 0 to \d+; use")
    copy, whole = FOLDER / "damaged/step-00000003", TWO_BY_TWO / "step-00000003"
    on_first(lambda: shutil.rmtree(copy, ignore_errors=True))
    on_first(lambda: shutil.copytree(whole, copy))
    on_first(lambda: flip(copy / SECOND, -5))
    asked = tiny.recipe("train.seed=7", expert_parallel=2)
    engine = tiny.engine_for(asked, RANKS)
    with pytest.raises(DamagedCheckpoint, match=rf"^rank 1: .*{SECOND} does not match its checksums in bytes .*; use"):
        load_checkpoint(engine, copy)
    load_checkpoint(engine, whole)  # what had been read before the damage was found is replaced
    assert tiny.train(engine, asked, RANKS, range(3, 6)) == going_on()


def truncated_file() -> None:
    refuses(lambda folder: os.truncate(folder / SECOND, 1000), rf"{SECOND} has 1000 bytes instead of \d+; use another")


def missing_file() -> None:
    refuses(lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing; use another checkpoint")


def _without(folder: Path, key: str) -> None:
    """Write the second file again without one fragment, with checksums that are right."""
    with safe_open(folder / SECOND, framework="pt") as stored:
        tensors = {k: stored.get_tensor(k).clone() for k in stored.keys()}
    assert key in {k.rpartition("|")[0] for k in tensors}
    kept: dict[tuple[str, str, int], Tensor] = {}
    for k, tensor in tensors.items():
        kind, name, start = k.split("|")
        if f"{kind}|{name}" != key:
            kept[kind, name, int(start)] = tensor
    _rewrite(folder, lambda: write_fragments(folder / SECOND, kept))


def _rewrite(folder: Path, change: Callable[[], dict[str, Any]]) -> None:
    """Change the second file, and make the index fit what `change` returns as its note."""
    index = read_index(folder)
    files = index.pop("files")
    files[SECOND] = change()
    write_index(folder, index, files)


def missing_fragment() -> None:
    key = "exp_avg_sq|blocks.3.moe.experts.down_EFD"
    refuses(
        lambda folder: _without(folder, key),
        "exp_avg_sq of blocks.3.moe.experts.down_EFD: without a gap the checkpoint holds 768 of its 1536",
    )


def another_models_shapes() -> None:
    refuses(
        lambda folder: None,
        re.escape(
            "holds another model:\n  blocks.0.ffn.down_EFD: checkpoint [1, 24, 16], model [1, 32, 16]\n"
            "  blocks.0.ffn.gate_up_EDG: checkpoint [1, 16, 48], model [1, 16, 64]\n"
        ),
        "model.ffn_hidden_size=32",
    )
    refuses(lambda folder: None, r"  head.weight: checkpoint \[64, 16\], model \[65, 16\]", "model.vocab_size=65")


def newer_format() -> None:
    def raise_format(folder: Path) -> None:
        path = folder / "index.json"
        path.write_text(path.read_text().replace('"format": 2', '"format": 3'))

    refuses(raise_format, "index.json has format 3, this version reads 2; use the version that wrote it")


def damaged_index() -> None:
    path = TWO_BY_TWO / "step-00000003" / "index.json"
    size = path.stat().st_size
    refuses(lambda folder: os.truncate(folder / "index.json", size // 2), r"index.json is damaged \(.*\); use another")
    refuses(lambda folder: (folder / "index.json").write_text("[]"), "index.json is damaged")
    for place in range(0, size, 41):  # in spaces and digits, keys and checksums: no change goes unseen
        refused = False
        copy = FOLDER / f"index-{RANKS.rank}"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        shutil.copy(path, copy)
        flip(copy / "index.json", place)
        try:
            read_index(copy)
        except CheckpointError:
            refused = True
        assert refused, f"byte {place} of index.json can be changed"


def kinds_that_nobody_knows() -> None:
    def rewrite(folder: Path, kinds: list[str]) -> None:
        index = read_index(folder)
        index["kinds"] = kinds
        write_index(folder, index, index.pop("files"))

    for kinds in (["exp_avg", "weight"], ["weight", "momentum"], []):
        refuses(lambda folder: rewrite(folder, kinds), f"holds weight, .*, or weight alone, not '{', '.join(kinds)}'$")


def folder_that_is_no_checkpoint() -> None:
    refuses(lambda folder: (folder / "index.json").unlink(), "is no checkpoint: it holds no index.json")
    root = FOLDER / "points_nowhere"
    on_first(lambda: root.mkdir())
    on_first(lambda: (root / "latest").write_text("step-00000007\n"))
    with pytest.raises(CheckpointError, match="latest names step-00000007, which is no checkpoint; name one by"):
        find_checkpoint(root)


def ranks_that_see_different_checkpoints() -> None:
    """Both whole, of the same update and model: as where one node still sees what another has replaced."""
    asked = tiny.recipe("train.seed=7", expert_parallel=2)
    engine = tiny.engine_for(asked, RANKS)
    before = tiny.global_arrays(engine)
    folder = (ONE if RANKS.is_first else TWO_BY_TWO) / "step-00000003"
    message = (
        r"^the ranks see different checkpoints; name one with --resume PATH:\n"
        r"rank 0: update 3 in .*/one/step-00000003, checksum \w{32}\n"
        r"rank 1: update 3 in .*/two_by_two/step-00000003, checksum \w{32}$"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(engine, folder)
    tiny.same(tiny.global_arrays(engine), before)


def one_rank_that_cannot_go_on_reading_ends_all() -> None:
    engine = tiny.engine_for(tiny.recipe(expert_parallel=2), RANKS)
    if RANKS.rank == 1:
        flat = engine.optimizer.single_partition_of_fp32_groups[0]
        engine.optimizer.optimizer.state[flat]["exp_avg"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="^rank 1: .*exceeds dimension size"):
        load_checkpoint(engine, TWO_BY_TWO / "step-00000003")


def dynamic_scale_goes_on_from_a_dynamic_one_alone() -> None:
    """fp16 itself needs a GPU; its scaler does not."""

    def scaled(folder: Path | None, scale: float) -> Any:
        asked = tiny.recipe(expert_parallel=2, precision="bf16")
        engine = tiny.engine_for(asked, RANKS)
        engine.optimizer.loss_scaler = DynamicLossScaler(
            scale, scale_window=1000, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False
        )
        engine.optimizer.dynamic_loss_scale = True
        if folder:
            load_checkpoint(engine, folder)
        return engine

    _, fixed = trained(2, 0, "bf16")
    folder = save(fixed, FOLDER / "fixed_scale", 1)
    assert read_index(folder)["loss_scaler"] == {"dynamic": False, "cur_scale": 1.0}
    dynamic = scaled(folder, 512.0)
    assert optimizer_facts(dynamic)["loss_scaler"]["cur_scale"] == 512.0
    dynamic.optimizer.loss_scaler.cur_iter = 70
    folder = save(dynamic, FOLDER / "dynamic_scale", 1)
    expected = {"dynamic": True, "cur_scale": 512.0, "cur_iter": 70, "last_overflow_iter": -1, "cur_hysteresis": 2}
    assert optimizer_facts(scaled(folder, 8.0))["loss_scaler"] == expected
    _, again = resumed(2, folder, "bf16")
    assert optimizer_facts(again)["loss_scaler"] == {"dynamic": False, "cur_scale": 1.0}


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (FOLDER / "exploded",))


def pickles_are_never_executed() -> None:
    bomb = pickle.dumps(Bomb())

    def plant_beside(folder: Path) -> None:
        for name in ("rank-00002-of-00003.safetensors", "mp_rank_00_model_states.pt", "rng.pkl", "latest"):
            (folder / name).write_bytes(bomb)

    copy = FOLDER / "planted" / "step-00000003"
    on_first(lambda: shutil.copytree(TWO_BY_TWO / "step-00000003", copy))
    on_first(lambda: plant_beside(copy))
    _, engine = resumed(2, copy)
    tiny.same(tiny.global_arrays(engine), stored_arrays(copy))

    def plant_inside(folder: Path) -> None:
        """A pickle for a file of fragments, with a checksum that is right."""

        def change() -> dict[str, Any]:
            (folder / SECOND).write_bytes(bomb)
            return {"bytes": len(bomb), "header": len(bomb), "chunks": [digest(bomb)]}

        _rewrite(folder, change)

    refuses(plant_inside, "(?i)header")
    refuses(lambda folder: (folder / "index.json").write_bytes(bomb), "index.json is damaged")
    assert not (FOLDER / "exploded").exists()
    dist.barrier()
    pickle.loads(bomb)  # it is a bomb
    assert (FOLDER / "exploded").exists()


PARTS: dict[str, list[Callable[[], None]]] = {
    "save": [
        files_hold_what_the_ranks_hold,
        same_layout_continues_digit_for_digit_in_fp32,
        same_layout_continues_digit_for_digit_in_bf16,
        checkpoint_before_the_first_update,
        loads_without_expert_parallelism,
        weights_alone_go_on_with_a_new_optimizer,
    ],
    "one": [one_rank_loads_what_two_saved],
    "back": [
        two_ranks_load_what_one_saved,
        latest_moves_last,
        old_one_that_cannot_be_deleted_is_warned_of_and_tried_again,
        old_ones_are_deleted_and_later_ones_do_not_count,
        half_written_folders_are_ignored_and_cleared,
        failed_save_is_known_to_all_ranks_and_leaves_the_one_before,
        bytes_that_change_on_the_way_to_the_disk_are_found,
        ranks_that_do_not_share_the_folder_are_found_out,
        folder_that_cannot_be_made,
        damaged_byte,
        truncated_file,
        missing_file,
        missing_fragment,
        another_models_shapes,
        newer_format,
        damaged_index,
        kinds_that_nobody_knows,
        folder_that_is_no_checkpoint,
        ranks_that_see_different_checkpoints,
        one_rank_that_cannot_go_on_reading_ends_all,
        dynamic_scale_goes_on_from_a_dynamic_one_alone,
        pickles_are_never_executed,
    ],
}

if __name__ == "__main__":
    checks.run(PARTS[sys.argv[2]])
