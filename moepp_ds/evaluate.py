"""Held-out loss and bits per byte of every source, worked out by all ranks together, or by one process alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.stream import HeldOut
from moepp_ds.controller import RoutingInputs

if TYPE_CHECKING:
    from moepp_ds.engine import Ranks  # which loads DeepSpeed, and a process alone does without


@dataclass(frozen=True)
class Score:
    """The model on one source's held-out text. loss: nats per token. bits_per_byte: of UTF-8 text. tokens: scored."""

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: Any,
    held_out: Mapping[str, HeldOut],
    *,
    seq_len: int,
    micro_batch_size: int,
    rows: int,
    ranks: Ranks | None = None,
    routing: RoutingInputs | None = None,
) -> dict[str, Score]:
    """Score the first `rows` held-out rows of each source. Collective: every rank gives the same answer.

    ranks: this process among all of them; None for one that is alone. routing: the controller's biases.

    Rows go to ranks by micro batches in turn. Where experts live on other ranks a forward pass needs all of them, so
    every rank runs equally many; those without rows of their own run one that is not counted.
    Bits per byte take the mean bytes of a token over all of the held-out text of that source.
    """
    was_training = model.training
    model.eval()
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    scores = {}
    for source, texts in held_out.items():
        tokens_BS1, counted_BS = texts.rows(seq_len, rows)
        sums = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
        for start in range(0, len(tokens_BS1), world * micro_batch_size):
            mine = slice(start + rank * micro_batch_size, start + (rank + 1) * micro_batch_size)
            tokens, counted = tokens_BS1[mine], counted_BS[mine]
            if not len(tokens):
                tokens, counted = tokens_BS1[:1], np.zeros_like(counted_BS[:1])
            sums += _sum_losses(model, tokens, counted, routing, device=sums.device)
        if world > 1:
            dist.all_reduce(sums)
        nats, count = sums.tolist()
        scores[source] = _score(nats, int(count), count * texts.bytes_per_token)
    model.train(was_training)
    return scores


def _sum_losses(
    model: Any,
    tokens_BS1: np.ndarray,
    counted_BS: np.ndarray,
    routing: RoutingInputs | None,
    *,
    device: torch.device,
) -> torch.Tensor:
    """(sum of nats, number of tokens) of one micro batch, fp64 [2]."""
    losses_BS = model.token_losses(torch.from_numpy(tokens_BS1).to(device), routing)
    mask_BS = torch.from_numpy(counted_BS).to(device)
    return torch.stack([losses_BS.double()[mask_BS].sum(), mask_BS.sum().double()])


def _score(nats: float, tokens: int, text_bytes: float) -> Score:
    return Score(nats / tokens, nats / math.log(2) / text_bytes, tokens)


def overall(scores: Mapping[str, Score], held_out: Mapping[str, HeldOut]) -> Score:
    """All that was scored together: every token counts alike, and so does every byte."""
    return _score(
        sum(score.loss * score.tokens for score in scores.values()),
        sum(score.tokens for score in scores.values()),
        sum(score.tokens * held_out[source].bytes_per_token for source, score in scores.items()),
    )


def score_lines(scores: Mapping[str, Score]) -> list[str]:
    """A small table, a line per source."""
    width = max(map(len, scores), default=0)
    return [
        f"  {source:<{width}}  loss {score.loss:.4f}  {score.bits_per_byte:.4f} bits/byte  {score.tokens:,} tokens"
        for source, score in scores.items()
    ]
