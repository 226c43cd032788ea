"""How much of the saving that MoE++ promises its experts deliver (`moepp bench experts`).

A layer's experts from the routing on: rows to the FFN experts, their products, the zero-computation experts, and all of
it back to the tokens, weighted. The rival is the vanilla twin: the same code and FFN weights, where every assignment
goes to an FFN expert. Routing is forced and balanced, with the share of the FFN experts that tau implies, so that the
ideal is known: (tau N_FFN + N_ZC) / (tau N_FFN). All take turns in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moepp_ds.bench.cases import Case, Graph, behind_router, in_words, machine, measure, random_layer, vanilla
from moepp_ds.bench.presets import LayerSizes
from moepp_ds.bench.routes import Routes, forced_routes, ideal_speedup
from moepp_ds.moe_layer import LayerSettings, MoELayer
from moepp_ds.router import RouterSettings
from moepp_ds.timing import ratio

VANILLA = "vanilla"


@dataclass(frozen=True)
class Row:
    """At one tau: how many times as fast as the vanilla twin, forward, and forward and backward together."""

    tau: float
    ideal: float
    measured: float
    measured_backward: float


@dataclass(frozen=True)
class ExpertsResult:
    """What was measured, and where. seconds: by direction and case, a time for each round."""

    machine: dict[str, Any]
    rows: list[Row]
    seconds: dict[str, dict[str, list[float]]]


def bench_experts(
    sizes: LayerSizes, taus: Sequence[float], *, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> ExpertsResult:
    """Measure with weights and tokens at random. Raises RecipeError for a tau that cannot be in balance."""
    torch.manual_seed(0)
    settings = LayerSettings(RouterSettings(top_k=sizes.top_k), tau=1.0, seats=None)
    layer = random_layer(sizes, sizes.kinds, settings, dtype=dtype, device=device)
    twin = random_layer(sizes, vanilla(sizes.kinds), settings, dtype=dtype, device=device)
    twin.experts = layer.experts
    x_TD = torch.randn(tokens, sizes.hidden_size, device=device).to(dtype)
    cases: dict[str, Case] = {}
    for name, owner, tau in [(VANILLA, twin, 1.0), *((f"{tau:g}", layer, tau) for tau in taus)]:
        routes = forced_routes(owner.kinds, tau=tau, tokens=tokens, top_k=sizes.top_k, device=device)
        cases[name] = experts_case(owner, routes, x_TD)
    seconds = measure(cases, repeats=repeats)
    rows = [_row(seconds, tau, ideal_speedup(sizes.kinds, tau)) for tau in taus]
    return ExpertsResult(machine(device), rows, seconds)


def _row(seconds: dict[str, dict[str, list[float]]], tau: float, ideal: float) -> Row:
    name = f"{tau:g}"
    forward, backward = seconds["forward"], seconds["forward_backward"]
    return Row(
        tau=tau,
        ideal=ideal,
        measured=ratio(forward, VANILLA, name),
        measured_backward=ratio(backward, VANILLA, name),
    )


def experts_case(layer: MoELayer, routes: Routes, x_TD: Tensor) -> Graph:
    """Gradients of everything: the weights, the tokens, and the combine weights, by which the router learns."""
    x_TD, gate_N = (tensor.detach().requires_grad_() for tensor in (x_TD, routes.gate_N))
    return Graph(
        lambda: (layer.compute(x_TD, gate_N, routes.token_N, routes.expert_N, routes.plan),),
        [x_TD, gate_N, *behind_router(layer)],
    )


def print_experts(result: ExpertsResult, console: Console) -> None:
    """A line for each tau: the ideal, what was measured, and its share of the ideal."""
    console.print(f"times as fast as the vanilla twin; {in_words(result.machine)}")
    table = Table("tau", "ideal", "forward", "of ideal", "forward + backward", "of ideal")
    for row in result.rows:
        shares = [(value, value / row.ideal) for value in (row.measured, row.measured_backward)]
        cells = [cell for value, share in shares for cell in (f"{value:.2f}", f"{share:.2f}")]
        table.add_row(f"{row.tau:g}", f"{row.ideal:.2f}", *cells)
    console.print(table)
