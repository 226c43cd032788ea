"""How much of the saving that MoE++ promises its experts deliver (`moepp bench experts`).

A layer's experts from the routing on: rows to the FFN experts, their products, the zero-computation experts, and all of
it back to the tokens, weighted. The rival is the vanilla twin: the same code and FFN weights, where every assignment
goes to an FFN expert. Routing is forced and balanced, with the share of the FFN experts that tau implies, so that the
ideal is known: (tau N_FFN + N_ZC) / (tau N_FFN). All take turns in one process.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moepp_ds.bench.presets import LayerSizes
from moepp_ds.bench.routes import Routes, forced_routes, ideal_speedup
from moepp_ds.bench.timing import ratio, take_turns
from moepp_ds.kinds import ExpertKinds
from moepp_ds.moe_layer import LayerSettings, MoELayer
from moepp_ds.router import RouterSettings

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
    """What was measured, and where. seconds: of `vanilla` and of each tau, by direction, a time for each round."""

    machine: dict[str, Any]
    rows: list[Row]
    seconds: dict[str, dict[str, list[float]]]


def bench_experts(
    sizes: LayerSizes, taus: Sequence[float], *, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> ExpertsResult:
    """Measure with weights and tokens at random. Raises ValueError for a tau that cannot be in balance."""
    torch.manual_seed(0)
    layer = _layer(sizes, sizes.kinds, dtype, device)
    twin = _layer(sizes, replace(sizes.kinds, num_constant=0, num_copy=0, num_zero=0), dtype, device)
    twin.experts = layer.experts
    x_TD = torch.randn(tokens, sizes.hidden_size, device=device).to(dtype)
    forced = {"tokens": tokens, "top_k": sizes.top_k, "device": device}
    cases = {VANILLA: (twin, forced_routes(twin.kinds, tau=1.0, **forced))}  # type: ignore[arg-type]
    for tau in taus:
        cases[f"{tau:g}"] = (layer, forced_routes(layer.kinds, tau=tau, **forced))  # type: ignore[arg-type]
    seconds = {
        direction: take_turns({name: make(*case, x_TD) for name, case in cases.items()}, repeats=repeats)
        for direction, make in (("forward", _forward), ("forward_backward", _forward_backward))
    }
    rows = [
        Row(
            tau=tau,
            ideal=ideal_speedup(sizes.kinds, tau),
            measured=ratio(seconds["forward"], VANILLA, f"{tau:g}"),
            measured_backward=ratio(seconds["forward_backward"], VANILLA, f"{tau:g}"),
        )
        for tau in taus
    ]
    return ExpertsResult(_machine(device), rows, seconds)


def _layer(sizes: LayerSizes, kinds: ExpertKinds, dtype: torch.dtype, device: torch.device) -> MoELayer:
    settings = LayerSettings(RouterSettings(top_k=sizes.top_k), tau=1.0, seats=None)
    layer = MoELayer(sizes.hidden_size, sizes.ffn_hidden_size, kinds, settings, has_residual=False).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer.to(dtype)


def _forward(layer: MoELayer, routes: Routes, x_TD: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            layer.compute(x_TD, routes.gate_N, routes.token_N, routes.expert_N, routes.plan)

    return run


def _forward_backward(layer: MoELayer, routes: Routes, x_TD: torch.Tensor) -> Callable[[], object]:
    """Gradients of everything: the weights, the tokens, and the combine weights, by which the router learns."""
    x_TD, gate_N = (tensor.detach().requires_grad_() for tensor in (x_TD, routes.gate_N))
    constants = () if layer.constants is None else layer.constants.parameters()
    wanted = [x_TD, gate_N, *layer.experts.parameters(), *constants]
    back_TD = torch.randn_like(x_TD)

    def run() -> None:
        output_TD = layer.compute(x_TD, gate_N, routes.token_N, routes.expert_N, routes.plan)
        torch.autograd.grad(output_TD, wanted, back_TD)

    return run


def _machine(device: torch.device) -> dict[str, Any]:
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": cuda or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def print_experts(result: ExpertsResult, console: Console) -> None:
    """A line for each tau: the ideal, what was measured, and its share of the ideal."""
    words = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    console.print(f"times as fast as the vanilla twin; {words}")
    table = Table("tau", "ideal", "forward", "of ideal", "forward + backward", "of ideal")
    for row in result.rows:
        shares = [(value, value / row.ideal) for value in (row.measured, row.measured_backward)]
        cells = [cell for value, share in shares for cell in (f"{value:.2f}", f"{share:.2f}")]
        table.add_row(f"{row.tau:g}", f"{row.ideal:.2f}", *cells)
    console.print(table)
