"""Commands that make things: sample corpora, shard sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from data_pipeline.build import BuildReport, build_set, finish_set
from data_pipeline.census import census
from data_pipeline.commands.common import (
    Dolma,
    MaxBadShare,
    Pile,
    RedPajama,
    SetFolder,
    Workers,
    named_corpora,
)
from data_pipeline.document import counted
from data_pipeline.manifest import DEFAULT_SPLIT_BYTES
from data_pipeline.progress import BuildProgress
from data_pipeline.sample import write_sample
from data_pipeline.tasks import parse_task


def sample(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them.")],
    megabytes: Annotated[float, typer.Option(help="Text, in million bytes.")] = 8.0,
    vocab_size: Annotated[int, typer.Option(help="Pieces of the tokenizer.")] = 4096,
) -> None:
    """Write sample corpora and train a tokenizer on them."""
    report = write_sample(directory, megabytes, vocab_size)
    for label, documents in report.documents.items():
        print(f"{label:28} {documents:7,} documents {report.text_bytes[label]:12,} bytes of text")
    print(f"{report.files} files and a tokenizer of {report.vocab_size:,} pieces in {directory}")


def build(
    out: SetFolder,
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json.")],
    redpajama: RedPajama = None,
    dolma: Dolma = None,
    pile: Pile = None,
    held_out: Annotated[float, typer.Option(help="Share of documents kept for validation.")] = 0.005,
    workers: Workers = 1,
    task: Annotated[
        Optional[str],
        typer.Option(
            metavar="I/N",
            help="Build only share I of N, counted from 1; `slurm` takes both from the job array. Then: finish.",
        ),
    ] = None,
    dedup: Annotated[bool, typer.Option("--dedup", help="Keep only the first of equal texts.")] = False,
    pile_exclude: Annotated[
        list[str], typer.Option(metavar="NAME", help="A set of the Pile to leave out; may be given again.")
    ] = [],
    split_bytes: Annotated[
        int, typer.Option(min=1, help="Read larger plain files in pieces of this many bytes.")
    ] = DEFAULT_SPLIT_BYTES,
    max_bad_share: MaxBadShare = 0.001,
    eos: Annotated[
        Optional[str], typer.Option(help="End-of-document token, where the tokenizer leaves a choice.")
    ] = None,
) -> None:
    """Build shards from raw corpora. Run it again to go on after an interruption."""
    with BuildProgress(Console()) as progress:
        report = build_set(
            out,
            tokenizer_file=tokenizer,
            corpora=named_corpora(redpajama, dolma, pile),
            held_out=held_out,
            workers=workers,
            max_bad_share=max_bad_share,
            eos=eos,
            split_bytes=split_bytes,
            pile_exclude=pile_exclude,
            dedup=dedup,
            task=parse_task(task) if task is not None else None,
            watcher=progress,
        )
    _print_report(out, report, whole=task is None)
    if task is not None:
        print("when all tasks have ended: moepp-data finish, with the same corpora")


def finish(
    out: SetFolder,
    redpajama: RedPajama = None,
    dolma: Dolma = None,
    pile: Pile = None,
    workers: Workers = 1,
    max_bad_share: MaxBadShare = 0.001,
) -> None:
    """Make a set of what `build --task` has built: duplicates, bad lines of whole corpora, the manifest."""
    corpora = named_corpora(redpajama, dolma, pile)
    with BuildProgress(Console()) as progress:
        report = finish_set(
            out, corpora=corpora, workers=workers, max_bad_share=max_bad_share, watcher=progress
        )
    _print_report(out, report, whole=True)


def _print_report(out: Path, report: BuildReport, *, whole: bool) -> None:
    sources = census(report.manifest)
    held_out = sum(source.held_out_tokens for source in sources)
    tokens = sum(source.tokens for source in sources) - held_out
    print(
        f"{counted(report.built, 'file')} built, {report.kept:,} kept: {counted(tokens, 'token')} to train on,"
        f" {held_out:,} held out"
    )
    for count, noun, what in (
        (sum(source.bad_lines for source in sources), "bad line", f"in {out / 'quarantine'}"),
        (sum(source.excluded for source in sources), "document", "passed over"),
        (sum(source.duplicates for source in sources), "document", "left out that equal an earlier one"),
    ):
        if count:
            print(f"{counted(count, noun)} {what}")
    if whole and report.manifest.settings.held_out:
        for label in report.without_held_out:
            print(f"warning: no text of {label} is held out, so its validation loss will not be known")
