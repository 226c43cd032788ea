"""Saving and loading on all ranks together: the engine's fragments to files, and files to the engine's fragments."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moepp_ds.agreement import agreed_message, all_or_none, gather
from moepp_ds.checkpoint.errors import CheckpointError
from moepp_ds.checkpoint.files import (
    KINDS,
    check_whole,
    delete_old,
    find_pieces,
    publish,
    read_index,
    read_range,
    shape_differences,
    stored_kinds,
    verify_files,
    write_fragments,
    write_index,
)
from moepp_ds.checkpoint.fragments import optimizer_facts, owned_fragments, restore_optimizer_facts
from moepp_ds.checkpoint.shapes import global_shapes


def save_checkpoint(engine: Any, root: Path, *, step: int, facts: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint of update `step` from all ranks; return its folder. Collective.

    facts: what else belongs to the run (recipe, data position, versions), stored in the index as JSON.
    keep: complete checkpoints that stay, this one included; older ones are deleted after `latest` has moved, and a
    warning tells of those that cannot be.
    Raises CheckpointError on every rank when one of them cannot write; earlier checkpoints stay as they are.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final, partial = root / f"step-{step:08d}", root / f".step-{step:08d}.partial"
    file = partial / f"rank-{rank:05d}-of-{world:05d}.safetensors"
    try:
        with all_or_none(CheckpointError):
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        with all_or_none(CheckpointError):
            partial.mkdir(parents=True, exist_ok=True)
            tensors = {
                (kind, fragment.name, fragment.start): tensor
                for fragment in owned_fragments(engine)
                for kind, tensor in fragment.tensors.items()
            }
            note = write_fragments(file, tensors)
        files = dict(gather((file.name, note)))  # not from the folder's listing, which another node may see late
        with all_or_none(CheckpointError):
            if rank == 0:
                content = {"step": step, **optimizer_facts(engine), **facts}
                shapes = global_shapes(engine.module.config)
                write_index(partial, {**content, "kinds": KINDS, "parameters": shapes}, files)
                publish(partial, final)
                delete_old(final, keep=keep)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"no checkpoint of update {step}: {error}") from error
    return final


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any]:
    """Load weights and optimizer state into the engine, on any layout; return the index. Collective.

    From a checkpoint of weights alone the optimizer starts as a new one: moments of zero, no update counted.

    Before anything is changed, the ranks are found to see the same checkpoint, every file is checked against its
    checksums (each rank checks its share of the files), and every parameter is found to be there as a whole.
    Raises CheckpointError on every rank. A load that is refused by these checks has changed nothing; one that fails
    after them, reading, leaves some fragments changed: the engine cannot be used then.
    """
    shapes = global_shapes(engine.module.config)
    with all_or_none(CheckpointError):
        index = read_index(folder)
        if shapes != index["parameters"]:
            differences = shape_differences(index["parameters"], shapes)
            raise CheckpointError(f"{folder} holds another model:\n{differences}")
    _check_same_for_all(folder, index)
    with all_or_none(CheckpointError):
        verify_files(folder, index["files"], rank=dist.get_rank(), world=dist.get_world_size())
    with all_or_none(CheckpointError):
        kinds, pieces = stored_kinds(index), find_pieces(folder, index["files"])
        check_whole(pieces, shapes, kinds)
    with all_or_none(CheckpointError):
        for fragment in owned_fragments(engine):
            for kind, tensor in fragment.tensors.items():
                if kind in kinds:
                    read_range(tensor, fragment.start, pieces[kind, fragment.name])
                else:
                    tensor.zero_()
        restore_optimizer_facts(engine, index)
    engine.optimizer.update_lp_params()
    engine.global_steps = index["step"]
    return index


def _check_same_for_all(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse to mix two checkpoints, such as the one before and the one after a save that some node sees late."""
    seen = gather((index["checksum"], f"update {index['step']} in {folder}, checksum {index['checksum']}"))
    if len({checksum for checksum, _ in seen}) > 1:
        lines = agreed_message([description for _, description in seen])
        raise CheckpointError(f"the ranks see different checkpoints; name one with --resume PATH:\n{lines}")
