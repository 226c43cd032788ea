"""Checks of saves in the background, of fingerprints and of damage, in real ranks; tests/test_checkpoint_saver.py.

    ... --module tests.programs.saver_checks FOLDER CORRUPTIONS
"""

from __future__ import annotations

import random
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.errors import DamagedCheckpoint
from moepp_ds.checkpoint.files import candidates, find_checkpoint, read_index, write_index
from moepp_ds.checkpoint.live import Saver, load_checkpoint
from moepp_ds.checkpoint.tensors import write_fragments
from moepp_ds.checkpoint.verify import find_damage
from tests.programs import checks, tiny
from tests.programs.checkpoint_checks import (
    FACTS,
    FOLDER,
    RANKS,
    SECOND,
    files_of_at_most,
    flip,
    on_first,
    stored_arrays,
    trained,
    wait_until,
    watching,
)


@contextmanager
def saving(engine: Any, name: str, *, keep: int = 9) -> Iterator[tuple[Saver, Path]]:
    """A saver that writes in the background, and its folder."""
    saver = Saver(engine, FOLDER / name, keep=keep, background=True)
    try:
        yield saver, FOLDER / name
    finally:
        saver.close()


@contextmanager
def held_up(what: str, prefix: str) -> Iterator[threading.Event]:
    """Other threads of this rank wait before they do `what` to a name that begins so, until the event is set."""
    go_on = threading.Event()

    def hold(event: str, names: list[str]) -> None:
        if event == what and names[0].startswith(prefix) and threading.current_thread() is not threading.main_thread():
            assert go_on.wait(30)

    with watching(hold):
        try:
            yield go_on
        finally:
            go_on.set()


def background_save_is_of_the_moment_it_was_asked_for() -> None:
    """However far training has gone on when the bytes are written; and nothing is to be seen before `complete`."""
    asked, engine = trained(2, 1)
    with saving(engine, "moment") as (saver, root):
        assert not saver.ready and saver.complete() is None and saver.last is None
        arrays = tiny.global_arrays(engine)
        with held_up("open", "rank-") as go_on:
            saver.save(step=1, facts=FACTS)
            assert not saver.ready
            tiny.train(engine, asked, RANKS, [1, 2])
            assert not saver.ready and find_checkpoint(root) is None
            go_on.set()
            wait_until(lambda: saver.ready)
        dist.barrier()
        assert find_checkpoint(root) is None and saver.last is None
        folder = saver.complete()
        assert folder == saver.last == find_checkpoint(root) == root / "step-00000001"
        assert not saver.ready and saver.complete() is None
        tiny.same(stored_arrays(folder), arrays)
        assert read_index(folder)["updates"] == 1
        saver.save(step=3, facts=FACTS)  # from the same memory
        assert saver.complete() == root / "step-00000003"
        tiny.same(stored_arrays(root / "step-00000003"), tiny.global_arrays(engine))


def next_save_completes_the_one_before() -> None:
    asked, engine = trained(2, 1)
    with saving(engine, "next") as (saver, root):
        saver.save(step=1, facts=FACTS)
        saver.save(step=2, facts=FACTS)
        assert saver.last == find_checkpoint(root) == root / "step-00000001"
        dist.barrier()
        assert saver.complete() == find_checkpoint(root) == root / "step-00000002"


def failed_background_save_is_known_to_all_ranks_when_it_is_completed() -> None:
    asked, engine = trained(2, 1)
    with saving(engine, "failed") as (saver, root):
        saver.save(step=1, facts=FACTS)
        folder = saver.complete()
        for rank in (0, 1):
            with files_of_at_most(20000, rank=rank):
                saver.save(step=2, facts=FACTS)
                wait_until(lambda: saver.ready)
                with pytest.raises(CheckpointError, match=f"^no checkpoint of update 2: rank {rank}: .*cannot be"):
                    saver.complete()
            dist.barrier()
            assert saver.complete() is None and saver.last == find_checkpoint(root) == folder
            assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]
            dist.barrier()
        tiny.train(engine, asked, RANKS, [1])
        saver.save(step=2, facts=FACTS)
        assert saver.complete() == find_checkpoint(root) == root / "step-00000002"


def old_ones_are_deleted_while_training_goes_on() -> None:
    asked, engine = trained(2, 1)
    with saving(engine, "aside", keep=1) as (saver, root):
        saver.save(step=1, facts=FACTS)
        saver.complete()
        dist.barrier()
        with held_up("rmtree", ".step-00000001.old"):
            saver.save(step=2, facts=FACTS)
            saver.complete()  # returns, although nothing can be deleted yet
            assert find_checkpoint(root) == root / "step-00000002" and not (root / "step-00000001").exists()
            dist.barrier()
            assert (root / ".step-00000001.old-0").exists()
            dist.barrier()
    dist.barrier()
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000002"]


def closed_before_it_is_complete_is_not_published() -> None:
    _, engine = trained(2, 1)
    with saving(engine, "closed") as (saver, root):
        saver.save(step=1, facts=FACTS)
    saver.close()
    dist.barrier()
    assert candidates(root) == [] and find_checkpoint(root) is None
    dist.barrier()
    with saving(engine, "closed") as (saver, root):
        saver.save(step=2, facts=FACTS)
        saver.complete()
    dist.barrier()
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000002"]


def saved(name: str) -> tuple[Any, Path]:
    """An engine after one update, and its checkpoint."""
    _, engine = trained(2, 1)
    saver = Saver(engine, FOLDER / name, keep=9)
    saver.save(step=1, facts=FACTS)
    folder = saver.complete()
    assert folder is not None
    return engine, folder


def where_no_thread_can_be_had() -> None:
    """A save fails on all ranks alike, and a checkpoint that was written is published, and makes room."""
    _, engine = trained(2, 1)
    with saving(engine, "threads", keep=1) as (saver, root):
        saver.save(step=1, facts=FACTS)
        saver.complete()
        saver.save(step=2, facts=FACTS)
        wait_until(lambda: saver.ready)
        threading.stack_size(2**47)  # more than there are addresses
        try:
            assert saver.complete() == find_checkpoint(root) == root / "step-00000002"
            dist.barrier()
            assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000002"]
            saver.save(step=3, facts=FACTS)
            with pytest.raises(CheckpointError, match="^no checkpoint of update 3: can't start new thread"):
                saver.complete()
        finally:
            threading.stack_size(0)
        saver.save(step=3, facts=FACTS)
        assert saver.complete() == root / "step-00000003"


def exchanged_experts_are_named() -> None:
    """Checksums and ranges are right, and still the weights are not the model's."""
    engine, folder = saved("exchanged")
    down, gate_up = "blocks.1.moe.experts.down_EFD", "blocks.3.moe.experts.gate_up_EDG"

    def exchange() -> None:
        index = read_index(folder)
        files = index.pop("files")
        tensors = {tuple(key.split("|")): tensor for key, tensor in load_file(folder / SECOND).items()}
        fragments = {(kind, name, int(start)): tensor.clone() for (kind, name, start), tensor in tensors.items()}
        ((_, _, start),) = [key for key in fragments if key[:2] == ("weight", down)]
        assert start == 2 * 24 * 16  # experts 2 and 3 are the second rank's
        pair = fragments["weight", down, start].view(2, -1)
        pair.copy_(pair.flip(0))
        fragments["weight", gate_up, 2 * 16 * 48][-1] += 1
        files[SECOND] = write_fragments(folder / SECOND, fragments)
        write_index(folder, index, files)

    on_first(exchange)
    with pytest.raises(DamagedCheckpoint, match="^the weights are not the ones that were saved; use another") as found:
        load_checkpoint(engine, folder)
    lines = str(found.value).splitlines()[1:]
    assert [line.partition(":")[0].strip() for line in lines] == [
        f"{down}, expert 2",
        f"{down}, expert 3",
        f"{gate_up}, expert 3",
    ]
    assert len(find_damage(folder)) == 3


def no_changed_byte_loads_silently() -> None:
    """At random places of all files, the index too: `verify` and loading both find each."""
    engine, folder = saved("corrupted")
    copy = FOLDER / "corrupted-copy" / folder.name
    on_first(lambda: shutil.copytree(folder, copy))
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    draw = random.Random(5)
    for number in range(int(sys.argv[2])):
        if number % 5 == 0:  # the index and the headers are small, and would be met by few
            name, place = list(sizes)[number // 5 % len(sizes)], draw.randrange(200)
        else:
            (name,) = draw.choices(list(sizes), list(sizes.values()))
            place = draw.randrange(sizes[name])
        file = copy / name
        on_first(lambda: flip(file, place))
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(engine, copy)
        assert find_damage(copy), f"byte {place} of {name} can be changed"
        dist.barrier()
        on_first(lambda: flip(file, place))
    load_checkpoint(engine, copy)
    tiny.same(tiny.global_arrays(engine), stored_arrays(folder))
    assert find_damage(copy) == []


def all_damage_is_listed() -> None:
    _, folder = saved("damage")
    first = folder / "rank-00000-of-00002.safetensors"

    def damage() -> None:
        flip(first, 10)
        flip(first, -1)
        (folder / SECOND).unlink()

    on_first(damage)
    header, size = read_index(folder)["files"][first.name]["header"], first.stat().st_size
    assert [line.partition(";")[0] for line in find_damage(folder)] == [
        f"{first} does not match its checksums in bytes 0 to {header}",
        f"{first} does not match its checksums in bytes {header} to {size}",
        f"{folder / SECOND} is missing",
    ]


def only_fp32_is_stored() -> None:
    with pytest.raises(CheckpointError, match="a fragment is torch.float64; checkpoints hold torch.float32"):
        write_fragments(FOLDER / f"other-{RANKS.rank}", {("weight", "a", 0): torch.zeros(2, dtype=torch.float64)})


CHECKS = [
    background_save_is_of_the_moment_it_was_asked_for,
    next_save_completes_the_one_before,
    failed_background_save_is_known_to_all_ranks_when_it_is_completed,
    old_ones_are_deleted_while_training_goes_on,
    closed_before_it_is_complete_is_not_published,
    where_no_thread_can_be_had,
    exchanged_experts_are_named,
    no_changed_byte_loads_silently,
    all_damage_is_listed,
    only_fp32_is_stored,
]

if __name__ == "__main__":
    checks.run(CHECKS)
