"""Held-out loss and bits per byte of every source, worked out by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.stream import HeldOut
from moepp_ds.engine import Ranks


@dataclass(frozen=True)
class Score:
    """The model on one source's held-out text. loss: nats per token. bits_per_byte: of UTF-8 text. tokens: scored."""

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: Any, held_out: Mapping[str, HeldOut], *, ranks: Ranks, seq_len: int, micro_batch_size: int, rows: int
) -> dict[str, Score]:
    """Score the first `rows` held-out rows of each source. Collective: every rank gives the same answer.

    Rows go to ranks by micro batches in turn. Where experts live on other ranks a forward pass needs all of them, so
    every rank runs equally many; those without rows of their own run one that is not counted.
    Bits per byte take the mean bytes of a token over all of the held-out text of that source.
    """
    was_training = model.training
    model.eval()
    scores = {}
    for source, texts in held_out.items():
        tokens_BS1, counted_BS = texts.rows(seq_len, rows)
        sums = _sum_losses(model, tokens_BS1, counted_BS, ranks=ranks, micro_batch_size=micro_batch_size)
        dist.all_reduce(sums)
        nats, count = sums.tolist()
        loss = nats / count
        scores[source] = Score(loss, loss / math.log(2) / texts.bytes_per_token, int(count))
    model.train(was_training)
    return scores


def _sum_losses(
    model: Any, tokens_BS1: np.ndarray, counted_BS: np.ndarray, *, ranks: Ranks, micro_batch_size: int
) -> torch.Tensor:
    """This rank's part of (sum of nats, number of tokens), fp64 [2]."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    together = ranks.world * micro_batch_size
    for start in range(0, len(tokens_BS1), together):
        mine = slice(start + ranks.rank * micro_batch_size, start + (ranks.rank + 1) * micro_batch_size)
        tokens, counted = tokens_BS1[mine], counted_BS[mine]
        if not len(tokens):
            tokens, counted = tokens_BS1[:1], np.zeros_like(counted_BS[:1])
        losses_BS = model.token_losses(torch.from_numpy(tokens).to(ranks.device))
        mask_BS = torch.from_numpy(counted).to(ranks.device)
        sums += torch.stack([losses_BS.double()[mask_BS].sum(), mask_BS.sum().double()])
    return sums


def score_lines(scores: Mapping[str, Score]) -> list[str]:
    """A small table, a line per source."""
    width = max(map(len, scores), default=0)
    return [
        f"  {source:<{width}}  loss {score.loss:.4f}  {score.bits_per_byte:.4f} bits/byte  {score.tokens:,} tokens"
        for source, score in scores.items()
    ]
