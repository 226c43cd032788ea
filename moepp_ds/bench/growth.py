"""Whether a layer's cost grows as its work does: with tokens, and not with experts (`moepp bench growth`).

A whole MoE++ layer, forced balance. Tokens x 1, 2, 4, 8 with the preset's experts; then experts x 1, 2, 4, 8 of every
kind with the most tokens: a token still uses as many FFN experts of the same width, so it should cost the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moepp_ds.bench.cases import DIRECTIONS, Case, in_words, machine, measure
from moepp_ds.bench.layer import own_case
from moepp_ds.bench.presets import LayerSizes
from moepp_ds.kinds import ExpertKinds

FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Row:
    """Time per token over that of the first row of its kind. growing: `tokens`, or `experts` (the FFN experts)."""

    growing: str
    tokens: int
    num_ffn: int
    forward: float
    forward_backward: float


@dataclass(frozen=True)
class GrowthResult:
    """What was measured, and where. seconds: by kind of growth, direction and size, a time for each round."""

    machine: dict[str, Any]
    rows: list[Row]
    seconds: dict[str, dict[str, dict[str, list[float]]]]


def bench_growth(
    sizes: LayerSizes, tau: float, *, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> GrowthResult:
    """Measure from `tokens` on. Raises RecipeError for a tau that cannot be in balance."""
    most = FACTORS[-1] * tokens
    grown = {
        "tokens": [(factor * tokens, sizes) for factor in FACTORS],
        "experts": [(most, replace(sizes, kinds=_times(sizes.kinds, factor))) for factor in FACTORS],
    }
    rows, seconds = [], {}
    for growing, points in grown.items():
        cases: dict[str, Case] = {
            f"{count} tokens, {at.kinds.num_ffn} experts": own_case(at, tau, tokens=count, dtype=dtype, device=device)
            for count, at in points
        }
        seconds[growing] = measure(cases, repeats=repeats)
        per_token = {
            direction: [median(times) / count for times, (count, _) in zip(found.values(), points)]
            for direction, found in seconds[growing].items()
        }
        for number, (count, at) in enumerate(points):
            relative = {direction: found[number] / found[0] for direction, found in per_token.items()}
            rows.append(Row(growing, count, at.kinds.num_ffn, **relative))
    return GrowthResult(machine(device), rows, seconds)


def _times(kinds: ExpertKinds, factor: int) -> ExpertKinds:
    return ExpertKinds(
        num_ffn=kinds.num_ffn * factor,
        num_constant=kinds.num_constant * factor,
        num_copy=kinds.num_copy * factor,
        num_zero=kinds.num_zero * factor,
    )


def print_growth(result: GrowthResult, console: Console) -> None:
    """A line for each size."""
    console.print(f"time per token, of the first line's; {in_words(result.machine)}")
    table = Table("grows", "tokens", "FFN experts", "forward", "forward + backward")
    for row in result.rows:
        times = (f"{getattr(row, direction):.3f}" for direction in DIRECTIONS)
        table.add_row(row.growing, f"{row.tokens:,}", str(row.num_ffn), *times)
    console.print(table)
