"""What a trained model's own routing saves (`moepp bench trained`).

Held-out rows go through the model of a checkpoint. In every MoE layer its experts then compute the tokens that came,
routed as the model routes them, balance or none; the rival is the vanilla twin, as in `moepp bench experts`: the same
FFN weights, and as many assignments for a token (at most one for each FFN expert), in balance. Shared experts are in
both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_pipeline.document import DataError
from data_pipeline.feed import open_held_out
from moepp_ds.bench.cases import Case, in_words, machine, measure, random_layer, vanilla, watching_layers
from moepp_ds.bench.experts import experts_case
from moepp_ds.bench.presets import LayerSizes
from moepp_ds.bench.routes import Routes, forced_routes
from moepp_ds.load import LoadedModel
from moepp_ds.moe_layer import MoELayer, MoEOutput
from moepp_ds.router import RouterSettings
from moepp_ds.timing import ratio


@dataclass(frozen=True)
class Row:
    """One MoE layer. ffn_share: of its assignments. fullest: FFN expert's load over the mean of FFN experts.

    ideal: the twin's rows of FFN experts over the layer's; measured: how many times as fast as the twin.
    """

    layer: int
    ffn_share: float
    fullest: float
    ideal: float
    measured: float
    measured_backward: float


@dataclass(frozen=True)
class TrainedResult:
    """What was measured, and where. seconds: by layer, direction and case, a time for each round."""

    machine: dict[str, Any]
    tokens: int
    rows: list[Row]
    seconds: list[dict[str, dict[str, list[float]]]]


def bench_trained(loaded: LoadedModel, *, rows: int, repeats: int) -> TrainedResult:
    """Measure with the first held-out rows of the recipe's first source. DataError where nothing was held out."""
    recipe = loaded.recipe
    held_out = open_held_out(recipe.data, rows=rows)
    if not held_out:
        raise DataError(
            f"no text was held out of the shards at {recipe.data.path}; build them with moepp-data build --held-out, "
            "or name others with --set data.path=DIR"
        )
    tokens_BS1, _ = next(iter(held_out.values())).rows(recipe.data.seq_len, rows)
    with torch.no_grad(), _seeing_layers(loaded) as seen:
        loaded.model.token_losses(torch.from_numpy(tokens_BS1).to(loaded.device), loaded.routing)
    found, seconds = [], []
    for number, (layer, x_TD, routes) in enumerate(seen):
        cases, ideal = _cases(layer, x_TD, routes)
        seconds.append(measure(cases, repeats=repeats))
        counts = routes.plan.ffn_counts
        found.append(
            Row(
                layer=number,
                ffn_share=sum(counts) / len(routes.token_N),
                fullest=max(counts) * len(counts) / max(1, sum(counts)),
                ideal=ideal,
                measured=ratio(seconds[-1]["forward"], "vanilla", "trained"),
                measured_backward=ratio(seconds[-1]["forward_backward"], "vanilla", "trained"),
            )
        )
    return TrainedResult(machine(loaded.device), tokens_BS1[:, 1:].size, found, seconds)


@contextmanager
def _seeing_layers(loaded: LoadedModel) -> Iterator[list[tuple[MoELayer, Tensor, Routes]]]:
    """Inside, every forward pass of a MoE layer is noted with its tokens and where they went."""
    seen: list[tuple[MoELayer, Tensor, Routes]] = []

    def note(layer: MoELayer, inputs: tuple[Any, ...], output: MoEOutput) -> None:
        routing = output.routing
        routes = Routes(routing.gate_N, routing.token_N, routing.expert_N, output.plan)
        seen.append((layer, inputs[0], routes))

    with watching_layers(loaded.model, note):
        yield seen


def _cases(layer: MoELayer, x_TD: Tensor, routes: Routes) -> tuple[dict[str, Case], float]:
    """The layer and its twin; and how much more FFN experts of the twin have to do."""
    for parameter in layer.parameters():
        parameter.requires_grad_()
    hidden, inner = layer.experts.gate_up_EDG.shape[1], layer.experts.down_EFD.shape[1]
    # with a threshold tokens differ: as many as they ask for on average, at most all that the twin has
    top_k = layer.settings.router.top_k or max(1, round(len(routes.token_N) / len(x_TD)))
    top_k = min(top_k, layer.kinds.num_ffn)
    settings = replace(layer.settings, router=RouterSettings(top_k=top_k), tau=1.0, seats=None)
    sizes = LayerSizes(hidden, inner, layer.kinds, top_k)
    twin = random_layer(sizes, vanilla(layer.kinds), settings, dtype=x_TD.dtype, device=x_TD.device)
    twin.experts, twin.shared, twin.shared_gate_D = layer.experts, layer.shared, layer.shared_gate_D
    forced = forced_routes(twin.kinds, tau=1.0, tokens=len(x_TD), top_k=top_k, device=x_TD.device)
    cases: dict[str, Case] = {
        "trained": experts_case(layer, routes, x_TD),
        "vanilla": experts_case(twin, forced, x_TD),
    }
    shared = len(x_TD) * layer.settings.shared_ffn_hidden_size / inner
    return cases, (top_k * len(x_TD) + shared) / max(1, sum(routes.plan.ffn_counts) + shared)


def print_trained(result: TrainedResult, console: Console) -> None:
    """A line for each MoE layer."""
    console.print(f"{result.tokens:,} held-out tokens, times as fast as the vanilla twin; {in_words(result.machine)}")
    table = Table("MoE layer", "FFN share", "fullest", "ideal", "forward", "of ideal", "forward + backward", "of ideal")
    for row in result.rows:
        shares = [(value, value / row.ideal) for value in (row.measured, row.measured_backward)]
        cells = [f"{number:.2f}" for pair in shares for number in pair]
        table.add_row(str(row.layer), f"{row.ffn_share:.3f}", f"{row.fullest:.2f}", f"{row.ideal:.2f}", *cells)
    console.print(table)
