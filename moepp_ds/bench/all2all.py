"""What expert parallelism costs a layer, and to the byte what it sends (`moepp bench all2all`).

Every rank has its own tokens and an equal part of the FFN experts; routing is forced and balanced. In turns:

* `plain`      as many bytes there and back as equal parts, nothing sorted: what the network needs
* `rows`       the layer's own exchange with nothing to hide behind: counts, rows, sorting by expert, and back
* `layer`      the layer's experts, zero-computation experts while rows are on their way
* `waiting`    the same, but rows are waited for at once
* `at home`    the same work on as many rows, none of which travels

The last three also with the backward pass, whose two journeys are waited for: nothing is computed in the meantime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moepp_ds.agreement import gather
from moepp_ds.bench.cases import Graph, behind_router, in_words, machine
from moepp_ds.bench.on_ranks import take_turns_on_ranks
from moepp_ds.bench.presets import LayerSizes
from moepp_ds.bench.routes import Routes, balanced_counts, forced_routes
from moepp_ds.bench.traffic import counting_bytes
from moepp_ds.config import RecipeError
from moepp_ds.engine import Ranks
from moepp_ds.expert_parallel import AllToAll
from moepp_ds.moe_layer import LayerSettings, LocalExchange, MoELayer, Parcel
from moepp_ds.router import RouterSettings
from moepp_ds.timing import ratio

JOURNEYS = ("rows there", "results back", "their gradients there", "gradients of rows back")


@dataclass(frozen=True)
class AllToAllResult:
    """What was measured, and where.

    expected: bytes of all FFN assignments whose expert is on another rank, over all ranks. sent: in each journey.
    ffn_share: of the assignments, at this tau. seconds: by direction and case, of the slowest rank in each round.
    """

    machine: dict[str, Any]
    world: int
    tau: float
    ffn_share: float
    expected: int
    sent: dict[str, int]
    seconds: dict[str, dict[str, list[float]]]


class _WaitingAllToAll(AllToAll):
    """The exchange without overlap."""

    def send(self, rows_RD: Tensor, counts: Sequence[int]) -> Parcel:
        parcel = super().send(rows_RD, counts)
        rows_QD, local_counts = parcel.receive()
        return _Arrived(parcel, rows_QD, local_counts)


@dataclass(frozen=True)
class _Arrived:
    parcel: Parcel
    rows_QD: Tensor
    counts: Sequence[int]

    def receive(self) -> tuple[Tensor, Sequence[int]]:
        return self.rows_QD, self.counts

    def give_back(self, rows_QD: Tensor) -> Tensor:
        return self.parcel.give_back(rows_QD)


class _AtHome(LocalExchange):
    """As many rows as arrive by a balanced exchange, but this rank's own, for its own experts."""

    def __init__(self, num_local: int) -> None:
        self.num_local = num_local

    def send(self, rows_RD: Tensor, counts: Sequence[int]) -> Parcel:
        ways = len(counts) // self.num_local
        return super().send(rows_RD, [sum(counts[e * ways : (e + 1) * ways]) for e in range(self.num_local)])


def bench_all2all(
    sizes: LayerSizes, tau: float, ranks: Ranks, *, tokens: int, dtype: torch.dtype, repeats: int
) -> AllToAllResult:
    """Measure with `tokens` on every rank. Raises RecipeError for a world or a tau that cannot be. Collective."""
    num_ffn, world = sizes.kinds.num_ffn, ranks.world
    if world < 2 or num_ffn % world:
        fits = [str(n) for n in range(2, num_ffn + 1) if num_ffn % n == 0]
        raise RecipeError(f"{world} ranks cannot share {num_ffn} FFN experts between them; use {', '.join(fits)} ranks")
    torch.manual_seed(ranks.rank)
    kinds, local = sizes.kinds, num_ffn // world
    settings = LayerSettings(RouterSettings(top_k=sizes.top_k), tau=tau, seats=None)
    layer = MoELayer(
        sizes.hidden_size,
        sizes.ffn_hidden_size,
        kinds,
        settings,
        has_residual=False,
        num_local_experts=local,
        first_local_expert=ranks.rank * local,
    ).to(ranks.device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer.to(dtype)
    x_TD = torch.randn(tokens, sizes.hidden_size, device=ranks.device).to(dtype).requires_grad_()
    routes = forced_routes(
        kinds, tau=tau, tokens=tokens, top_k=sizes.top_k, device=ranks.device, seed=ranks.rank
    )
    exchange = AllToAll(dist.group.WORLD)
    expected = sum(gather(_leaving(routes, ranks.rank * local, local))) * sizes.hidden_size * dtype.itemsize
    exchanges = {"layer": exchange, "waiting": _WaitingAllToAll(dist.group.WORLD), "at home": _AtHome(local)}
    wanted = [x_TD, *behind_router(layer)]
    cases = {
        name: Graph(lambda how=how: [_compute(layer, how, x_TD, routes)], wanted)  # type: ignore[misc]
        for name, how in exchanges.items()
    }
    with counting_bytes() as sent:
        cases["layer"].forward_backward()
    rows_RD = torch.randn(sum(routes.plan.ffn_counts), sizes.hidden_size, device=ranks.device).to(dtype)
    actions: dict[str, Callable[[], object]] = {
        "plain": partial(_plain, rows_RD[: len(rows_RD) // world * world]),
        "rows": partial(_rows, exchange, rows_RD, routes),
        **{name: case.forward for name, case in cases.items()},
    }
    whole = {name: case.forward_backward for name, case in cases.items()}
    counts = balanced_counts(kinds, tau, tokens * sizes.top_k)
    return AllToAllResult(
        machine=machine(ranks.device),
        world=world,
        tau=tau,
        ffn_share=sum(counts[:num_ffn]) / sum(counts),
        expected=expected,
        sent={name: sum(gather(count)) for name, count in zip(JOURNEYS, sent, strict=True)},
        seconds={
            "forward": take_turns_on_ranks(actions, repeats=repeats),
            "forward_backward": take_turns_on_ranks(whole, repeats=repeats),
        },
    )


def _leaving(routes: Routes, first: int, local: int) -> int:
    counts = routes.plan.ffn_counts
    return sum(counts) - sum(counts[first : first + local])


def _compute(layer: MoELayer, exchange: Any, x_TD: Tensor, routes: Routes) -> Tensor:
    layer.exchange = exchange
    return layer.compute(x_TD, routes.gate_N, routes.token_N, routes.expert_N, routes.plan)


def _plain(rows_RD: Tensor) -> None:
    arrived_RD = torch.empty_like(rows_RD)
    dist.all_to_all_single(arrived_RD, rows_RD)
    dist.all_to_all_single(rows_RD, arrived_RD)


@torch.no_grad()
def _rows(exchange: AllToAll, rows_RD: Tensor, routes: Routes) -> None:
    parcel = exchange.send(rows_RD, routes.plan.ffn_counts)
    rows_QD, _ = parcel.receive()
    parcel.give_back(rows_QD)


def print_all2all(result: AllToAllResult, console: Console) -> None:
    """Bytes of every journey, then the times."""
    share = f"{result.ffn_share:.4f} of the assignments are for FFN experts"
    console.print(f"{result.world} ranks, tau {result.tau:g}: {share}; {in_words(result.machine)}")
    for name, count in result.sent.items():
        console.print(f"{name}: {count:,} bytes to other ranks, of {result.expected:,} expected")
    table = Table("", "forward", "of layer", "forward + backward", "of layer")
    for name in result.seconds["forward"]:
        table.add_row(name, *(cell for times in result.seconds.values() for cell in _cells(times, name)))
    console.print(table)


def _cells(seconds: Mapping[str, list[float]], name: str) -> tuple[str, str]:
    """How long it took, and of the layer's time."""
    return (f"{median(seconds[name]):.4f} s", f"{ratio(seconds, name, 'layer'):.2f}") if name in seconds else ("", "")
