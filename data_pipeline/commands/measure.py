"""Commands that measure: `moepp-data bench encode` and `moepp-data bench loader`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import orjson
import typer

from data_pipeline.bench.encode import LONG_CHARACTERS, EncodeResult, bench_encode
from data_pipeline.bench.loader import bench_loader
from data_pipeline.bench.texts import distinct_texts, python_folders
from data_pipeline.commands.common import MIXTURE_HELP, RECIPE_HELP, OptionalSet, SeqLen, choose_data
from data_pipeline.document import DataError

bench = typer.Typer(help="Measure the data path, each figure a ratio to something bare.", no_args_is_help=True)
_Json = Annotated[Optional[Path], typer.Option("--json", metavar="FILE", help="Write the figures there too.")]


@bench.command()
def encode(
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece .model.")],
    text: Annotated[
        Optional[list[Path]],
        typer.Option(help="File or folder of text; may be given again. Else all text of the running Python."),
    ] = None,
    megabytes: Annotated[float, typer.Option(help="Distinct text to take, in million bytes.")] = 64.0,
    repeat: Annotated[int, typer.Option(min=1, help="Times to have it in the corpus.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the parallel build.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Times to measure; medians count.")] = 3,
    long: Annotated[int, typer.Option(min=0, help="Characters of the long documents; 0 for none.")] = LONG_CHARACTERS,
    json: _Json = None,
) -> None:
    """Compare preparing shards to SentencePiece alone, on the same documents."""
    texts = distinct_texts(text or python_folders(), megabytes)
    print(f"{len(texts.texts):,} documents, {texts.bytes:,} distinct bytes, from {', '.join(texts.places)}")
    result = bench_encode(
        tokenizer, texts, workers=sorted({1, workers}), repeat=repeat, rounds=rounds, long_characters=long
    )
    _print_encode(result)
    _write(json, asdict(result), ratios=result.ratios)
    if result.mismatches:
        raise DataError(f"{result.mismatches:,} mismatches: not all ids are SentencePiece's; please report this text")


def _print_encode(result: EncodeResult) -> None:
    if result.repeat > 1:
        print(f"in the corpus {result.repeat} times: all but the first are repetitions, which prove no speed")
    print(f"{'':28} {'MB/s':>8} {'ratio':>8} {'by CPU time':>12} {'peak MB of a worker':>20}")
    print(f"{'SentencePiece alone':28} {result.megabytes_per_second(result.plain):8.2f} {1:8.2f} {1:12.2f}")
    rows = [("tokenizer", "tokenizer", result.tokenizer, "")]
    for workers, taken in result.build.items():
        peak = f"{result.peak_megabytes[workers]:20,.0f}"
        rows.append((f"build_{workers}", f"build, {workers} worker{'s' * (workers > 1)}", taken, peak))
    for key, name, taken, peak in rows:
        ratio = result.ratios[key]
        print(f"{name:28} {result.megabytes_per_second(taken):8.2f} {ratio['wall']:8.2f} {ratio['cpu']:12.2f} {peak}")
    for document in result.long_documents:
        print(
            f"one document of {document.characters:,} characters, {document.name}:"
            f" {document.megabytes_per_second:.2f} MB/s, {document.ratio:.2f} of the tokenizer's usual speed"
        )
    if result.hit_rate is None or result.encoded_bytes_share is None:
        print(f"the word cache is not used: {'; '.join(result.plain_because)}")
    else:
        print(
            f"hit rate {result.hit_rate:.4f}; SentencePiece was given {result.encoded_bytes_share:.2%} of the bytes"
        )
    print(f"{result.tokens:,} tokens compared in each round, {result.mismatches:,} mismatches")


@bench.command()
def loader(
    out: OptionalSet = None,
    mixture: Annotated[Optional[str], typer.Option(help=MIXTURE_HELP)] = None,
    recipe: Annotated[Optional[Path], typer.Option(help=RECIPE_HELP)] = None,
    seq_len: SeqLen = None,
    rows: Annotated[int, typer.Option(min=64, help="Rows to read, a multiple of 64.")] = 16_384,
    json: _Json = None,
) -> None:
    """Compare the loader to a bare gather of the same rows from a memory map."""
    chosen = choose_data(out, mixture, recipe, seq_len=seq_len)
    if chosen.config is None:
        raise DataError("say what the rows are drawn by: --mixture or --recipe")
    result = bench_loader(chosen.config, rows=rows)
    print(f"{'':14} {'rows/s':>12} {'ratio':>8} {'by CPU time':>12}")
    print(f"{'bare gather':14} {result.rows_per_second(result.gather):12,.0f} {1:8.2f} {1:12.2f}")
    ratios = result.ratios
    print(f"{'loader':14} {result.rows_per_second(result.loader):12,.0f} {ratios['wall']:8.2f} {ratios['cpu']:12.2f}")
    _write(json, asdict(result), ratios=ratios)


def _write(path: Path | None, figures: dict[str, Any], **derived: Any) -> None:
    if path is not None:
        options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
        path.write_bytes(orjson.dumps({**figures, **derived}, option=options) + b"\n")
