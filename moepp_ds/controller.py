"""What routing remembers from one update to the next, and how it moves.

* bias_LE   added to the scores of FFN experts for selection alone, so that the load comes to what is asked for
            (LongCat-Flash, arXiv 2509.01322; with the rule `sign`, DeepSeek-V3's balancing, arXiv 2412.19437)
* share_LE  the load of the whole previous update, where the balance loss counts over the global batch

Both follow from counts over all ranks, so every rank holds the same, whatever the layout. A forward pass is given
them; no module keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepp_ds.config import MoEConfig

Numbers = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RoutingInputs:
    """What a forward pass is told beside its tokens. L MoE layers.

    bias_LE: fp32, or None for no controller. share_LE: choices per token of the previous update, fp32, or None to
    count in the micro batch. seed, first_row: what jitter is drawn from; the number in the stream of the first row.
    """

    bias_LE: Tensor | None = None
    share_LE: Tensor | None = None
    seed: int = 0
    first_row: int = 0


@dataclass(frozen=True)
class RoutingState:
    """The numbers themselves, float64 on the host. None where the recipe does not use them, or not yet."""

    bias_LE: Numbers | None = None
    share_LE: Numbers | None = None

    def inputs(self, *, seed: int, first_row: int, device: torch.device) -> RoutingInputs:
        """For the micro batch that begins at `first_row` of the stream."""
        bias_LE, share_LE = (
            None if numbers is None else torch.tensor(numbers, dtype=torch.float32, device=device)
            for numbers in (self.bias_LE, self.share_LE)
        )
        return RoutingInputs(bias_LE=bias_LE, share_LE=share_LE, seed=seed, first_row=first_row)

    def facts(self) -> dict[str, Any]:
        """As JSON, for a checkpoint; every number survives."""
        return {"bias_LE": self.bias_LE, "share_LE": self.share_LE}


def first_state(moe: MoEConfig, num_layers: int) -> RoutingState:
    """Before the first update of `num_layers` MoE layers."""
    return RoutingState(bias_LE=None if moe.controller is None else ((0.0,) * moe.num_experts,) * num_layers)


def restored_state(facts: Mapping[str, Any] | None, moe: MoEConfig, num_layers: int) -> RoutingState:
    """The state that a checkpoint holds; what it lacks starts as in a new run, what the recipe does not use is left."""
    state = first_state(moe, num_layers)
    if facts is None:
        return state
    bias_LE, share_LE = (
        None if facts[key] is None else tuple(tuple(map(float, row)) for row in facts[key])
        for key in ("bias_LE", "share_LE")
    )
    for key, numbers in (("bias_LE", bias_LE), ("share_LE", share_LE)):
        if numbers is not None and [len(row) for row in numbers] != [moe.num_experts] * num_layers:
            raise ValueError(
                f"{key} of the checkpoint has {[len(row) for row in numbers]} numbers by layer, the model has "
                f"{num_layers} MoE layers of {moe.num_experts} experts; its index is damaged, use another checkpoint"
            )
    return RoutingState(
        bias_LE=None if moe.controller is None else bias_LE or state.bias_LE,
        share_LE=share_LE if moe.balance_scope == "global_batch" else None,
    )


def next_state(
    state: RoutingState, moe: MoEConfig, *, wanted_LE: Tensor, first_LE: Tensor, tokens: int, rate: float
) -> RoutingState:
    """The state after an update of `tokens` tokens, from counts over all ranks and micro batches.

    wanted_LE, first_LE: assignments per layer and expert, before seats, and first choices among them.
    rate: by how much a bias moves, `config.controller_rate`.
    """
    share_LE = bias_LE = None
    if moe.balance_scope == "global_batch":
        counted_LE = wanted_LE if moe.balance_counts == "all" else first_LE
        share_LE = _numbers(counted_LE.double() / tokens)
    if moe.controller is not None:
        assert state.bias_LE is not None
        wanted = moe.mean_ffn_experts / moe.num_ffn_experts
        bias_LE = tuple(
            _moved(bias_E, load_E, moe, wanted=wanted, rate=rate)
            for bias_E, load_E in zip(state.bias_LE, _numbers(wanted_LE.double() / tokens))
        )
    return RoutingState(bias_LE=bias_LE, share_LE=share_LE)


def _moved(
    bias_E: tuple[float, ...], load_E: tuple[float, ...], moe: MoEConfig, *, wanted: float, rate: float
) -> tuple[float, ...]:
    """One layer's biases after an update; `load_E` are choices per token, `wanted` those each FFN expert should have.

    b_i += mu ((K_e / K) (1 / N_FFN) - T_i / (K T))   for FFN experts, 0 for the others   (LongCat-Flash)
    with K the mean choices per token, which with a threshold is a measured number.
    """
    assert moe.controller is not None
    choices = sum(load_E)
    steps = [(wanted - load) / choices for load in load_E[: moe.num_ffn_experts]]
    if moe.controller.rule == "sign":
        steps = [math.copysign(1.0, step) if step else 0.0 for step in steps]
    moved = [bias + rate * step for bias, step in zip(bias_E, steps)]
    return (*moved, *(0.0 for _ in range(moe.num_zero_computation)))


def _numbers(tensor_LE: Tensor) -> Numbers:
    return tuple(tuple(row) for row in tensor_LE.tolist())
