"""Every number that follows from a recipe, computed once, here: pure functions of the sections.

Shares and seats are worked out in exact fractions of the decimal numbers that the user wrote, so that 1.1 x
10 is 11 seats and not 12 because a binary 1.1 is a little more than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from moepp_ds.config.errors import RecipeError
from moepp_ds.config.model import ModelConfig
from moepp_ds.config.moe import MoEConfig
from moepp_ds.config.routing import ControllerConfig
from moepp_ds.config.training import ActivationCheckpointing, ParallelConfig, TrainConfig


@dataclass(frozen=True, slots=True)
class Capacity:
    """Seats of one expert for one micro batch."""

    ffn: int
    """Seats of each FFN expert."""

    zero_computation: int
    """Seats of each zero, copy and constant expert."""


def expert_capacity(moe: MoEConfig, tokens: int) -> Capacity:
    """Return the seats of each kind of expert for `tokens` tokens routed together (equation 8).

        C_FFN = gamma tau A / (tau N_FFN + N_ZC)        C_ZC = gamma A / (tau N_FFN + N_ZC)

    with A = top_k x tokens when seats are counted for assignments and A = tokens when they are counted for
    tokens, as they always are with a threshold. Both are rounded up, and lie between min_capacity and `tokens`: a
    token chooses an expert at most once. A vanilla MoE has N_ZC = 0, and tau cancels; with a threshold that is
    XMoE's gamma T / N. Raises ValueError for a dropless layer, which has no seats.
    """
    if moe.capacity_factor is None or moe.min_capacity is None:
        raise ValueError("a dropless layer has no seats; ask for them only where moe.dropless is false")
    tau = Fraction(repr(moe.tau))
    asked = tokens * (moe.top_k or 1) if moe.capacity_counts == "assignments" else tokens
    weighted_experts = tau * moe.num_ffn_experts + moe.num_zero_computation
    unit = Fraction(repr(moe.capacity_factor)) * asked / weighted_experts
    ffn, zero_computation = (min(tokens, max(moe.min_capacity, math.ceil(seats))) for seats in (tau * unit, unit))
    return Capacity(ffn=ffn, zero_computation=zero_computation)


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of the whole model, summed over ranks."""

    total: int
    """All of them."""

    activated: int
    """Those that one token is multiplied with on average (see `count_parameters`)."""


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Count the parameters of `model`.

    * embedding V D, head V D (untied), final norm D
    * each layer: two norms of D; attention of H heads and U heads of keys and values, A wide: 2 D H A + 2 D U A,
      biases (H + 2 U) A, norms of queries and keys (H + U) A over all heads or 2 A within each
    * each MoE layer: router E x D, or 8E x D + E x 8E of two layers; gating residual E x E in all but the first;
      N_FFN experts of 3 D F; shared experts of 3 D F each, their gate D; constant experts of 3 D (W_c is 2 x D, v
      is D)
    * each dense layer: one FFN of 3 D F, F its own

    Activated leaves out the embedding, of which a token reads one row, and counts all shared and
    `moe.mean_ffn_experts` routed FFN experts in a MoE layer. For a vanilla MoE that is top_k exactly; for MoE++
    it is the load that the balance loss or the controller aims at, and with a threshold the most there can be.
    """
    moe, width, layers = model.moe, model.hidden_size, model.num_moe_layers
    expert, dense = 3 * width * model.expert_ffn_hidden_size, 3 * width * model.ffn_hidden_size
    everywhere = model.num_layers * (2 * width + _attention_parameters(model)) + width
    everywhere += (model.num_layers - layers) * dense
    at_home = layers * (moe.num_constant * 3 * width + moe.num_shared_experts * expert + moe.shared_expert_gate * width)
    table = model.vocab_size * width
    for_all = everywhere + _router_parameters(model) + at_home + table
    return ParameterCounts(
        total=for_all + table + layers * moe.num_ffn_experts * expert,
        activated=for_all + round(layers * moe.mean_ffn_experts * expert),
    )


def _attention_parameters(model: ModelConfig) -> int:
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    biases = queries + 2 * keys if model.qkv_bias else 0
    norms = {"none": 0, "full": queries + keys, "per_head": 2 * model.head_dim}[model.qk_norm]
    return 2 * model.hidden_size * (queries + keys) + biases + norms


def _router_parameters(model: ModelConfig) -> int:
    """Of all MoE layers together."""
    experts, width, layers = model.moe.num_experts, model.hidden_size, model.num_moe_layers
    one = experts * width if model.moe.router.num_layers == 1 else 8 * experts * (width + experts)
    return layers * one + (layers - 1) * experts**2 * model.moe.gating_residual


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the floating point operations of one token's forward pass, on average.

    Convention: a multiply and an add are two operations; matrix products alone are counted, so no norm,
    softmax, activation or optimizer; causal attention sees (seq_len + 1) / 2 positions on average, and
    attention that stops at document ends is counted like any other; all shared experts, and routed FFN experts at
    `moe.computed_ffn_experts`; of a constant expert one score, how much more x than v counts, and v.
    Forward and backward together are three times this.
    """
    moe, width, layers = model.moe, model.hidden_size, model.num_moe_layers
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = model.num_layers * (4 * width * (queries + keys) + 2 * queries * (seq_len + 1))
    experts = layers * (moe.computed_ffn_experts + moe.num_shared_experts) * 6 * width * model.expert_ffn_hidden_size
    dense = (model.num_layers - layers) * 6 * width * model.ffn_hidden_size
    small = layers * (4 * width * moe.num_constant + 2 * width * moe.shared_expert_gate)
    return attention + 2 * _router_parameters(model) + experts + dense + small + 2 * width * model.vocab_size


def recomputed_flops_per_token(model: ModelConfig, seq_len: int, how: ActivationCheckpointing) -> float:
    """What activation checkpointing adds to a token's operations.

    `full`: another forward pass, but for routers, head and what attention ends with, the product of its outputs.
    `selective`: queries, keys and values.
    """
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    if how == "none":
        return 0.0
    if how == "selective":
        return float(model.num_layers * 2 * model.hidden_size * (queries + 2 * keys))
    outputs = model.num_layers * queries * model.hidden_size
    return flops_per_token(model, seq_len) - 2 * (
        _router_parameters(model) + outputs + model.hidden_size * model.vocab_size
    )


def journeys_of_an_assignment(how: ActivationCheckpointing) -> int:
    """How often an assignment's row, or its gradient, is sent in an update: there and back, forward and backward.

    With `full` activation checkpointing the forward journeys are made again.
    """
    return 6 if how == "full" else 4


@dataclass(frozen=True, slots=True)
class Layout:
    """How one optimizer update is cut into forward passes of ranks."""

    world: int
    """Ranks."""

    rows: int
    """Rows of one update over all ranks."""

    micro_batch_size: int
    """Rows of one forward pass of one rank."""

    accumulation_steps: int
    """Forward passes of one rank in one update."""


def plan_layout(train: TrainConfig, parallel: ParallelConfig, *, seq_len: int, world: int) -> Layout:
    """Cut the batch for `world` ranks, or raise RecipeError naming values that would fit."""
    if world < 1:
        raise RecipeError(f"a run needs at least one rank, not {world}")
    ways = parallel.expert_parallel
    rows = train.batch_tokens // seq_len
    worlds = _fitting_worlds(rows, train.micro_batch_size, ways, near=world)
    start = f"start {' or '.join(map(str, worlds))} ranks, or " if worlds else ""
    if world % ways:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        raise RecipeError(
            f"parallel.expert_parallel {ways} does not divide the world of {world} ranks; "
            f"{start}set expert_parallel to one of {', '.join(map(str, fits))}"
        )
    together = train.micro_batch_size * world
    if rows % together:
        fits = [n for n in (rows // together * together, rows // together * together + together) if n]
        raise RecipeError(
            f"batch of {rows} rows is not divisible by micro_batch_size {train.micro_batch_size} "
            f"x world {world} = {together}; {start}begin a new run with {' or '.join(map(str, fits))} rows "
            f"(train.batch_tokens = rows x seq_len = {' or '.join(str(n * seq_len) for n in fits)})"
        )
    return Layout(
        world=world,
        rows=rows,
        micro_batch_size=train.micro_batch_size,
        accumulation_steps=rows // together,
    )


def _fitting_worlds(rows: int, micro_batch_size: int, ways: int, *, near: int) -> list[int]:
    """The next smaller and the next larger number of ranks that can share a batch: what an unchanged run can go on."""
    passes = rows // micro_batch_size if rows % micro_batch_size == 0 else 0
    fits = [world for world in range(ways, passes + 1, ways) if passes % world == 0]
    return [*[world for world in fits if world < near][-1:], *[world for world in fits if world > near][:1]]


def count_steps(train: TrainConfig) -> int:
    """Return the updates of the whole run: max_steps or the batches in token_budget, whichever is less."""
    ends = [] if train.max_steps is None else [train.max_steps]
    if train.token_budget is not None:
        ends.append(train.token_budget // train.batch_tokens)
    return min(ends)


def scheduled_learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of update `step`, counted from 0.

    1. From update 0 at warmup_start_lr, a straight line to max_lr at update warmup_steps.
    2. From there half a cosine to final_lr at the last update of the run, and final_lr ever after.

    A run that ends inside its warm-up never gets to 2.
    """
    if step < train.warmup_steps:
        return train.warmup_start_lr + (train.max_lr - train.warmup_start_lr) * step / train.warmup_steps
    past, decay_steps = step - train.warmup_steps, count_steps(train) - 1 - train.warmup_steps
    done = min(1.0, past / decay_steps) if decay_steps > 0 else float(past > 0)
    return train.final_lr + (train.max_lr - train.final_lr) * 0.5 * (1.0 + math.cos(math.pi * done))


def controller_rate(controller: ControllerConfig, step: int, total_steps: int) -> float:
    """Return the controller's step mu after update `step` (from 0) of `total_steps`: a straight line.

    `rate` after the first update, `final_rate` after the last one and ever after.
    """
    done = min(1.0, step / max(1, total_steps - 1))
    return controller.rate + (controller.final_rate - controller.rate) * done
