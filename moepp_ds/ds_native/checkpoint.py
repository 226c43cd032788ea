"""A checkpoint of DeepSpeed as parameters by name: fp32 weights and moments in their shapes, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.files import MOMENTS
from moepp_ds.checkpoint.fragments import SCALER
from moepp_ds.ds_native.folder import Files, find_files, listed
from moepp_ds.ds_native.partitions import Range, Shape, count_experts, cut, with_global_experts
from moepp_ds.ds_native.states import Partition, read_expert, read_model, read_partition


class NativeCheckpoint:
    """An opened checkpoint of ZeRO 0, 1 or 2. Raises CheckpointError for one that is not whole, or not of one save.

    shapes: of every parameter by name, experts under their numbers among all, and of names that mean another one too.
    buffers: shapes of what the model keeps beside its parameters. step: updates, those that fp16 skipped included.
    """

    def __init__(self, folder: Path, tag: str | None = None) -> None:
        files = find_files(folder, tag)
        state = read_model(files.model)
        files.check_complete(world=state.dp_world_size if state.param_shapes else 0, num_experts=state.num_experts)
        self.folder, self.step, self.version = files.tag, state.global_steps, state.ds_version
        self.buffers = {n: tuple(t.shape) for n, t in state.module.items() if n in state.buffer_names}
        self._partitions = [read_partition(files.partitions[rank]) for rank in sorted(files.partitions)]
        self._stored = {**state.module, **_experts(files)}
        self._aliases = dict(state.shared_params or {})
        self._round_robin = state.round_robin
        self._ranges: dict[str, list[Range]] = {}
        self.shapes: dict[str, Shape] = {}
        self._place(state.param_shapes or [])
        self._check_names()

    def read(self, name: str, kind: str = "weight") -> Tensor:
        """One parameter's weight, exp_avg or exp_avg_sq in its shape, fp32.

        A weight that, rounded, is not what the model's own file holds is refused.
        """
        name = self._aliases.get(name, name)
        if name not in self._ranges:
            if kind != "weight":
                raise CheckpointError(f"{self.folder}: {name} is no parameter and has no {kind}; leave it out")
            return self._stored[name].detach().float()
        pieces = [_flat(self._partitions[r.rank], r.group, kind)[r.start :][: r.length] for r in self._ranges[name]]
        values = torch.cat(pieces).float()
        if values.numel() != prod(self.shapes[name]):
            raise self._mixed(f"the partitions end before {name} does")
        values = values.view(self.shapes[name])
        if kind == "weight":
            stored = self._stored[name]
            if not torch.equal(values.to(stored.dtype), stored):
                raise CheckpointError(
                    f"{self.folder}: the fp32 weights of {name} are not those of the model's own file, rounded to "
                    f"{_named(stored.dtype)}: files of two saves are mixed, or damaged"
                )
        return values

    @property
    def updates(self) -> int:
        """Updates that AdamW has counted, where `lacks_moments` finds nothing."""
        return int(next(iter(self._steps())) or 0)

    @property
    def betas(self) -> set[tuple[float, float]]:
        """What the moments are running means with, where that is said."""
        return set().union(*(partition.betas for partition in self._partitions))

    @property
    def loss_scaler(self) -> dict[str, Any]:
        """As `checkpoint.fragments.optimizer_facts` has it; a scale of which a number is missing does not go on."""
        first = self._partitions[0]
        numbers = {name: vars(first.loss_scaler).get(name) for name in SCALER}
        if not first.dynamic_loss_scale or not all(isinstance(value, (int, float)) for value in numbers.values()):
            return {"dynamic": False}
        return {"dynamic": True, **numbers}

    def lacks_moments(self) -> str | None:
        """Why the moments cannot go with the weights; None where they can."""
        if not self._partitions:
            return "under ZeRO 0 DeepSpeed saves them without the names of their parameters"
        frozen = [name for name in self.shapes if name not in self._ranges and name not in self._aliases]
        if frozen:
            return f"parameters that were frozen have none ({listed(frozen)})"
        if self._aliases:
            return f"parameters that are one there train apart here ({listed(self._aliases)})"
        for partition in self._partitions:
            for group, weight in enumerate(partition.single_partition_of_fp32_groups):
                found = [getattr(partition.moments(group), kind) for kind in MOMENTS]
                if any(values is None or values.numel() < weight.numel() for values in found):
                    return "there are none of AdamW's"
        if self._steps() == {None}:
            return "how many updates they are of is not said"
        return None

    def _steps(self) -> set[float | None]:
        groups = range(self._partitions[0].num_groups if self._partitions else 0)
        return {partition.moments(group).step for partition in self._partitions for group in groups}

    def _place(self, shapes: Sequence[Mapping[str, Shape]]) -> None:
        """Find the ranges of every parameter: as the shapes say, and as every rank noted them."""
        world, local = len(self._partitions), count_experts(name for group in shapes for name in group)
        for rank, partition in enumerate(self._partitions):
            if partition.num_groups != len(shapes):
                raise self._mixed(f"rank {rank} has other groups than the model's file")
        for group, own in enumerate(shapes):
            sharing = self._partitions[0].partition_count[group]
            ways, left = divmod(world, sharing)
            if left or (ways > 1 and not count_experts(own)):
                raise self._mixed(f"group {group} is cut for {sharing} of {world} ranks")
            for way in range(ways):
                first = {layer: way * count for layer, count in local.items()}
                named = {with_global_experts(name, first): shape for name, shape in own.items()}
                self._ranges |= self._cut(group, named, range(way, world, ways), first)
                self.shapes |= named
        if len(self._steps()) > 1:
            raise self._mixed(f"AdamW has counted {self._steps()} updates")

    def _cut(
        self, group: int, shapes: Mapping[str, Shape], ranks: Sequence[int], first: Mapping[str, int]
    ) -> dict[str, list[Range]]:
        """The ranges of the parameters in one flat array, which `ranks` share."""
        partitions = [self._partitions[rank] for rank in ranks]
        sizes = [len(p.single_partition_of_fp32_groups[group]) + p.group_paddings[group] for p in partitions]
        paddings = partitions[0].param_alignment_paddings
        try:
            found = cut(
                shapes,
                [0] * len(shapes) if paddings is None else paddings[group],
                group=group,
                size=sizes[0],
                ranks=ranks,
            )
        except ValueError as error:
            raise self._mixed(f"group {group}: {error}") from error
        if len(set(sizes)) > 1:
            raise self._mixed(f"group {group} has partitions of {sorted(set(sizes))} elements")
        if self._round_robin:
            return found  # DeepSpeed 0.19 notes the places that its parameters would have without it
        noted = {
            (with_global_experts(name, first), rank, address.start, address.numel)
            for rank, partition in zip(ranks, partitions)
            for name, address in partition.param_slice_mappings[group].items()
        }
        differing = noted ^ {(name, r.rank, r.start, r.length) for name, ranges in found.items() for r in ranges}
        if differing:
            raise self._mixed(f"ranks noted other places of {listed(sorted({name for name, *_ in differing}))}")
        return found

    def _check_names(self) -> None:
        """Every parameter of the optimizer must be in the model's own file; those that are there alone were frozen."""
        for name, shape in self.shapes.items():
            if name not in self._stored or tuple(self._stored[name].shape) != shape:
                raise self._mixed(f"the optimizer has {name} {list(shape)}, and the model's file has not")
        self.shapes |= {n: tuple(t.shape) for n, t in self._stored.items() if n not in self.buffers}
        unknown = [f"{name} for {other}" for other, name in self._aliases.items() if name not in self.shapes]
        if unknown:
            raise self._mixed(f"parameters that are another one too name {listed(unknown)}, which is not there")
        if not self._partitions:
            self._refuse_rounded()

    def _refuse_rounded(self) -> None:
        """Under ZeRO 0 the model's own file is all there is; only in fp32 does it hold the weights as they were."""
        for name in self.shapes:
            dtype = self._stored[name].dtype
            if dtype != torch.float32:
                raise CheckpointError(
                    f"{self.folder} is of ZeRO 0 and holds {name} in {_named(dtype)}; fp32 weights are read from "
                    "ZeRO 1 and 2: load it with DeepSpeed under one of these and save it again"
                )

    def _mixed(self, found: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {found}: files of two saves are mixed, or damaged")


def _experts(files: Files) -> dict[str, Tensor]:
    """The weights of all experts by name, which must say the number that the file's name says."""
    found: dict[str, Tensor] = {}
    for (_, expert), file in files.experts.items():
        for name, tensor in read_expert(file).items():
            if f".deepspeed_experts.{expert}." not in name or name in found:
                raise CheckpointError(f"{file} holds {name}, which is not of its expert: it was renamed")
            found[name] = tensor
    return found


def _flat(partition: Partition, group: int, kind: str) -> Tensor:
    if kind == "weight":
        return partition.single_partition_of_fp32_groups[group].detach()
    return getattr(partition.moments(group), kind)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
