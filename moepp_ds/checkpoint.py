"""Checkpoints that belong to no layout.

A checkpoint is the model as one list of named flat arrays, whatever ranks it came from. Under ZeRO each rank owns, of
some parameters, a range of the fp32 weight and of AdamW's two moments. It writes these fragments under the parameter's
global name and the range's place in the global, flattened parameter; a stacked parameter of FFN experts is global over
all experts, so expert parallelism only shifts the place. A rank that loads reads whatever ranges it now owns.

    checkpoints/step-00000200/            made as .step-00000200.partial, renamed when complete
        index.json                        format, step, recipe, data position, parameter sizes, files and checksums
        rank-00000-of-00002.safetensors   tensors `weight|<name>|<start>`, `exp_avg|...`, `exp_avg_sq|...`, all 1-D fp32
    checkpoints/latest                    the name of the newest complete one

Nothing is pickled, and loading runs no code from the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moepp_ds.model import expert_offsets
from moepp_ds.moe_layer import MoELayer

FORMAT = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")
CHUNK_BYTES = 16 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


@dataclass(frozen=True)
class Fragment:
    """A range of one parameter that this rank owns.

    name, start: the parameter's global name and the range's first element in the global, flattened parameter.
    tensors: views of the live optimizer's 1-D fp32 weight, exp_avg and exp_avg_sq.
    """

    name: str
    start: int
    tensors: Mapping[str, Tensor]


def owned_fragments(engine: Any) -> Iterator[Fragment]:
    """The fragments of this rank under ZeRO 1 or 2.

    The moments are taken from the group's flat optimizer state rather than from DeepSpeed's per-parameter link, which
    stays empty for parameters of expert groups.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    offsets = expert_offsets(engine.module)
    zero = engine.optimizer
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups):
        state = zero.optimizer.state[flat]
        for kind in KINDS[1:]:
            if kind not in state:  # before the first update
                state[kind] = torch.zeros_like(flat)
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=flat.device))
        flats = {"weight": flat.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank owns all of it
                continue
            name, place = names[id(parameter)], mapping.hp_fragment_address
            shift = offsets[name] * parameter[0].numel() if name in offsets else 0
            views = {kind: tensor.narrow(0, place.start, place.numel) for kind, tensor in flats.items()}
            yield Fragment(name, shift + mapping.lp_fragment_address.start, views)


def global_shapes(engine: Any) -> dict[str, list[int]]:
    """The shape of every parameter over all ranks; experts stacked."""
    num_experts = {
        f"{name}.experts.": module.kinds.num_ffn
        for name, module in engine.module.named_modules()
        if isinstance(module, MoELayer)
    }
    shapes = {}
    for name, parameter in engine.module.named_parameters():
        shape = list(parameter.shape)
        for prefix, total in num_experts.items():
            if name.startswith(prefix):
                shape[0] = total
        shapes[name] = shape
    return shapes


def save_checkpoint(engine: Any, root: Path, *, step: int, facts: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint of update `step` from all ranks; return its folder. Collective.

    facts: what else belongs to the run (recipe, data position, versions), stored in the index.
    keep: complete checkpoints that stay; older ones are deleted after `latest` has moved.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final, partial = root / f"step-{step:08d}", root / f".step-{step:08d}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    file = partial / f"rank-{rank:05d}-of-{world:05d}.safetensors"
    save_file(
        {
            f"{kind}|{fragment.name}|{fragment.start}": tensor.detach().cpu().contiguous()
            for fragment in owned_fragments(engine)
            for kind, tensor in fragment.tensors.items()
        },
        file,
    )
    _fsync(file)
    file.with_suffix(".json").write_text(json.dumps({"bytes": file.stat().st_size, "chunks": _checksums(file)}))
    dist.barrier()
    if rank == 0:
        files = {}
        for sidecar in sorted(partial.glob("rank-*.json")):
            files[sidecar.with_suffix(".safetensors").name] = json.loads(sidecar.read_text())
            sidecar.unlink()
        index = {"format": FORMAT, "step": step, **facts, "parameters": global_shapes(engine), "files": files}
        _write(partial / "index.json", json.dumps(index, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _write(root / "latest", final.name + "\n")
        _delete_old(root, keep)
    dist.barrier()
    return final


def find_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, as `latest` names it; None if there is none."""
    latest = root / "latest"
    if not latest.exists():
        return None
    folder = root / latest.read_text().strip()
    if not (folder / "index.json").exists():
        raise CheckpointError(f"{latest} names {folder.name}, which is no checkpoint; name one with --resume PATH")
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint; refuses other formats and folders that are none."""
    path = folder / "index.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it holds no index.json")
    try:
        index = json.loads(path.read_text())
        found = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}; use the version that wrote it")
    return index


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any]:
    """Load weights and optimizer state into the engine, on any layout; return the index. Collective.

    Every file is checked against its checksums (each rank checks its share of the files) before anything is changed.
    """
    index = read_index(folder)
    shapes = global_shapes(engine)
    if shapes != index["parameters"]:
        raise CheckpointError(f"{folder} holds another model:\n" + _shape_differences(index["parameters"], shapes))
    _verify_files(folder, index["files"])
    pieces = _pieces(folder, index["files"])
    for fragment in owned_fragments(engine):
        for kind, tensor in fragment.tensors.items():
            _fill(tensor, fragment, kind, pieces.get((kind, fragment.name), []))
    for flat in engine.optimizer.single_partition_of_fp32_groups:
        engine.optimizer.optimizer.state[flat]["step"].fill_(index["step"])
    engine.optimizer.update_lp_params()
    engine.global_steps = index["step"]
    return index


@dataclass(frozen=True)
class _Piece:
    """A stored range of a parameter: elements start..stop, in tensor `key` of `file`."""

    start: int
    stop: int
    key: str
    file: Path


def _pieces(folder: Path, files: Mapping[str, Any]) -> dict[tuple[str, str], list[_Piece]]:
    """Where every stored range is, by (kind, parameter); reads only the files' headers."""
    pieces: dict[tuple[str, str], list[_Piece]] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as stored:
            for key in stored.keys():
                kind, parameter, start = key.split("|")
                (length,) = stored.get_slice(key).get_shape()
                piece = _Piece(int(start), int(start) + length, key, folder / name)
                pieces.setdefault((kind, parameter), []).append(piece)
    return pieces


def _fill(target: Tensor, fragment: Fragment, kind: str, pieces: list[_Piece]) -> None:
    """Copy the stored ranges that overlap `fragment` into `target`; every element must be found."""
    stop, found = fragment.start + target.numel(), 0
    for piece in pieces:
        first, last = max(piece.start, fragment.start), min(piece.stop, stop)
        if first >= last:
            continue
        with safe_open(piece.file, framework="pt") as stored:
            values = stored.get_slice(piece.key)[first - piece.start : last - piece.start]
        target[first - fragment.start : last - fragment.start].copy_(values)
        found += last - first
    if found != target.numel():
        raise CheckpointError(
            f"{kind} of {fragment.name}: the checkpoint holds {found} of the {target.numel()} elements from "
            f"{fragment.start} on; a fragment file is missing, resume from another checkpoint"
        )


def _verify_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Each rank checks every world-th file; all ranks learn of a damaged one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    problem = ""
    for name in sorted(files)[rank::world]:
        path, expected = folder / name, files[name]
        if not path.is_file():
            problem = f"{path} is missing"
        elif path.stat().st_size != expected["bytes"]:
            problem = f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        elif _checksums(path) != expected["chunks"]:
            problem = f"{path} does not match its checksums"
    failed = torch.tensor([1.0 if problem else 0.0])
    failed = failed.to(f"{_collective_device()}")
    dist.all_reduce(failed)
    if failed.item():
        problem = problem or "a file that another rank checked is damaged"
        raise CheckpointError(f"{problem}; resume from another checkpoint with --resume PATH")


def _collective_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _checksums(path: Path) -> list[str]:
    """blake2b of every 16 MiB of a file."""
    with path.open("rb") as stream:
        return [
            hashlib.blake2b(chunk, digest_size=16).hexdigest() for chunk in iter(lambda: stream.read(CHUNK_BYTES), b"")
        ]


def _shape_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    lines = [
        f"  {name}: checkpoint {stored.get(name, 'lacks it')}, model {wanted.get(name, 'lacks it')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    return "\n".join(lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else []))


def _delete_old(root: Path, keep: int) -> None:
    complete = sorted(folder for folder in root.glob("step-*") if (folder / "index.json").exists())
    for folder in complete[:-keep]:
        shutil.rmtree(folder)


def _write(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new text, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    _fsync(partial)
    partial.rename(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

