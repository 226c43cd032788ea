"""Where each token of a text went, layer by layer: `moepp trace`.

1. The text goes through the model once, as one micro batch of one row.
2. Every MoE layer has returned its routing and who got a seat; that is all that is read here.
3. It is put in words: experts by kind and number, combine weights, drops, FFN experts that computed the token.

Evaluation is dropless, and so is a trace. With `seats` the MoE layers have the seats of a training step for this many
tokens, and what was dropped is shown. Shared experts compute every token and are not among those chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from moepp_ds.config import RecipeError, expert_capacity
from moepp_ds.kinds import ExpertKinds
from moepp_ds.load import LoadedModel
from moepp_ds.model import expert_kinds
from moepp_ds.moe_layer import MoELayer, MoEReport


@dataclass(frozen=True)
class Choice:
    """A token's choice of an expert. expert: its index. weight: it is combined with, were it kept. kept: had a seat."""

    expert: int
    name: str
    probability: float
    weight: float
    kept: bool


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer. block: which of the model's, from 0. choices: of each token, best first.

    The numbers are means over the tokens, `share` and `dropped` over the choices: share by kind of expert as chosen,
    FFN experts that computed a token, share of choices without a seat, entropy of the scores in nats, the highest and
    the second highest score, and the balance loss beside its perfect value.
    """

    block: int
    choices: list[list[Choice]]
    share: dict[str, float]
    ffn_experts: float
    dropped: float
    entropy: float
    top_1: float
    top_2: float
    balance: float


@dataclass(frozen=True)
class Trace:
    """A whole text. pieces: what each token reads as. seats: of an FFN and of another expert, None where dropless."""

    ids: list[int]
    pieces: list[str]
    layers: list[LayerTrace]
    num_ffn: int
    seats: tuple[int, int] | None

    def ffn_count(self, layer: LayerTrace, token: int) -> int:
        """Routed FFN experts that computed a token in a layer."""
        return sum(choice.kept and choice.expert < self.num_ffn for choice in layer.choices[token])

    def mean_ffn(self, token: int) -> float:
        """The same, as a mean over the MoE layers."""
        return sum(self.ffn_count(layer, token) for layer in self.layers) / len(self.layers)


@torch.no_grad()
def trace_text(loaded: LoadedModel, text: str, *, seats: bool = False) -> Trace:
    """Follow the tokens of a text; DataError for one that is empty or too long."""
    moe, ids = loaded.recipe.model.moe, loaded.encode(text)
    capacity = None
    if seats:
        if moe.dropless:
            raise RecipeError("model.moe.dropless is true: training has no seats either; leave out --seats")
        found = expert_capacity(moe, len(ids))
        capacity = (found.ffn, found.zero_computation)
    layers = [module for module in loaded.model.modules() if isinstance(module, MoELayer)]
    for layer in layers:
        layer.train(seats)  # seats are for training; of the layers alone, so that nothing is jittered
    _, reports = loaded.model.hidden(torch.tensor([ids], device=loaded.device), loaded.routing)
    loaded.model.eval()
    blocks = [i for i in range(loaded.recipe.model.num_layers) if loaded.recipe.model.is_moe(i)]
    kinds = expert_kinds(moe)
    traced = [_layer(block, report, kinds, len(ids)) for block, report in zip(blocks, reports)]
    return Trace(ids, token_pieces(loaded.tokenizer, ids), traced, kinds.num_ffn, capacity)


def _layer(block: int, report: MoEReport, kinds: ExpertKinds, tokens: int) -> LayerTrace:
    routing, names, statistics = report.routing, expert_names(kinds), report.statistics
    choices: list[list[Choice]] = [[] for _ in range(tokens)]
    columns = (routing.token_N, routing.expert_N, routing.probability_N, routing.gate_N, report.plan.kept_N)
    for token, expert, probability, weight, kept in zip(*(column.tolist() for column in columns)):
        choices[token].append(Choice(expert, names[expert], probability, weight, kept))
    wanted, kept_E = statistics.wanted_E, statistics.kept_E
    total = int(wanted.sum())

    def mean(summed: Tensor) -> float:
        return float(summed) / tokens

    return LayerTrace(
        block=block,
        choices=choices,
        share={kind: int(wanted[at].sum()) / total for kind, at in kinds.slices().items() if wanted[at].numel()},
        ffn_experts=mean(kept_E[: kinds.num_ffn].sum()),
        dropped=(total - int(kept_E.sum())) / total,
        entropy=mean(statistics.entropy),
        top_1=mean(statistics.top_1),
        top_2=mean(statistics.top_2),
        balance=mean(statistics.balance),
    )


def expert_names(kinds: ExpertKinds) -> list[str]:
    """What each expert is called, by index: `ffn 3`, `constant 0`, and without a number where a kind has but one."""
    names = []
    for kind, at in kinds.slices().items():
        count = at.stop - at.start
        names += [kind] if count == 1 and kind in ("copy", "zero") else [f"{kind} {number}" for number in range(count)]
    return names


def token_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; a token that is part of a character reads as the replacement character.

    A token is decoded behind the one before it: alone, some tokenizers drop the space that it begins with.
    """
    pieces = [tokenizer.decode(ids[:1])]
    for before, own in zip(ids, ids[1:]):
        first, both = tokenizer.decode([before]), tokenizer.decode([before, own])
        pieces.append(both.removeprefix(first) if both.startswith(first) and both != first else tokenizer.decode([own]))
    return pieces


def as_json(trace: Trace, loaded: LoadedModel) -> dict[str, Any]:
    """The trace for scripts: its tokens, and its layers with the FFN experts of each token beside what they hold."""
    tokens = range(len(trace.ids))
    layers = [
        {**asdict(layer), "ffn_count": [trace.ffn_count(layer, token) for token in tokens]} for layer in trace.layers
    ]
    return {
        "checkpoint": str(loaded.folder),
        "step": loaded.index["step"],
        "seats": None if trace.seats is None else dict(zip(("ffn", "zero_computation"), trace.seats)),
        "tokens": [
            {"id": number, "piece": piece, "mean_ffn": trace.mean_ffn(token)}
            for token, (number, piece) in enumerate(zip(trace.ids, trace.pieces))
        ],
        "layers": layers,
    }


def print_trace(trace: Trace, console: Console) -> None:
    """Who went where, as many layers side by side as the console is wide; then the means of tokens and of layers."""
    seats = "dropless, as in evaluation"
    if trace.seats is not None:
        seats = f"{trace.seats[0]} seats in an FFN expert, {trace.seats[1]} in another; (in brackets) found no seat"
    console.print(f"{len(trace.ids)} tokens, {len(trace.layers)} MoE layers; {seats}", highlight=False)
    cells = [[_cell(trace, layer, token) for token in range(len(trace.ids))] for layer in trace.layers]
    pieces = [_shown(piece) for piece in trace.pieces]
    room = console.width - max(map(len, pieces)) - len(str(len(pieces))) - 7
    for group in _groups([_width(column) for column in cells], room):
        table = Table(show_lines=True)
        table.add_column("", justify="right")
        table.add_column("token", no_wrap=True)
        for at in group:
            table.add_column(f"block {trace.layers[at].block}", no_wrap=True)
        for token, piece in enumerate(pieces):
            table.add_row(str(token), Text(piece), *(Text(cells[at][token]) for at in group))
        console.print(table)
    console.print("FFN experts per token, mean over layers:")
    console.print(Columns(Text(f"{piece} {trace.mean_ffn(token):.2f}") for token, piece in enumerate(pieces)))
    console.print(_layer_table(trace))


def _cell(trace: Trace, layer: LayerTrace, token: int) -> str:
    words = [f"{choice.name} {choice.weight:.2f}" for choice in layer.choices[token]]
    lines = [word if choice.kept else f"({word})" for word, choice in zip(words, layer.choices[token])]
    return "\n".join([*lines, f"= {trace.ffn_count(layer, token)} FFN"])


def _shown(piece: str, most: int = 16) -> str:
    """A piece with its spaces and control characters made visible."""
    text = repr(piece)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _width(column: Sequence[str]) -> int:
    """What a column of cells takes up, its borders included."""
    return 3 + max(len(line) for cell in column for line in ["block 00", *cell.split("\n")])


def _groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """Consecutive columns that fit side by side; at least one each."""
    groups: list[list[int]] = []
    left = 0
    for at, width in enumerate(widths):
        if not groups or width > left:
            groups.append([])
            left = room
        groups[-1].append(at)
        left -= width
    return groups


def _layer_table(trace: Trace) -> Table:
    kinds = list(trace.layers[0].share)
    table = Table(title="shares of choices, and means over tokens", box=None, padding=(0, 1, 0, 0))
    names = [*kinds, "FFN/token", "dropped", "entropy", "top-1", "top-2", "balance"]
    for name in ["block", *names]:
        table.add_column(name, justify="right")
    for layer in trace.layers:
        shares = [f"{layer.share[kind]:.0%}" for kind in kinds]
        means = (layer.entropy, layer.top_1, layer.top_2, layer.balance)
        counted = [f"{layer.ffn_experts:.2f}", f"{layer.dropped:.1%}"]
        table.add_row(str(layer.block), *shares, *counted, *(f"{value:.2f}" for value in means))
    return table
