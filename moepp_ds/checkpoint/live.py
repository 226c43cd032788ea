"""Saving and loading on all ranks together: the engine's fragments to files, and files to the engine's fragments.

Saving
1. Prepare  rank 0 clears what an earlier attempt left, and every rank makes the folder `.step-N.partial`.
2. Write    each rank its own file, until the disk has it: from the live tensors while training waits, or in the
            background from a copy in host memory. Nobody waits for another rank here.
3. Prove    on a thread, while training goes on, each rank reads its file back from the disk.
4. Publish  when all ranks have proven theirs, rank 0 writes the index, renames the folder, moves `latest`, and
            deletes what is too old.

Loading
1. All ranks see the same index, of the same model; every file is there, and every parameter as a whole.
2. Each rank reads the chunks that hold its fragments, each checked when it is read.
3. The fingerprint of every parameter and expert, added up from what the ranks then hold, is the stored one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist

from moepp_ds.agreement import agreed_message, all_or_none, gather
from moepp_ds.checkpoint.chunks import prove_chunks
from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint
from moepp_ds.checkpoint.files import (
    KINDS,
    folder_name,
    partial_folder,
    publish,
    read_index,
    shape_differences,
    stored_kinds,
    write_index,
)
from moepp_ds.checkpoint.fingerprints import Fingerprints
from moepp_ds.checkpoint.fragments import Fragment, optimizer_facts, owned_fragments, restore_optimizer_facts
from moepp_ds.checkpoint.host_copies import HostCopies, Tensors
from moepp_ds.checkpoint.retention import delete, left_by_killed_saves, set_aside_old
from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.checkpoint.tensors import StoredTensors, Wanted, write_fragments


class _Write(Thread):
    """One rank's part of a save: its file and its fingerprints. What was not written in place, the thread writes."""

    def __init__(self, file: Path, tensors: Tensors, content: Mapping[str, Any]) -> None:
        super().__init__(name="checkpoint-write", daemon=True)
        self.file, self.content = file, content
        self.note: dict[str, Any] | None = None
        self.fingerprints = Fingerprints(content["parameters"])
        self.problem: Exception | None = None  # raised on all ranks by `Saver.complete`
        self._tensors = tensors

    def write(self) -> None:
        """Have the file on the disk."""
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="fingerprints") as beside:  # the disk leaves time for it
                fingerprints = beside.submit(self._add_fingerprints)
                self.note = write_fragments(self.file, self._tensors)
                fingerprints.result()
        except Exception as error:
            self.problem = error

    def run(self) -> None:
        if self.note is None and self.problem is None:
            self.write()
        try:
            if self.note is not None:
                prove_chunks(self.file, self.note)
        except Exception as error:
            self.problem = error

    def _add_fingerprints(self) -> None:
        for (kind, name, start), tensor in self._tensors.items():
            if kind == "weight":
                self.fingerprints.add(name, start, tensor)


class Saver:
    """Writes a run's checkpoints under `root`. All ranks make one and call it alike; what they call is collective.

    last: the checkpoint that the run is at: the one this saver published last, or before that the one resumed from.
    """

    def __init__(
        self,
        engine: Any,
        root: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        background: bool = False,
        resumed: Path | None = None,
    ) -> None:
        """keep: complete checkpoints that stay, the newest included, besides those of a multiple of keep_every updates.
        background: training goes on while they are written, too, and not only while they are proven.

        resumed: the checkpoint under `root` that the run goes on from.

        In the background this rank's fragments are copied to host memory, which is taken here, for good.
        """
        self.last = resumed
        self._engine, self._root, self._keep, self._keep_every = engine, root, keep, keep_every
        self._shapes = global_shapes(engine.module.config)
        self._copies = HostCopies(_live_tensors(engine)) if background else None
        self._write: _Write | None = None
        self._cleaner: Thread | None = None

    def save(self, *, step: int, facts: Mapping[str, Any]) -> None:
        """Write a checkpoint of update `step`, which a later `complete` publishes. Collective.

        facts: what else belongs to the run (recipe, data position, versions), stored in the index as JSON.
        The engine may train on when this returns. What kept a rank from writing, `complete` raises.
        Raises CheckpointError on every rank when one of them cannot begin; earlier checkpoints stay as they are, and
        nothing is left of this one. So does the end of a save before it that was not completed yet.
        """
        self.complete()
        self._join_cleaner()
        partial = partial_folder(self._root, step)
        with self._undone_on_failure(step):
            with all_or_none(CheckpointError):
                if dist.get_rank() == 0:
                    delete(left_by_killed_saves(self._root, self.last))
            with all_or_none(CheckpointError):
                partial.mkdir(parents=True, exist_ok=True)
                tensors = _live_tensors(self._engine)
                if self._copies is not None:
                    tensors = self._copies.take(tensors)
                content = {"step": step, **optimizer_facts(self._engine), **deepcopy(dict(facts)), **self._layout()}
                file = f"rank-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
                self._write = _Write(partial / file, tensors, content)
        assert self._write is not None
        if self._copies is None:
            self._write.write()
        _start(self._write)

    @property
    def ready(self) -> bool:
        """Whether this rank's part of a save has ended, well or not, and waits for `complete`."""
        return self._write is not None and not self._write.is_alive()

    def complete(self) -> Path | None:
        """Wait for what is being saved, publish it, and return its folder; None if there is nothing. Collective.

        Raises CheckpointError on every rank when one of them could not write.
        """
        if self._write is None:
            return None
        write, self._write = self._write, None
        _wait_for(write)
        partial, step = write.file.parent, write.content["step"]
        final = self._root / folder_name(step)
        with self._undone_on_failure(step):
            with all_or_none(CheckpointError):
                if write.problem is not None:
                    raise write.problem
            # Not from the folder's listing, which another node may see late.
            gathered = gather((write.file.name, write.note, write.fingerprints.sums))
            with all_or_none(CheckpointError):
                if dist.get_rank() == 0:
                    whole = Fingerprints(self._shapes)
                    whole.add_sums(sums for _, _, sums in gathered)
                    content = {**write.content, "fingerprints": whole.facts()}
                    write_index(partial, content, {name: note for name, note, _ in gathered})
                    publish(partial, final)
                    self._delete_old(final)
        self.last = final
        return final

    def close(self) -> None:
        """Wait for this rank's threads and give its memory back. A save that was not completed is not published."""
        if self._write is not None:
            _wait_for(self._write)
        self._join_cleaner()
        if self._copies is not None:
            self._copies.close()

    def _layout(self) -> dict[str, Any]:
        layout = {"world": dist.get_world_size(), "zero_stage": self._engine.zero_optimization_stage()}
        return {"kinds": list(KINDS), "layout": layout, "parameters": self._shapes}

    @contextmanager
    def _undone_on_failure(self, step: int) -> Iterator[None]:
        """Say which save failed, and leave nothing of it; all ranks come here or none."""
        try:
            yield
        except CheckpointError as error:
            self._write = None
            # Every rank: where they do not share the folder, each has one of its own.
            shutil.rmtree(partial_folder(self._root, step), ignore_errors=True)
            raise CheckpointError(f"no checkpoint of update {step}: {error}") from error

    def _delete_old(self, newest: Path) -> None:
        self._join_cleaner()
        old = set_aside_old(newest, keep=self._keep, keep_every=self._keep_every, before=self.last)
        self._cleaner = Thread(target=delete, args=(old,), name="checkpoint-clean", daemon=True)
        _start(self._cleaner)

    def _join_cleaner(self) -> None:
        if self._cleaner is not None:
            _wait_for(self._cleaner)
            self._cleaner = None


def _start(thread: Thread) -> None:
    """Have it done behind training's back, or here where no thread can be had."""
    try:
        thread.start()
    except RuntimeError:
        thread.run()


def _wait_for(thread: Thread) -> None:
    if thread.is_alive():  # also False for one that was never started
        thread.join()


def _live_tensors(engine: Any) -> Tensors:
    return {
        (kind, fragment.name, fragment.start): tensor.detach()
        for fragment in owned_fragments(engine)
        for kind, tensor in fragment.tensors.items()
    }


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any]:
    """Load weights and optimizer state into the engine, on any layout; return the index. Collective.

    From a checkpoint of weights alone the optimizer starts as a new one: moments of zero, no update counted.

    Raises on every rank DamagedCheckpoint where another checkpoint of the run may be whole, and CheckpointError where
    it would not help: one of another model, ranks that see different ones. The index, the sizes of all files and that
    no fragment is missing are checked before anything is changed. A chunk that is damaged is found when it is read;
    the engine has then been changed in part, and is whole again once another checkpoint has been loaded.
    """
    shapes = global_shapes(engine.module.config)
    with all_undamaged():
        index = read_index(folder)
        if shapes != index["parameters"]:
            differences = shape_differences(index["parameters"], shapes)
            raise CheckpointError(f"{folder} holds another model:\n{differences}")
    _check_same_for_all(folder, index)
    with all_undamaged():
        kinds, stored = stored_kinds(index), StoredTensors(folder, index["files"])
        stored.check_whole(shapes, kinds)
    with all_undamaged():
        fragments = list(owned_fragments(engine))
        stored.read(_wanted(fragments, kinds))
        restore_optimizer_facts(engine, index)
        found = Fingerprints(shapes)
        for fragment in fragments:
            found.add(fragment.name, fragment.start, fragment.tensors["weight"])
    whole = Fingerprints(shapes)
    whole.add_sums(gather(found.sums))
    with all_undamaged():
        whole.check(index["fingerprints"])
    engine.optimizer.update_lp_params()
    engine.global_steps = index["step"]
    return index


def _wanted(fragments: Iterable[Fragment], kinds: tuple[str, ...]) -> Iterator[Wanted]:
    """What a rank reads of a checkpoint; moments that it does not have become zero."""
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            if kind in kinds:
                yield Wanted(kind, fragment.name, fragment.start, tensor)
            else:
                tensor.zero_()


@contextmanager
def all_undamaged() -> Iterator[None]:
    """As `all_or_none`; what is raised is a DamagedCheckpoint if it is one for some rank. Collective."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    damaged = any(gather(isinstance(own, DamagedCheckpoint)))
    with all_or_none(DamagedCheckpoint if damaged else CheckpointError):
        if own is not None:
            raise own


def _check_same_for_all(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse to mix two checkpoints, such as the one before and the one after a save that some node sees late."""
    seen = gather((index["checksum"], f"update {index['step']} in {folder}, checksum {index['checksum']}"))
    if len({checksum for checksum, _ in seen}) > 1:
        lines = agreed_message([description for _, description in seen])
        raise CheckpointError(f"the ranks see different checkpoints; name one with --resume PATH:\n{lines}")
