"""One optimizer update: forward and backward for every micro batch, one look at all ranks' losses, then the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from moepp_ds.agreement import gather
from moepp_ds.controller import RoutingInputs, RoutingState
from moepp_ds.engine import Ranks
from moepp_ds.gradient_ratio import watch_routers
from moepp_ds.model import ModelOutput
from moepp_ds.statistics import RoutingStatistics, from_vector, to_vector


class NonFiniteError(RuntimeError):
    """A loss or gradient that is no number; raised before the update it would have spoiled."""


@dataclass(frozen=True)
class UpdateResult:
    """Means and counts of one update over all ranks and micro batches. L MoE layers, M micro batches.

    statistics: sums over all tokens of the update, on the host.
    gradient_ratio_L: of the balance loss's pull at each router to the rest; None where it was not asked for.
    source_rows: rows drawn from each source of the mixture.
    grad_norm: before clipping; inf where a dynamic fp16 loss scale was too large and the update was skipped.
    stop: some rank was asked to stop.
    """

    loss: float
    lm_loss: float
    balance_loss: float
    z_loss: float
    grad_norm: float
    statistics: RoutingStatistics
    gradient_ratio_L: list[float] | None
    source_rows: list[int]
    stop: bool


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
) -> UpdateResult:
    """Do one update with learning rate `rate` from this rank's micro batches. Collective.

    routing, seed: what the forward passes are told (`controller.RoutingInputs`). watch: measure gradient_ratio_L.
    Losses, counts and the answers of `stop` are summed over ranks in one small all-reduce before the step. Raises
    NonFiniteError on every rank, with the weights as they were, when a loss or the gradient norm is not finite.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    told = routing.inputs(seed=seed, first_row=0, device=ranks.device)
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
    source_rows = np.bincount(np.concatenate([batch.source_B for batch in batches]), minlength=num_sources)
    sums = _sum_over_ranks(outputs, source_rows, squares_L2, stop=stop())
    loss, lm_loss, balance_loss, z_loss = (value / (len(batches) * ranks.world) for value in sums.losses_4)
    number = engine.global_steps + 1
    if not math.isfinite(loss):
        bad_M = ~torch.stack([output.loss for output in outputs]).isfinite()
        raise NonFiniteError(f"loss of update {number} is not finite: " + _name_rows(bad_M, batches))
    engine.step()
    if engine.optimizer.overflow and not engine.fp16_enabled():
        bad_M = torch.stack([_has_bad_gradient(engine.module, batch, ranks, told) for batch in batches])
        raise NonFiniteError(
            f"gradient of update {number} is not finite although every loss is: " + _name_rows(bad_M, batches)
        )
    return UpdateResult(
        loss=loss,
        lm_loss=lm_loss,
        balance_loss=balance_loss,
        z_loss=z_loss,
        grad_norm=float(engine.get_global_grad_norm()),
        statistics=sums.statistics,
        gradient_ratio_L=sums.gradient_ratio_L,
        source_rows=sums.source_rows,
        stop=sums.stop,
    )


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
    stop: bool
    source_rows: list[int]
    statistics: RoutingStatistics
    gradient_ratio_L: list[float] | None


def _sum_over_ranks(
    outputs: Sequence[ModelOutput], source_rows: np.ndarray, squares_L2: Tensor | None, *, stop: bool
) -> _Sums:
    """One all-reduce for everything: fp64 holds every count exactly."""
    losses_M4 = torch.stack([torch.stack([o.loss, o.lm_loss, o.balance_loss, o.z_loss]) for o in outputs]).double()
    statistics = torch.stack([to_vector(output.statistics) for output in outputs]).sum(dim=0)
    host = losses_M4.new_tensor([float(stop), *source_rows.tolist()])
    squares = losses_M4.new_zeros(0) if squares_L2 is None else squares_L2.double().flatten()
    packed = torch.cat([losses_M4.sum(dim=0), host, statistics, squares])
    dist.all_reduce(packed)
    losses, host, statistics, squares = packed.cpu().split([4, len(host), len(statistics), len(squares)])
    stops, *rows = host.tolist()
    return _Sums(
        losses_4=losses.tolist(),
        stop=stops > 0,
        source_rows=[int(count) for count in rows],
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
    """The ranks and rows of the micro batches marked bad on any rank, and what to do. Collective."""
    starts = [batch.row_start for batch, bad in zip(batches, bad_M.tolist()) if bad]
    rows = len(batches[0].tokens_BS1)
    places = [
        f"rank {rank} rows {start} to {start + rows - 1}"
        for rank, bad_starts in enumerate(gather(starts))
        for start in bad_starts
    ]
    return (
        f"{', '.join(places) or 'an FFN expert, or the sum over ranks'}; the weights were not changed. Look at the "
        "rows with `moepp-data show`, lower train.max_lr, or resume from an earlier checkpoint"
    )
