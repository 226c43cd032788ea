"""Checkpoints that belong to no layout.

A checkpoint is the model as one list of named flat arrays, whatever ranks it came from. Under ZeRO each
rank owns, of some parameters, a range of the fp32 weight and of AdamW's two moments. It writes these
fragments under the parameter's global name and the range's place in the global, flattened parameter; a
stacked parameter of FFN experts is global over all experts, so expert parallelism only shifts the place. A
rank that loads reads whatever ranges it now owns.

    checkpoints/step-00000200/            made as .step-00000200.partial, renamed when complete
        index.json                        format, step, recipe, data position, parameter sizes, checksums of
                                          every file and of itself
        rank-00000-of-00002.safetensors   tensors `weight|<name>|<start>`, `exp_avg|...`, `exp_avg_sq|...`,
                                          all of them 1-D and fp32
    checkpoints/latest                    the name of the newest complete one

What fails on one rank fails on all: a save that fails leaves the checkpoints before it as they were, and a
load that is refused has changed nothing. No file holds a pickle, and loading runs no code from the files.

* `fragments` the live optimizer as fragments, the one part that knows DeepSpeed
* `files`     the format on disk
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moepp_ds.agreement import agreed_message, all_or_none, gather
from moepp_ds.checkpoint.files import (
    CheckpointError,
    check_whole,
    delete_old,
    find_checkpoint,
    find_pieces,
    publish,
    read_index,
    read_range,
    shape_differences,
    verify_files,
    write_fragments,
    write_index,
)
from moepp_ds.checkpoint.fragments import (
    KINDS,
    global_shapes,
    optimizer_facts,
    owned_fragments,
    restore_optimizer_facts,
)

__all__ = ["CheckpointError", "find_checkpoint", "load_checkpoint", "read_index", "save_checkpoint"]


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
                shapes = global_shapes(engine)
                write_index(partial, {"step": step, **optimizer_facts(engine), **facts, "parameters": shapes}, files)
                publish(partial, final)
                delete_old(final, keep=keep)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"no checkpoint of update {step}: {error}") from error
    return final


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any]:
    """Load weights and optimizer state into the engine, on any layout; return the index. Collective.

    Before anything is changed, the ranks are found to see the same checkpoint, every file is checked against its
    checksums (each rank checks its share of the files), and every parameter is found to be there as a whole.
    Raises CheckpointError on every rank. A load that is refused by these checks has changed nothing; one that fails
    after them, reading, leaves some fragments changed: the engine cannot be used then.
    """
    shapes = global_shapes(engine)
    with all_or_none(CheckpointError):
        index = read_index(folder)
        if shapes != index["parameters"]:
            differences = shape_differences(index["parameters"], shapes)
            raise CheckpointError(f"{folder} holds another model:\n{differences}")
    _check_same_for_all(folder, index)
    with all_or_none(CheckpointError):
        verify_files(folder, index["files"], rank=dist.get_rank(), world=dist.get_world_size())
    with all_or_none(CheckpointError):
        pieces = find_pieces(folder, index["files"])
        check_whole(pieces, shapes, KINDS)
    with all_or_none(CheckpointError):
        for fragment in owned_fragments(engine):
            for kind, tensor in fragment.tensors.items():
                read_range(tensor, fragment.start, pieces[kind, fragment.name])
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
