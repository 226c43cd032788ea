"""The command that compares two shard sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.diff import diff_sets
from data_pipeline.document import counted


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a shard set.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.")],
) -> None:
    """Compare two sets: settings, files, tokens. Exit code 1 when they differ."""
    found = diff_sets(first, second)
    for name, before, now in found.settings:
        print(f"{name}: {before} in A, {now} in B")
    for key, said in found.changed.items():
        print(f"changed: {key}: {'; '.join(said)}")
    for key in found.only_a:
        print(f"only in A: {key}")
    for key in found.only_b:
        print(f"only in B: {key}")
    print(
        f"{counted(found.same, 'file')} the same, {len(found.changed):,} changed, {len(found.only_a):,} only in A,"
        f" {len(found.only_b):,} only in B; tokens to train on: {found.tokens_a:,} in A, {found.tokens_b:,} in B"
    )
    if found.any:
        raise typer.Exit(1)
