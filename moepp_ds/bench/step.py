"""A whole update of a recipe beside one of its vanilla twin, on real ranks (`moepp bench step`).

Both are trained as `moepp_ds.train` trains them, by DeepSpeed's engine: forward and backward pass of every micro batch,
exchange between ranks, reduction, optimizer. Only data are missing: tokens are at random. Every router is overruled:
assignments are in the balance at which tau aims. So FLOPs and bytes are known, and the measured speedup has an ideal:
the FLOPs of the twin's update over those of the recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.loader import Batch
from moepp_ds.agreement import gather
from moepp_ds.bench.cases import in_words, machine
from moepp_ds.bench.on_ranks import take_turns_on_ranks
from moepp_ds.bench.routes import balanced_choices
from moepp_ds.bench.traffic import counting_assignments, counting_bytes
from moepp_ds.config import MoEConfig, Recipe, RecipeError, journeys_of_an_assignment, load_recipe
from moepp_ds.engine import Ranks, build_engine
from moepp_ds.memory.plan import BYTES_PER_NUMBER
from moepp_ds.moe_layer import MoELayer
from moepp_ds.timing import ratio
from moepp_ds.update import update

OWN, VANILLA = "recipe", "vanilla twin"

TWIN = (
    "num_zero=0",
    "num_copy=0",
    "num_constant=0",
    "tau=1.0",
    "gating_residual=false",
    "balance=per_expert",
    "controller=null",
)
"""What makes a vanilla MoE of a recipe, below model.moe."""


@dataclass(frozen=True)
class Traffic:
    """All-to-all bytes of one update that leave their rank, over all ranks and MoE layers.

    expected: FFN assignments kept whose expert is on another rank, times width and bytes of a number, times journeys.
    journeys: there and back, in the forward and in the backward pass. share: of the twin's bytes.
    """

    sent: int
    expected: int
    journeys: int
    share: float


@dataclass(frozen=True)
class StepResult:
    """What was measured, and where. flops: of an update of all ranks. seconds: of the slowest rank, for each round."""

    machine: dict[str, Any]
    world: int
    tokens: int
    ideal: float
    measured: float
    flops: dict[str, float]
    traffic: dict[str, Traffic]
    seconds: dict[str, list[float]]


def load_shortened(path: Path, overrides: Sequence[str], *, world: int, micro_batches: int) -> Recipe:
    """A recipe with so many micro batches for a rank in an update. Raises RecipeError."""
    given = load_recipe(path, overrides)
    rows = micro_batches * given.train.micro_batch_size * world
    return load_recipe(path, [*overrides, f"train.batch_tokens={rows * given.data.seq_len}"])


def load_cases(
    path: Path, overrides: Sequence[str], beside: Sequence[str], *, world: int, micro_batches: int
) -> dict[str, Recipe]:
    """The recipe, shortened, its vanilla twin, and the recipe with each setting of `beside`. Raises RecipeError."""
    given = load_shortened(path, overrides, world=world, micro_batches=micro_batches)
    moe = given.model.moe
    if moe.num_zero_computation == 0 or moe.top_k is None:
        raise RecipeError(
            f"{path} has {moe.num_zero_computation} zero-computation experts and top_k {moe.top_k}: what is measured "
            "is a MoE++ recipe with top_k beside its vanilla twin; give another one, or --set them"
        )
    # routing is forced, so how it would be balanced is of no interest
    others = {VANILLA: [f"model.moe.{setting}" for setting in TWIN], **{setting: [setting] for setting in beside}}
    return {
        OWN: given,
        **{
            name: load_shortened(path, [*overrides, *settings], world=world, micro_batches=micro_batches)
            for name, settings in others.items()
        },
    }


def bench_step(recipes: Mapping[str, Recipe], ranks: Ranks, *, repeats: int) -> StepResult:
    """Measure updates of these recipes in turns; the same result on every rank. Collective."""
    torch.manual_seed(ranks.rank)
    engines = {name: _engine(recipe, ranks) for name, recipe in recipes.items()}
    actions = {name: partial(one_update, engines[name], recipe, ranks) for name, recipe in recipes.items()}
    bytes_sent = {name: _traffic(engines[name], recipes[name], action) for name, action in actions.items()}
    seconds = take_turns_on_ranks(actions, repeats=repeats)
    flops = {name: recipe.flops_per_update for name, recipe in recipes.items()}
    return StepResult(
        machine=machine(ranks.device),
        world=ranks.world,
        tokens=recipes[OWN].train.batch_tokens,
        ideal=flops[VANILLA] / flops[OWN],
        measured=ratio(seconds, VANILLA, OWN),
        flops=flops,
        traffic={
            name: Traffic(sent, expected, journeys, sent / max(1, bytes_sent[VANILLA][0]))
            for name, (sent, expected, journeys) in bytes_sent.items()
        },
        seconds=seconds,
    )


def _engine(recipe: Recipe, ranks: Ranks) -> Any:
    engine, _ = build_engine(recipe, ranks, eos_id=0)
    engine.train()
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    layers = [module for module in engine.module.modules() if isinstance(module, MoELayer)]
    for number, layer in enumerate(layers):
        _force(layer, _aimed_tau(recipe.model.moe), tokens, ranks, seed=number * ranks.world + ranks.rank)
    return engine


def _aimed_tau(moe: MoEConfig) -> float:
    """By which FFN experts get what this recipe aims at: its tau, or that of the controller's target."""
    if moe.num_zero_computation == 0:
        return 1.0
    share = moe.mean_ffn_experts / moe.choices_per_token
    return share * moe.num_zero_computation / (moe.num_ffn_experts * (1 - share))


def _force(layer: MoELayer, tau: float, tokens: int, ranks: Ranks, *, seed: int) -> None:
    """Have the router of this layer choose experts in balance, whatever its scores are."""
    top_k = layer.settings.router.top_k
    assert top_k is not None
    expert_TK = balanced_choices(layer.kinds, tau=tau, tokens=tokens, top_k=top_k, seed=seed).to(ranks.device)
    layer.router._choose = lambda preference_TE, probability_TE: (expert_TK, None)  # type: ignore[method-assign]


def one_update(engine: Any, recipe: Recipe, ranks: Ranks) -> None:
    """Train once on tokens at random. Collective."""
    rows = recipe.train.micro_batch_size
    generator = np.random.default_rng(ranks.rank)
    batches = [
        Batch(
            tokens_BS1=generator.integers(recipe.model.vocab_size, size=(rows, recipe.data.seq_len + 1)),
            row_start=(ranks.rank + ranks.world * number) * rows,
            source_B=np.zeros(rows, dtype=np.int64),
        )
        for number in range(recipe.layout(ranks.world).accumulation_steps)
    ]
    done = update(engine, batches, ranks, rate=1e-5, num_sources=1, stop=lambda: False)
    assert done.taken, done.incident


def _traffic(engine: Any, recipe: Recipe, action: partial[None]) -> tuple[int, int, int]:
    """Bytes that one update sends, those that it should, and the journeys of an assignment. Collective."""
    with counting_bytes() as sent, counting_assignments(engine.module) as leaving:
        action()
    journeys = journeys_of_an_assignment(recipe.train.activation_checkpointing) if sent else 0
    row = recipe.model.hidden_size * BYTES_PER_NUMBER[recipe.train.precision]
    return sum(gather(sum(sent))), sum(gather(sum(leaving))) * row * journeys, journeys


def print_step(result: StepResult, console: Console) -> None:
    """The two updates, and how much of what FLOPs allow was reached."""
    console.print(f"{result.world} ranks, {result.tokens:,} tokens an update; {in_words(result.machine)}")
    table = Table("", "update", "fastest", "slowest", "tokens/s", "TFLOP/s")
    for name, times in result.seconds.items():
        middle = median(times)
        speeds = (f"{result.tokens / middle:,.0f}", f"{result.flops[name] / middle / 1e12:.3g}")
        table.add_row(name, *(f"{time:.3f} s" for time in (middle, min(times), max(times))), *speeds)
    console.print(table)
    for name, traffic in result.traffic.items():
        shares = f"{traffic.expected:,} expected, {traffic.share:.4f} of the twin's"
        console.print(f"{name}: {traffic.sent:,} all-to-all bytes to other ranks, {shares}")
    reached = f"{result.measured / result.ideal:.3f} of what FLOPs allow, {result.ideal:.3f}"
    console.print(f"{result.measured:.3f} times as fast as its twin: {reached}")
    for name in [name for name in result.seconds if name not in (OWN, VANILLA)]:
        console.print(f"with {name} {ratio(result.seconds, OWN, name):.3f} times as fast")
