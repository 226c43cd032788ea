"""Commands that prove something of a shard set, and fail where it does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from data_pipeline.commands.common import (
    MIXTURE_HELP,
    RECIPE_HELP,
    Dolma,
    Pile,
    RedPajama,
    SetFolder,
    Workers,
    choose_data,
    named_corpora,
)
from data_pipeline.config import DataConfig
from data_pipeline.count import DEVIATION_BOUND, Counted, Tally, count_set
from data_pipeline.document import DataError, counted
from data_pipeline.manifest import read_manifest
from data_pipeline.progress import simple_bar
from data_pipeline.stream import open_mixture, source_tokens
from data_pipeline.verify import verify_set


def verify(out: SetFolder) -> None:
    """Read every shard in full: checksums, ids, document ends."""
    with simple_bar(Console(stderr=True), "bytes verified") as add:
        result = verify_set(out, add)
    for problem in result.problems:
        print(problem)
    if result.problems:
        sound = counted(result.shards, "sound shard")
        raise DataError(f"{counted(len(result.problems), 'problem')} in {out}, beside {sound}")
    print(f"PASS: {counted(result.shards, 'shard')}, {counted(result.tokens, 'token')}, {result.bytes:,} bytes")


def count(
    out: SetFolder,
    redpajama: RedPajama = None,
    dolma: Dolma = None,
    pile: Pile = None,
    mixture: Annotated[Optional[str], typer.Option(help=MIXTURE_HELP)] = None,
    recipe: Annotated[Optional[Path], typer.Option(help=RECIPE_HELP)] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Prefixes of the stream to check the shares at.")
    ] = 100_000,
    workers: Workers = 1,
) -> None:
    """Prove that no token was lost: raw files against shards, and the mixture's shares at every prefix."""
    corpora = named_corpora(redpajama, dolma, pile)
    failures = 0
    drawn_by = choose_data(out, mixture, recipe).config
    if corpora or drawn_by is None:
        with simple_bar(Console(stderr=True), "files counted") as add:
            found = count_set(out, corpora, workers=workers, on_file=lambda file: add(1))
        failures += _print_counted(found)
        _print_not_counted(out, corpora)
    if drawn_by is not None:
        failures += _print_deviations(drawn_by, rows)
    if failures:
        raise DataError(f"{counted(failures, 'difference')} in {out}: see above")
    print("PASS")


def _print_counted(found: Counted) -> int:
    print("raw files against shards; to train on and held out together:")
    for label in sorted({*found.raw, *found.shards}):
        raw, shards = found.raw.get(label, Tally()), found.shards.get(label, Tally())
        verdict = "equal" if raw == shards else f"but the shards hold {shards}"
        print(f"{label:28} {raw}: {verdict}")
    total = sum(found.raw.values(), Tally())
    print(f"{'all':28} {total}")
    for problem in found.problems:
        print(problem)
    return len(found.problems)


def _print_not_counted(out: Path, corpora: Mapping[str, str]) -> None:
    left = sorted({file.corpus for file in read_manifest(out).files} - corpora.keys())
    if left:
        too = ", ".join(f"--{corpus}" for corpus in left)
        print(f"not counted: {', '.join(left)}; name {too} too for the whole set")


def _print_deviations(config: DataConfig, rows: int) -> int:
    """The largest deviation from its share of each source in each stage; how many are over the bound."""
    mixture = open_mixture(config, source_tokens(config, read_manifest(Path(config.path))))
    failures = 0
    for stage in mixture.stages:
        stop = rows if stage.stop is None else min(rows, stage.stop)
        if stage.start < stop:
            where = f" from row {stage.start:,}" if len(mixture.stages) > 1 else ""
            print(
                f"largest deviation from its share, in rows, at every prefix of {stop - stage.start:,} rows{where}"
                f" (bound {DEVIATION_BOUND}):"
            )
            for name, deviation in stage.mixture.largest_deviation(stop - stage.start).items():
                print(f"{name:28} {deviation:.4f}")
                failures += deviation > DEVIATION_BOUND
    return failures
