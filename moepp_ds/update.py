"""One optimizer update: forward and backward for every micro batch, one look at all ranks' losses, then the step.

An update that the guard finds bad is not taken: DeepSpeed drops its gradients as it drops those that overflowed, and
the next update is what it would have been had this one's rows never come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from moepp_ds.agreement import gather
from moepp_ds.config import SafetyConfig
from moepp_ds.controller import RoutingInputs, RoutingState
from moepp_ds.engine import Ranks
from moepp_ds.gradient_ratio import watch_routers
from moepp_ds.guard import Guard, Kind, Verdict, judge_gradients, judge_losses
from moepp_ds.model import ModelOutput
from moepp_ds.statistics import RoutingStatistics, from_vector, to_vector

NAMED_PLACES = 8
"""Micro batches that a message names; the others are counted."""


@dataclass(frozen=True)
class Incident:
    """An update that did not reach the weights. number: of the update, from 1. reason: with the ranks and rows."""

    kind: Kind
    action: Literal["skip", "stop"]
    number: int
    reason: str


@dataclass(frozen=True)
class UpdateResult:
    """Means and counts of one update over all ranks and micro batches. L MoE layers, M micro batches.

    statistics: sums over all tokens of the update, on the host.
    gradient_ratio_L: of the balance loss's pull at each router to the rest; None where it was not asked for.
    source_rows: rows drawn from each source of the mixture.
    grad_norm: before clipping; inf where DeepSpeed did not take the step, the norm being unknown then.
    taken: whether the weights moved. guard: of the next update; like all that is remembered, the same if they did not.
    incident: why it was not taken, if the guard or its gradients forbade it; where a dynamic fp16 loss scale was too
    large, which is nobody's fault, there is none.
    stop: some rank was asked to stop. all_ready: every rank was ready.
    """

    loss: float
    lm_loss: float
    balance_loss: float
    z_loss: float
    grad_norm: float
    statistics: RoutingStatistics
    gradient_ratio_L: list[float] | None
    source_rows: list[int]
    taken: bool
    guard: Guard
    incident: Incident | None
    stop: bool
    all_ready: bool


def update(
    engine: Any,
    batches: Sequence[Batch],
    ranks: Ranks,
    *,
    rate: float,
    num_sources: int,
    stop: Callable[[], bool],
    routing: RoutingState = RoutingState(),
    seed: int = 0,
    watch: bool = False,
    guard: Guard = Guard(),
    safety: SafetyConfig = SafetyConfig(),
    ready: bool = False,
) -> UpdateResult:
    """Do one update with learning rate `rate` from this rank's micro batches. Collective.

    routing, seed: what the forward passes are told (`controller.RoutingInputs`). watch: measure gradient_ratio_L.
    guard, safety: what judges the update. ready: what `all_ready` is about.
    Losses, counts, and the answers `stop` and `ready`, are summed over ranks in one small all-reduce before the step.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    told = routing.inputs(seed=seed, first_row=0, device=ranks.device)
    outputs, squares_L2 = _run_batches(engine, batches, ranks, told, watch=watch)
    source_rows = np.bincount(np.concatenate([batch.source_B for batch in batches]), minlength=num_sources)
    sums = _sum_over_ranks(outputs, source_rows, squares_L2, flags=(stop(), ready))
    loss, lm_loss, balance_loss, z_loss = (value / (len(batches) * ranks.world) for value in sums.losses_4)
    number = engine.global_steps + 1
    verdict = judge_losses(guard, safety, loss=loss, lm_loss=lm_loss)
    bad_M: Tensor | None = None
    if verdict.action == "apply":
        can_scale_less = _can_scale_less(engine.optimizer)
        engine.step()
        if engine.optimizer.overflow and can_scale_less:
            verdict = replace(verdict, guard=guard)
        elif engine.optimizer.overflow:
            verdict = judge_gradients(guard, safety)
            bad_M = torch.stack([_has_bad_gradient(engine.module, batch, ranks, told) for batch in batches])
    else:
        bad_M = torch.stack([~output.loss.isfinite() | (output.lm_loss > verdict.bound) for output in outputs])
        with _gradients_dropped(engine.optimizer):
            engine.step()
    if engine.optimizer.overflow:
        _forget_sums(engine.optimizer)
    return UpdateResult(
        loss=loss,
        lm_loss=lm_loss,
        balance_loss=balance_loss,
        z_loss=z_loss,
        grad_norm=float(engine.get_global_grad_norm()),
        statistics=sums.statistics,
        gradient_ratio_L=sums.gradient_ratio_L,
        source_rows=sums.source_rows,
        taken=not engine.optimizer.overflow,
        guard=verdict.guard,
        incident=None if bad_M is None else _incident(verdict, number, _name_rows(bad_M, batches)),
        stop=sums.flags[0] > 0,
        all_ready=sums.flags[1] == ranks.world,
    )


def _run_batches(
    engine: Any, batches: Sequence[Batch], ranks: Ranks, told: RoutingInputs, *, watch: bool
) -> tuple[list[ModelOutput], Tensor | None]:
    """Forward and backward for each micro batch: their outputs without graph, and what watching the routers gave."""
    outputs: list[ModelOutput] = []
    squares_L2: Tensor | None = None
    for batch in batches:
        if outputs:
            engine.step()  # between micro batches: DeepSpeed only counts it
        output = _forward(engine, batch, ranks, told)
        watched = watch_routers(output, engine.module.config.moe.balance_weight) if watch else None
        engine.backward(output.loss)
        # By its own name too: else the graph's tensors live on through the next forward pass.
        output = replace(output, loss=output.loss.detach(), layers=())
        outputs.append(output)
        if watched is not None:
            squares_L2 = watched if squares_L2 is None else squares_L2 + watched
    return outputs, squares_L2


@contextmanager
def _gradients_dropped(zero: Any) -> Iterator[None]:
    """Inside, a step of DeepSpeed's optimizer drops its gradients by its own code for those that overflowed.

    It moves no weight, moment or count of updates. The loss scale stays, too: these gradients say nothing about it.
    """

    def find_overflow(partition_gradients: bool = True) -> None:
        zero.overflow = True

    checks, zero.check_grad_overflow = zero.check_grad_overflow, True
    zero.check_overflow, zero._update_scale = find_overflow, lambda has_overflow: None  # in front of the methods
    try:
        yield
    finally:
        zero.check_grad_overflow = checks
        del zero.check_overflow, zero._update_scale


def _can_scale_less(zero: Any) -> bool:
    """Whether an overflow may be the fault of fp16's loss scale: it has not fallen as low as it may.

    At the lowest one DeepSpeed would end the run with an error that names no rows.
    """
    if not zero.dynamic_loss_scale:
        return False
    zero.loss_scaler.raise_error_at_min_scale = False
    return bool(zero.loss_scaler.cur_scale > zero.loss_scaler.min_scale)


def _forget_sums(zero: Any) -> None:
    """Drop the sums of gradients over micro batches after a step that was not taken.

    DeepSpeed 0.19.8 does so itself, but for an optimizer on the host: there the next update's would be added to them.
    """
    for group in zero.averaged_gradients:
        zero.averaged_gradients[group] = None


def _forward(model: Any, batch: Batch, ranks: Ranks, told: RoutingInputs) -> ModelOutput:
    return model(_on_device(batch.tokens_BS1, ranks.device), replace(told, first_row=batch.row_start))


def _on_device(tokens_BS1: np.ndarray, device: torch.device) -> Tensor:
    """The tokens as int64 on `device`; to a GPU from pinned memory, without waiting for what it is doing."""
    tokens = torch.from_numpy(tokens_BS1)
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens.long()


@dataclass(frozen=True)
class _Sums:
    """Sums over micro batches and ranks; see UpdateResult."""

    losses_4: list[float]
    flags: list[int]
    source_rows: list[int]
    statistics: RoutingStatistics
    gradient_ratio_L: list[float] | None


def _sum_over_ranks(
    outputs: Sequence[ModelOutput], source_rows: np.ndarray, squares_L2: Tensor | None, *, flags: Sequence[bool]
) -> _Sums:
    """One all-reduce for everything: fp64 holds every count exactly."""
    losses_M4 = torch.stack([torch.stack([o.loss, o.lm_loss, o.balance_loss, o.z_loss]) for o in outputs]).double()
    statistics = torch.stack([to_vector(output.statistics) for output in outputs]).sum(dim=0)
    host = losses_M4.new_tensor([*map(float, flags), *source_rows.tolist()])
    squares = losses_M4.new_zeros(0) if squares_L2 is None else squares_L2.double().flatten()
    packed = torch.cat([losses_M4.sum(dim=0), host, statistics, squares])
    dist.all_reduce(packed)
    losses, host, statistics, squares = packed.cpu().split([4, len(host), len(statistics), len(squares)])
    counts = [int(count) for count in host.tolist()]
    return _Sums(
        losses_4=losses.tolist(),
        flags=counts[: len(flags)],
        source_rows=counts[len(flags) :],
        statistics=from_vector(statistics, outputs[0].statistics),
        gradient_ratio_L=None if squares_L2 is None else [_ratio(*pair) for pair in squares.view(-1, 2).tolist()],
    )


def _ratio(pull: float, rest: float) -> float:
    """Of two norms, from their squares."""
    return math.sqrt(pull / rest) if rest else math.inf


def _has_bad_gradient(model: torch.nn.Module, batch: Batch, ranks: Ranks, told: RoutingInputs) -> Tensor:
    """Whether this micro batch, alone, gives a gradient that is not finite: a bool scalar. Collective.

    Works the gradient out anew, past DeepSpeed, on weights that the skipped update left as they were. Gradients of FFN
    experts are left out: they also hold what the tokens of other ranks contributed.
    """
    replicated = [parameter for parameter in model.parameters() if getattr(parameter, "allreduce", True)]
    output = _forward(model, batch, ranks, told)
    gradients = torch.autograd.grad(output.loss, replicated)
    return torch.stack([~gradient.isfinite().all() for gradient in gradients]).any()


def _name_rows(bad_M: Tensor, batches: Sequence[Batch]) -> str:
    """The ranks and rows of the micro batches marked bad on any rank. Collective."""
    starts = [batch.row_start for batch, bad in zip(batches, bad_M.tolist()) if bad]
    rows = len(batches[0].tokens_BS1)
    places = [
        f"rank {rank} rows {start} to {start + rows - 1}"
        for rank, bad_starts in enumerate(gather(starts))
        for start in bad_starts
    ]
    if len(places) > NAMED_PLACES:
        places[NAMED_PLACES:] = [f"{len(places) - NAMED_PLACES} more micro batches"]
    return ", ".join(places) or "an FFN expert, or the sum over ranks"


def _incident(verdict: Verdict, number: int, places: str) -> Incident:
    assert verdict.kind is not None and verdict.action != "apply"
    reason = f"update {number} {verdict.reason}: {places}; the weights were not changed"
    return Incident(verdict.kind, verdict.action, number, reason)
