"""The model and its optimizer as fragments: what this rank owns under ZeRO, by global name and place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepp_ds.checkpoint.files import MOMENTS
from moepp_ds.model import expert_offsets

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What moves a dynamic loss scale: attributes of DeepSpeed's loss scaler."""


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
    """The fragments of this rank under ZeRO 1 or 2; before the first update the moments are zeros.

    The moments are taken from the group's flat optimizer state: DeepSpeed's own link from a parameter to its
    moments is made at the first update only.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    offsets = expert_offsets(engine.module)
    zero = engine.optimizer
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups):
        state = _started_state(zero, flat)
        flats = {"weight": flat.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank owns all of it
                continue
            name, place = names[id(parameter)], mapping.hp_fragment_address
            shift = offsets[name] * parameter[0].numel() if name in offsets else 0
            views = {kind: tensor.narrow(0, place.start, place.numel) for kind, tensor in flats.items()}
            yield Fragment(name, shift + mapping.lp_fragment_address.start, views)


def _started_state(zero: Any, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one group, made as its first update would make it where that has not come yet."""
    state = zero.optimizer.state[flat]
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(flat)
    state.setdefault("step", torch.zeros((), dtype=torch.float32, device=flat.device))
    return state


def optimizer_facts(engine: Any) -> dict[str, Any]:
    """The optimizer's numbers that are the same on every rank.

    updates: AdamW's count, behind the run's where fp16 skipped some. loss_scaler: whether its scale is dynamic, and
    all that moves it.
    """
    zero = engine.optimizer
    first = zero.single_partition_of_fp32_groups[0]
    scaler = vars(zero.loss_scaler)
    return {
        "updates": int(_started_state(zero, first)["step"]),
        "loss_scaler": {
            "dynamic": bool(zero.dynamic_loss_scale),
            **{name: scaler[name] for name in SCALER if name in scaler},
        },
    }


def restore_optimizer_facts(engine: Any, facts: Mapping[str, Any]) -> None:
    """Put back what `optimizer_facts` returned; a dynamic scale goes on only from another dynamic one.

    So fp16 that continues a bf16 run starts at its own first scale, and not at the 1 that bf16 stands for.
    """
    zero, scaler = engine.optimizer, facts["loss_scaler"]
    for flat in zero.single_partition_of_fp32_groups:
        _started_state(zero, flat)["step"].fill_(facts["updates"])
    if zero.dynamic_loss_scale and scaler["dynamic"]:
        for name in SCALER:
            setattr(zero.loss_scaler, name, scaler[name])
