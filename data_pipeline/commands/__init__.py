"""The command line `moepp-data`: prepare corpora, look at what was prepared, prove that nothing was lost.

    sample     write small raw corpora in the three true formats, and a tokenizer
    build      raw corpora -> shards, all of them or the share of one task
    finish     what several tasks have built -> one set
    verify     read every byte of a shard set and check it
    describe   print a set, and a mixture over it, as trees
    count      read the raw files again: are all their tokens in the shards, and are the shares exact?
    show       print rows of the training stream as text
    diff       compare two sets
    bench      measure preparing and loading against the bare libraries

The commands are functions: prepare (sample, build, finish), look (describe, show), compare (diff), prove (verify,
count), measure (bench). Input that cannot be used ends with one message and exit code 1.
"""

from __future__ import annotations

import typer
from rich.console import Console
from rich.text import Text

from data_pipeline.commands import compare, look, measure, prepare, prove
from data_pipeline.document import DataError

app = typer.Typer(
    help="Prepare and inspect the training data of MoE++ models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    *(prepare.sample, prepare.build, prepare.finish),
    *(prove.verify, look.describe, prove.count, look.show, compare.diff),
):
    app.command()(command)
app.add_typer(measure.bench, name="bench")


def run() -> None:
    """Run the command line; print a `DataError`, or what the system refused, as one message and exit with 1."""
    try:
        app()
    except (DataError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(
            Text.assemble(("error: ", "bold red"), (str(error), "red"))
        )
        raise SystemExit(1) from None
