"""What all-to-alls carry, counted where it is handed over; and what should travel, by the routing alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from moepp_ds.bench.cases import watching_layers
from moepp_ds.moe_layer import MoELayer, MoEOutput


@contextmanager
def counting_bytes() -> Iterator[list[int]]:
    """Inside, every all-to-all of rows adds to the list the bytes that this rank sends to others.

    The exchange of counts before it, as many numbers as there are experts, is not of rows.
    """
    given, sent = dist.all_to_all_single, []

    def counting(
        output: Tensor, input: Tensor, received: Any = None, splits: list[int] | None = None, **options: Any
    ) -> Any:
        if splits is not None:
            rows = sum(splits) - splits[dist.get_rank(options["group"])]
            sent.append(rows * input.shape[1] * input.itemsize)
        return given(output, input, received, splits, **options)

    dist.all_to_all_single = counting  # type: ignore[assignment]
    try:
        yield sent
    finally:
        dist.all_to_all_single = given


@contextmanager
def counting_assignments(model: nn.Module) -> Iterator[list[int]]:
    """Inside, every forward pass of a layer adds how many FFN assignments were kept whose expert is on another rank."""
    leaving: list[int] = []

    def count(layer: MoELayer, inputs: Any, output: MoEOutput) -> None:
        first, local = layer.first_local_expert, len(layer.experts.down_EFD)
        counts = output.plan.ffn_counts
        leaving.append(sum(counts) - sum(counts[first : first + local]))

    with watching_layers(model, count):
        yield leaving
