"""What several commands share: options of the same meaning, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import orjson
import typer
from rich.console import Console

from data_pipeline.config import DataConfig
from data_pipeline.document import DataError
from data_pipeline.recipe_file import checked_data, read_data_section
from data_pipeline.weights import flatten_mixture

SetFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the shard set.")]
_WHERE = "folder, file, glob, URL or hub:NAME"
RedPajama = Annotated[Optional[str], typer.Option(metavar="WHERE", help=f"RedPajama: {_WHERE}; a folder per subset.")]
Dolma = Annotated[Optional[str], typer.Option(metavar="WHERE", help=f"Dolma: {_WHERE}; .json.gz files.")]
Pile = Annotated[Optional[str], typer.Option(metavar="WHERE", help=f"The Pile: {_WHERE}; train/NN.jsonl.zst.")]
OptionalSet = Annotated[
    Optional[Path], typer.Argument(metavar="[OUT]", help="Folder of the shard set; else the recipe's data.path.")
]
RECIPE_HELP = "Recipe whose data section says what is drawn, instead of --mixture."
MIXTURE_HELP = 'Preset (strategy_1, strategy_2) or weights as JSON, such as \'{"dolma": 0.7, "pile": 0.3}\'.'
MaxBadShare = Annotated[
    float, typer.Option(help="Share of a file's lines that may be bad; 10 lines always may.")
]
SeqLen = Annotated[Optional[int], typer.Option(min=1, help="Targets per row, where no recipe says it: else 2048.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes; each takes one file at a time.")]


def standard_output() -> Console:
    """Standard output; in a file or a pipe lines are not broken at the 80 columns rich would assume."""
    return Console() if Console().is_terminal else Console(width=200)


def named_corpora(redpajama: str | None, dolma: str | None, pile: str | None) -> dict[str, str]:
    """{corpus: where it is} of those that were given."""
    given = {"redpajama": redpajama, "dolma": dolma, "pile": pile}
    return {name: where for name, where in given.items() if where is not None}


def parse_mixture(given: str) -> str | dict[str, Any]:
    """The name of a preset, or the mapping that a JSON object spells; DataError when it is no sound mixture."""
    mixture: str | dict[str, Any] = given
    if given.lstrip().startswith("{"):
        try:
            mixture = orjson.loads(given)
        except orjson.JSONDecodeError as error:
            raise DataError(f"--mixture {given!r} is no JSON object ({error})") from None
    flatten_mixture(mixture)
    return mixture


@dataclass(frozen=True)
class ChosenData:
    """What a command was asked to look at."""

    path: Path
    config: DataConfig | None
    """None when neither a mixture nor a recipe was named."""
    planned_tokens: int | None
    """Tokens of the recipe's run, if it says them."""


def choose_data(
    out: Path | None, mixture: str | None, recipe: Path | None, *, seq_len: int | None = None, seed: int | None = None
) -> ChosenData:
    """A set with a mixture, or a recipe with or without another set in place of its data.path."""
    if recipe is not None:
        if mixture is not None:
            raise DataError("--mixture and --recipe both say what is drawn; give one of them")
        if seq_len is not None or seed is not None:
            raise DataError("the recipe says data.seq_len and data.seed; leave --seq-len and --seed out")
        config, planned = read_data_section(recipe, shards=out)
        return ChosenData(Path(config.path), config, planned)
    if out is None:
        raise DataError("name a shard set (OUT), or a recipe whose data.path is one (--recipe)")
    if mixture is None:
        return ChosenData(out, None, None)
    asked = {"path": str(out), "mixture": parse_mixture(mixture), "seq_len": seq_len or 2048, "seed": seed or 0}
    drawn = checked_data(asked, place="what the command line asks for")
    return ChosenData(Path(drawn.path), drawn, None)
