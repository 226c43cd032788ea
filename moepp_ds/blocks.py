"""Blocks of rows that stay in a processor's cache while several operations pass over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 2**19
"""Numbers in one block: 2 MiB of fp32, and work enough for a few threads. Half or twice as many is slower (Zen 4)."""


def row_blocks(shape: tuple[int, ...], device: torch.device) -> Iterator[slice]:
    """Consecutive ranges of the rows of a matrix of this shape.

    A GPU takes all at once: there a launch costs more than a pass over memory.
    """
    length, width = shape
    step = max(1, BLOCK_ELEMENTS // width) if device.type == "cpu" else max(1, length)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
