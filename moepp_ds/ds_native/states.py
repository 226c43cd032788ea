"""What a model's and an optimizer's state of DeepSpeed must hold, checked where they enter; its other keys are left."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from torch import Tensor

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.ds_native.reading import Address, Scaler, read_file


def _plain(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError("it is no plain tensor")
    return tensor.detach()


def _flat(tensor: Tensor) -> Tensor:
    if tensor.ndim != 1 or not tensor.is_floating_point():
        raise ValueError(f"it has {tensor.ndim} axes of {tensor.dtype} and not one of floating point numbers")
    return tensor


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu" else value


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Plain = Annotated[Tensor, AfterValidator(_plain)]
Flat = Annotated[Plain, AfterValidator(_flat)]
Step = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]


class _State(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)


class ModelState(_State):
    """Of mp_rank_00_model_states.pt. module: parameters and buffers but those of experts, in the model's dtype.

    param_shapes: of rank 0, for every group of the optimizer in the order of its flat array; None without ZeRO.
    shared_params: names of parameters that are another one too, and which.
    """

    module: dict[str, Plain]
    buffer_names: list[str] = []
    param_shapes: list[dict[str, tuple[Count, ...]]] | None
    shared_params: dict[str, str] | None = None
    global_steps: Count
    dp_world_size: Positive
    num_experts: list[Positive] = []
    ds_autoep_layers: list[Any] | None = None
    ds_config: Any = None
    ds_version: str

    @property
    def round_robin(self) -> bool:
        """Whether the flat arrays have their parameters in an order that spreads neighbours over the ranks."""
        zero = self.ds_config.get("zero_optimization") if isinstance(self.ds_config, dict) else None
        return isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))


class _Expert(_State):
    """Of layer_L_expert_E_mp_rank_00_model_states.pt."""

    tensors: dict[str, Plain]


class _Group(_State):
    """Settings of a group of the optimizer."""

    betas: tuple[float, float] | None = None


class Moments(_State):
    """Of one flat array. An optimizer that is no AdamW has other keys, and none of these."""

    step: Step | None = None
    exp_avg: Flat | None = None
    exp_avg_sq: Flat | None = None


class _Base(_State):
    state: dict[int, Moments]
    param_groups: list[_Group]


class Partition(_State):
    """One rank's part of the optimizer, of zero_pp_rank_R_mp_rank_00_optim_states.pt; a list has an entry per group.

    single_partition_of_fp32_groups: without the padding at the end of the last partitions, which group_paddings counts.
    param_alignment_paddings: elements behind each parameter. partition_count: ranks that share the flat array.
    param_slice_mappings: where the pieces of parameters are in this partition, by the rank's own names.
    """

    base_optimizer_state: _Base | list[Moments]
    single_partition_of_fp32_groups: list[Flat]
    group_paddings: list[Count]
    param_alignment_paddings: list[list[Count]] | None = None
    partition_count: list[Positive]
    param_slice_mappings: list[dict[str, Address]]
    zero_stage: Annotated[int, Field(ge=1, le=2)]
    loss_scaler: Scaler
    dynamic_loss_scale: bool

    def moments(self, group: int) -> Moments:
        """The optimizer's state of one group's flat array; empty before its first update."""
        base = self.base_optimizer_state
        if isinstance(base, list):  # of `elastic_checkpoint`
            return base[group] if group < len(base) else Moments()
        return base.state.get(group, Moments())

    @property
    def num_groups(self) -> int:
        """Groups of the optimizer; all lists here must have an entry for each."""
        return len(self.single_partition_of_fp32_groups)

    @model_validator(mode="after")
    def _has_all_groups(self) -> Partition:
        paddings = self.param_alignment_paddings
        lists: list[Sized] = [self.group_paddings, self.partition_count, self.param_slice_mappings]
        if {len(values) for values in [*lists, *([] if paddings is None else [paddings])]} != {self.num_groups}:
            raise ValueError("its lists have entries for different numbers of groups")
        return self

    @property
    def betas(self) -> set[tuple[float, float]]:
        """What the moments' running means were made with, where that is said."""
        base = self.base_optimizer_state
        return set() if isinstance(base, list) else {group.betas for group in base.param_groups if group.betas}


_Kind = TypeVar("_Kind", bound=_State)


def read_model(file: Path) -> ModelState:
    """The state of the model; CheckpointError if the file is none."""
    state = _validated(ModelState, read_file(file), file)
    if state.ds_autoep_layers:
        raise CheckpointError(f"{file} is of AutoEP, whose layout is not read; only experts of deepspeed.moe are")
    return state


def read_partition(file: Path) -> Partition:
    """One rank's part of the optimizer; CheckpointError if the file is none."""
    content = read_file(file)
    return _validated(Partition, content.get("optimizer_state_dict") if isinstance(content, dict) else None, file)


def read_expert(file: Path) -> dict[str, Tensor]:
    """The weights of one expert by name, under its number among all of the layer."""
    return _validated(_Expert, {"tensors": read_file(file)}, file).tensors


def _validated(kind: type[_Kind], content: Any, file: Path) -> _Kind:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        said = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(
            f"{file} is not what DeepSpeed 0.19 saves under ZeRO 1 or 2: {place}: {said}; save it again with that"
        ) from None
