"""Held-out loss and the operations it took, for one setting or for several values of it: `moepp evaluate`.

1. Lay the overrides over the checkpoint's recipe; one of them may give several values, each makes a model of the same
   weights.
2. Score the held-out rows, and count while they are scored: FFN experts that computed a token, and floating point
   operations of every matrix product as they happen (torch's counter), not as a formula has them.
3. A table of loss against operations.

A multiply and an add are two operations. Attention is counted as the full square of positions, of which a causal
kernel may skip half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from data_pipeline.document import DataError
from data_pipeline.feed import open_held_out
from moepp_ds.config import RecipeError
from moepp_ds.evaluate import Score, evaluate, overall
from moepp_ds.load import LoadedModel, with_overrides
from moepp_ds.moe_layer import MoELayer, MoEOutput


@dataclass(frozen=True)
class Measurement:
    """A model on held-out text under one setting.

    value: of the swept key, as it was given; None where none is swept. sources: each one's score.
    ffn_experts: routed FFN experts that computed a token, mean over the tokens read and the MoE layers.
    flops: of the forward pass per token read; ffn_expert_flops: those of them in routed FFN experts.
    """

    value: str | None
    overall: Score
    sources: dict[str, Score]
    ffn_experts: float
    flops: float
    ffn_expert_flops: float


@dataclass(frozen=True)
class Sweep:
    """Overrides as given, with the one that has several values apart. key: its name, or None."""

    fixed: tuple[str, ...]
    key: str | None
    values: tuple[str, ...]

    def settings(self) -> list[tuple[str | None, list[str]]]:
        """Each value with the overrides that set it."""
        if self.key is None:
            return [(None, list(self.fixed))]
        return [(value, [*self.fixed, f"{self.key}={value}"]) for value in self.values]


def parse_sweep(overrides: Sequence[str]) -> Sweep:
    """Find the override with several values: "a.b=1,2,3". A list or mapping of YAML, or a quoted text, is one value."""
    fixed: list[str] = []
    swept: dict[str, tuple[str, ...]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        whole = text.strip()[:1] in tuple("[{\"'")
        values = (text,) if whole else tuple(value.strip() for value in text.split(","))
        if len(values) == 1:
            fixed.append(override)
        elif all(values):
            swept[key.strip()] = values
        else:
            raise RecipeError(f"--set {override}: there is no value beside one of the commas; write KEY=V1,V2,V3")
    if len(swept) > 1:
        raise RecipeError(f"{' and '.join(swept)} have several values each; sweep one key at a time")
    for key, values in swept.items():
        return Sweep(tuple(fixed), key, values)
    return Sweep(tuple(fixed), None, ())


def sweep(loaded: LoadedModel, plan: Sweep, *, rows: int | None = None) -> list[Measurement]:
    """Measure every setting of the plan, see `measure`; one that is refused is found before the first is measured."""
    models = [(value, with_overrides(loaded, settings)) for value, settings in plan.settings()]
    return [measure(model, value, rows=rows) for value, model in models]


def measure(loaded: LoadedModel, value: str | None = None, *, rows: int | None = None) -> Measurement:
    """Score the held-out text of the recipe's sources, and count what it took.

    rows: of each source at most; default: the recipe's evaluation.rows. DataError where nothing was held out.
    """
    recipe = loaded.recipe
    rows = rows or recipe.evaluation.rows
    held_out = open_held_out(recipe.data, rows=rows)
    if not held_out:
        raise DataError(
            f"no text was held out of the shards at {recipe.data.path}; build them with moepp-data build --held-out, "
            "or name others with --set data.path=DIR"
        )
    with _counting(loaded) as counts:
        scores = evaluate(
            loaded.model,
            held_out,
            seq_len=recipe.data.seq_len,
            micro_batch_size=recipe.train.micro_batch_size,
            rows=rows,
            routing=loaded.routing,
        )
    return Measurement(
        value=value,
        overall=overall(scores, held_out),
        sources=scores,
        ffn_experts=counts.ffn_assignments / counts.layer_tokens,
        flops=counts.flops / counts.tokens,
        ffn_expert_flops=counts.ffn_expert_flops / counts.tokens,
    )


@dataclass
class _Counts:
    """Sums over all forward passes. layer_tokens: tokens times MoE layers."""

    tokens: int = 0
    layer_tokens: int = 0
    ffn_assignments: int = 0
    flops: int = 0
    ffn_expert_flops: int = 0


@contextmanager
def _counting(loaded: LoadedModel) -> Iterator[_Counts]:
    """Count the model's forward passes; the counts are complete when the block ends."""
    counts, num_ffn, counter = _Counts(), loaded.recipe.model.moe.num_ffn_experts, flop_counter()

    def count_layer(layer: nn.Module, inputs: Any, out: MoEOutput) -> None:
        counts.layer_tokens += len(out.output_TD)
        counts.ffn_assignments += int(out.statistics.kept_E[:num_ffn].sum())

    def enter_experts(experts: nn.Module, inputs: Any) -> None:
        counts.ffn_expert_flops -= counter.get_total_flops()

    def leave_experts(experts: nn.Module, inputs: Any, out: Any) -> None:
        counts.ffn_expert_flops += counter.get_total_flops()

    layers = [module for module in loaded.model.modules() if isinstance(module, MoELayer)]
    handles = [layer.register_forward_hook(count_layer) for layer in layers]
    handles += [layer.experts.register_forward_pre_hook(enter_experts) for layer in layers]
    handles += [layer.experts.register_forward_hook(leave_experts) for layer in layers]
    try:
        with counter:
            yield counts
    finally:
        for handle in handles:
            handle.remove()
    counts.tokens = counts.layer_tokens // len(layers)
    counts.flops = counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """torch's counter, with the products of this project that it does not know: they would count as nothing."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._grouped_mm: _grouped_flops,
            aten.addmm_: _added_flops,
            torch.ops.mkldnn._linear_pointwise: _linear_flops,
        },
    )


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of attention on a CPU, as torch counts it on a GPU. Shapes [B, H, S, A]."""
    return sdpa_flop_count(query, key, value)


def _grouped_flops(rows: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of R rows, each multiplied by one of E matrices: shapes [R, X] and [E, X, O]."""
    return 2 * rows[0] * weight[1] * weight[2]


def _added_flops(onto: torch.Size, left: torch.Size, right: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of a product that is added in place. Shapes [X, O], [X, Y] and [Y, O]."""
    return 2 * left[0] * left[1] * right[1]


def _linear_flops(left: torch.Size, right: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of oneDNN's product of [X, Y] and a transposed [O, Y]."""
    return 2 * left[0] * left[1] * right[0]


def as_json(loaded: LoadedModel, plan: Sweep, points: Sequence[Measurement]) -> dict[str, Any]:
    """The measurements for scripts."""
    return {
        "checkpoint": str(loaded.folder),
        "step": loaded.index["step"],
        "set": list(plan.fixed),
        "swept": plan.key,
        "points": [asdict(point) for point in points],
    }


def print_sweep(plan: Sweep, points: Sequence[Measurement], console: Console, *, sources: bool) -> None:
    """Loss against operations, a line for each setting; with `sources` also each source's loss and bits per byte."""
    console.print(f"held-out text, {points[0].overall.tokens:,} tokens scored; FFN experts and MFLOP are per token")
    table = _table(plan, [], ["loss", "bits/byte", "FFN experts", "MFLOP", "in FFN experts", "of row 1"])
    for point in points:
        numbers = [f"{point.ffn_experts:.3f}", f"{point.flops / 1e6:.3f}", f"{point.ffn_expert_flops / 1e6:.3f}"]
        table.add_row(*_value(point), *_score(point.overall), *numbers, f"{point.flops / points[0].flops:.1%}")
    console.print(table)
    if not sources:
        return
    table = _table(plan, ["source"], ["loss", "bits/byte", "tokens"])
    for source in points[0].sources:
        for point in points:
            score = point.sources[source]
            table.add_row(source, *_value(point), *_score(score), f"{score.tokens:,}")
    console.print(table)


def _table(plan: Sweep, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """With a column for the values of the swept key, headed by its last part, where one is swept."""
    table = Table()
    for name in words:
        table.add_column(name)
    for name in [*([] if plan.key is None else [plan.key.rpartition(".")[2]]), *numbers]:
        table.add_column(name, justify="right")
    return table


def _value(point: Measurement) -> list[str]:
    return [] if point.value is None else [point.value]


def _score(score: Score) -> list[str]:
    return [f"{score.loss:.4f}", f"{score.bits_per_byte:.4f}"]
