"""A whole MoE++ layer beside what a user would pick instead (`moepp bench layer`).

Router, seats, experts and combine of each layer, on the same tokens and FFN weights. The tokens are made so that every
router sends them where balance at tau wants them: no layer works on more rows than it must. All take turns in one
process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moepp_ds.bench.cases import Case, Graph, in_words, machine, measure, plain_products, random_layer, vanilla
from moepp_ds.bench.presets import LayerSizes
from moepp_ds.bench.rivals import DeepSpeedLayer, DenseLayer, MixtralLayer, PerExpertLoop
from moepp_ds.bench.routes import balanced_choices, balanced_counts, ideal_speedup, steered_tokens
from moepp_ds.kinds import ExpertKinds
from moepp_ds.moe_layer import LayerSettings, MoELayer
from moepp_ds.router import Combine, RouterSettings
from moepp_ds.timing import ratio

OWN, VANILLA, PRODUCTS, VANILLA_PRODUCTS = "MoE++", "vanilla twin", "products of MoE++", "products of twin"
LOOP, DEEPSPEED, DENSE = "per-expert loop", "DeepSpeed MoE", "dense FFN"
MIXTRAL, MIXTRAL_EAGER = "Mixtral block", "Mixtral block, eager"

CAPACITY_FACTOR = 1.1
"""Seats beyond perfect balance, of the paper's recipes; DeepSpeed computes all of them, filled or not."""


@dataclass(frozen=True)
class Row:
    """One layer: its median times, and how many times as fast as it MoE++ and the vanilla twin are.

    Names that end in `backward` are of forward and backward together.
    """

    name: str
    time: float
    time_backward: float
    own: float
    own_backward: float
    vanilla: float
    vanilla_backward: float


@dataclass(frozen=True)
class LayerResult:
    """What was measured, and where. ideal: of MoE++ over the vanilla twin. seconds: a time for each round."""

    machine: dict[str, Any]
    tau: float
    ideal: float
    rows: list[Row]
    seconds: dict[str, dict[str, list[float]]]


def bench_layer(
    sizes: LayerSizes, tau: float, *, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> LayerResult:
    """Measure every layer. Raises RecipeError for a tau that cannot be in balance."""
    cases = layer_cases(sizes, tau, tokens=tokens, dtype=dtype, device=device)
    seconds = measure(cases, repeats=repeats)
    return LayerResult(
        machine(device), tau, ideal_speedup(sizes.kinds, tau), [_row(seconds, name) for name in cases], seconds
    )


def layer_cases(
    sizes: LayerSizes, tau: float, *, tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Case]:
    """This project's layers and their rivals on the same weights and tokens, all routed in balance."""
    torch.manual_seed(0)
    both = (sizes.kinds, vanilla(sizes.kinds))
    choices = [balanced_choices(kinds, tau=tau, tokens=tokens, top_k=sizes.top_k) for kinds in both]
    x_TD, routers = steered_tokens(choices, [kinds.total for kinds in both], hidden_size=sizes.hidden_size)
    x_TD, *routers = (tensor.to(device, dtype) for tensor in (x_TD, *routers))
    layer, twin = (_layer(sizes, kinds, tau, router, dtype) for kinds, router in zip(both, routers))
    twin.experts = layer.experts
    rivals: dict[str, nn.Module] = {
        LOOP: PerExpertLoop(layer),
        DEEPSPEED: DeepSpeedLayer(layer.experts, routers[1], capacity_factor=CAPACITY_FACTOR),
        MIXTRAL: MixtralLayer(layer.experts, routers[1], top_k=sizes.top_k, implementation="grouped_mm"),
        MIXTRAL_EAGER: MixtralLayer(layer.experts, routers[1], top_k=sizes.top_k, implementation="eager"),
        DENSE: DenseLayer(layer.experts, top_k=sizes.top_k),
    }
    counts = [balanced_counts(kinds, tau, tokens * sizes.top_k)[: kinds.num_ffn] for kinds in both]
    return {
        OWN: _own(layer, x_TD),
        VANILLA: _own(twin, x_TD),
        **{name: _rival(rival, x_TD) for name, rival in rivals.items()},
        PRODUCTS: plain_products(layer.experts, counts[0]),
        VANILLA_PRODUCTS: plain_products(layer.experts, counts[1]),
    }


def _layer(sizes: LayerSizes, kinds: ExpertKinds, tau: float, weight_ED: Tensor, dtype: torch.dtype) -> MoELayer:
    """With the seats of equation 8. Where there are FFN experts alone, weights are combined as the rivals do."""
    combine: Combine = "softmax" if kinds.num_zero_computation else "renormalize_selected"
    router = RouterSettings(top_k=sizes.top_k, combine=combine)
    settings = LayerSettings(router, tau=tau, seats=_seats(sizes, kinds, tau))
    layer = random_layer(sizes, kinds, settings, dtype=dtype, device=weight_ED.device)
    with torch.no_grad():
        layer.router.weight_ED.copy_(weight_ED)
    return layer


def _seats(sizes: LayerSizes, kinds: ExpertKinds, tau: float) -> Callable[[int], list[int]]:
    def seats(num_tokens: int) -> list[int]:
        even = CAPACITY_FACTOR * num_tokens * sizes.top_k / (tau * kinds.num_ffn + kinds.num_zero_computation)
        return [math.ceil(tau * even)] * kinds.num_ffn + [math.ceil(even)] * kinds.num_zero_computation

    return seats


def own_case(sizes: LayerSizes, tau: float, *, tokens: int, dtype: torch.dtype, device: torch.device) -> Graph:
    """A MoE++ layer alone, its tokens routed in balance. Raises RecipeError for a tau that cannot be in balance."""
    torch.manual_seed(0)
    choices = [balanced_choices(sizes.kinds, tau=tau, tokens=tokens, top_k=sizes.top_k)]
    x_TD, (weight_ED,) = steered_tokens(choices, [sizes.kinds.total], hidden_size=sizes.hidden_size)
    return _own(_layer(sizes, sizes.kinds, tau, weight_ED.to(device, dtype), dtype), x_TD.to(device, dtype))


def _own(layer: MoELayer, x_TD: Tensor) -> Graph:
    """What a training step asks of a layer: the output and the balance loss."""
    x_TD = x_TD.detach().requires_grad_()

    def compute() -> tuple[Tensor, Tensor]:
        out = layer(x_TD, None)
        return out.output_TD, out.balance_loss

    return Graph(compute, [x_TD, *layer.parameters()])


def _rival(rival: nn.Module, x_TD: Tensor) -> Graph:
    x_TD = x_TD.detach().requires_grad_()

    def compute() -> tuple[Tensor, ...]:
        outputs = rival(x_TD)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return Graph(compute, [x_TD, *rival.parameters()])


def _row(seconds: dict[str, dict[str, list[float]]], name: str) -> Row:
    forward, backward = seconds["forward"], seconds["forward_backward"]
    return Row(
        name=name,
        time=median(forward[name]),
        time_backward=median(backward[name]),
        own=ratio(forward, name, OWN),
        own_backward=ratio(backward, name, OWN),
        vanilla=ratio(forward, name, VANILLA),
        vanilla_backward=ratio(backward, name, VANILLA),
    )


def print_layer(result: LayerResult, console: Console) -> None:
    """A line for each layer; what the products alone take shows how much faster a layer could be."""
    ideal = f"MoE++ at tau {result.tau:g}, ideally {result.ideal:.2f} times as fast as the vanilla twin"
    console.print(f"{ideal}; {in_words(result.machine)}")
    table = Table("", *(head for name in ("forward", "forward + backward") for head in (name, OWN, VANILLA)))
    for row in result.rows:
        speedups = [(row.time, row.own, row.vanilla), (row.time_backward, row.own_backward, row.vanilla_backward)]
        cells = [cell for time, own, twin in speedups for cell in (f"{time:.4f} s", f"{own:.2f}x", f"{twin:.2f}x")]
        table.add_row(row.name, *cells)
    console.print(table)
    console.print("x: how many times as fast as the layer of the line")
