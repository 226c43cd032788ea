"""Commands that show what a shard set holds and what training will draw from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import orjson
import typer

from data_pipeline.commands.common import (
    MIXTURE_HELP,
    RECIPE_HELP,
    OptionalSet,
    SeqLen,
    choose_data,
    standard_output,
)
from data_pipeline.describe import describe_mixture, describe_set, mixture_facts, set_facts, show_rows
from data_pipeline.document import DataError


def describe(
    out: OptionalSet = None,
    mixture: Annotated[Optional[str], typer.Option(help=MIXTURE_HELP)] = None,
    recipe: Annotated[Optional[Path], typer.Option(help=RECIPE_HELP)] = None,
    token_budget: Annotated[
        Optional[int], typer.Option(min=1, help="Tokens of a run, to tell epochs; else the recipe's.")
    ] = None,
    seq_len: SeqLen = None,
    json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Print what a set holds and how a mixture, or a recipe's stages and limits, draw on it."""
    chosen = choose_data(out, mixture, recipe, seq_len=seq_len)
    if token_budget is not None and chosen.config is None:
        raise DataError("--token-budget tells the epochs of what a mixture draws: name --mixture or --recipe too")
    held = set_facts(chosen.path)
    budget = token_budget or chosen.planned_tokens
    drawn = None if chosen.config is None else mixture_facts(chosen.config, token_budget=budget)
    if json:
        print(orjson.dumps({**held, "mixture": drawn}, option=orjson.OPT_INDENT_2).decode())
        return
    console = standard_output()
    console.print(describe_set(held))
    if drawn is not None:
        console.print(describe_mixture(drawn))


def show(
    out: OptionalSet = None,
    mixture: Annotated[Optional[str], typer.Option(help=MIXTURE_HELP)] = None,
    recipe: Annotated[Optional[Path], typer.Option(help=RECIPE_HELP)] = None,
    row: Annotated[int, typer.Option(min=0, help="Index of the first row in the training stream.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 1,
    seq_len: SeqLen = None,
    seed: Annotated[
        Optional[int], typer.Option(min=0, max=2**63 - 1, help="data.seed, where no recipe says it: else 0.")
    ] = None,
) -> None:
    """Print rows of the training stream as text, with their sources and the ends of documents."""
    chosen = choose_data(out, mixture, recipe, seq_len=seq_len, seed=seed)
    if chosen.config is None:
        raise DataError("say what the rows are drawn by: --mixture or --recipe")
    console = standard_output()
    for text in show_rows(chosen.config, row, rows):
        console.print(text, soft_wrap=True)
