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
from moepp_ds.engine import Ranks
from moepp_ds.model import ModelOutput


class NonFiniteError(RuntimeError):
    """A loss or gradient that is no number; raised before the update it would have spoiled."""


@dataclass(frozen=True)
class UpdateResult:
    """Means and counts of one update over all ranks and micro batches. L MoE layers, E experts, M micro batches.

    source_rows: rows drawn from each source of the mixture.
    grad_norm: before clipping; inf where a dynamic fp16 loss scale was too large and the update was skipped.
    stop: some rank was asked to stop.
    """

    loss: float
    lm_loss: float
    balance_loss: float
    grad_norm: float
    wanted_LE: list[list[int]]
    kept_LE: list[list[int]]
    source_rows: list[int]
    stop: bool


def update(
    engine: Any, batches: Sequence[Batch], ranks: Ranks, *, rate: float, num_sources: int, stop: Callable[[], bool]
) -> UpdateResult:
    """Do one update with learning rate `rate` from this rank's micro batches. Collective.

    Losses, counts and the answers of `stop` are summed over ranks in one small all-reduce before the step. Raises
    NonFiniteError on every rank, with the weights as they were, when a loss or the gradient norm is not finite.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    outputs: list[ModelOutput] = []
    for batch in batches:
        if outputs:
            engine.step()  # between micro batches: DeepSpeed only counts it
        output = engine(torch.from_numpy(batch.tokens_BS1).to(ranks.device))
        engine.backward(output.loss)
        outputs.append(replace(output, loss=output.loss.detach()))  # lets go of the graph
    source_rows = np.bincount(np.concatenate([batch.source_B for batch in batches]), minlength=num_sources)
    sums = _sum_over_ranks(outputs, source_rows, stop=stop())
    loss, lm_loss, balance_loss = (value / (len(batches) * ranks.world) for value in sums.losses_3)
    number = engine.global_steps + 1
    if not math.isfinite(loss):
        bad_M = ~torch.stack([output.loss for output in outputs]).isfinite()
        raise NonFiniteError(f"loss of update {number} is not finite: " + _name_rows(bad_M, batches))
    engine.step()
    if engine.optimizer.overflow and not engine.fp16_enabled():
        bad_M = torch.stack([_has_bad_gradient(engine.module, batch, ranks) for batch in batches])
        raise NonFiniteError(
            f"gradient of update {number} is not finite although every loss is: " + _name_rows(bad_M, batches)
        )
    return UpdateResult(
        loss=loss,
        lm_loss=lm_loss,
        balance_loss=balance_loss,
        grad_norm=float(engine.get_global_grad_norm()),
        wanted_LE=sums.wanted_LE,
        kept_LE=sums.kept_LE,
        source_rows=sums.source_rows,
        stop=sums.stop,
    )


@dataclass(frozen=True)
class _Sums:
    """Sums over micro batches and ranks; see UpdateResult."""

    losses_3: list[float]
    stop: bool
    source_rows: list[int]
    wanted_LE: list[list[int]]
    kept_LE: list[list[int]]


def _sum_over_ranks(outputs: Sequence[ModelOutput], source_rows: np.ndarray, *, stop: bool) -> _Sums:
    """One all-reduce for everything: fp64 holds every count exactly."""
    losses_M3 = torch.stack([torch.stack([o.loss, o.lm_loss, o.balance_loss]) for o in outputs]).double()
    counts_2LE = torch.stack([torch.stack([o.wanted_LE, o.kept_LE]) for o in outputs]).sum(dim=0)
    host = losses_M3.new_tensor([float(stop), *source_rows.tolist()])
    packed = torch.cat([losses_M3.sum(dim=0), host, counts_2LE.flatten().double()])
    dist.all_reduce(packed)
    numbers = packed.tolist()
    first_count = 4 + len(source_rows)
    wanted_LE, kept_LE = packed[first_count:].view_as(counts_2LE).long().tolist()
    rows = [int(count) for count in numbers[4:first_count]]
    return _Sums(numbers[:3], numbers[3] > 0, rows, wanted_LE, kept_LE)


def _has_bad_gradient(model: torch.nn.Module, batch: Batch, ranks: Ranks) -> Tensor:
    """Whether this micro batch, alone, gives a gradient that is not finite: a bool scalar. Collective.

    Works the gradient out anew, past DeepSpeed, on weights that the skipped update left as they were. Gradients of FFN
    experts are left out: they also hold what the tokens of other ranks contributed.
    """
    replicated = [parameter for parameter in model.parameters() if getattr(parameter, "allreduce", True)]
    output: ModelOutput = model(torch.from_numpy(batch.tokens_BS1).to(ranks.device))
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
