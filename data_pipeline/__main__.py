"""The command line `moepp-data`: prepare corpora, look at what was prepared, prove that nothing was lost.

    sample     write small raw corpora in the three true formats, and a tokenizer
    build      raw corpora -> shards
    verify     read every byte of a shard set and check it
    describe   print a set, and a mixture over it, as trees
    count      read the raw files again: are all their tokens in the shards, and are the shares exact?
    show       print rows of the training stream as text

Input that cannot be used ends with one message and exit code 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import orjson
import typer
from rich.console import Console
from rich.text import Text

from data_pipeline.build import build_set
from data_pipeline.config import DataConfig, flatten_mixture
from data_pipeline.count import DEVIATION_BOUND, Counted, Tally, count_set
from data_pipeline.describe import describe_mixture, describe_set, show_rows
from data_pipeline.document import DataError
from data_pipeline.manifest import read_manifest
from data_pipeline.mixture import Mixture
from data_pipeline.progress import BuildProgress, simple_bar
from data_pipeline.sample import write_sample
from data_pipeline.stream import claim_files
from data_pipeline.verify import verify_set

app = typer.Typer(
    help="Prepare and inspect the training data of MoE++ models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Set = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the shard set.")]
_RedPajama = Annotated[Optional[Path], typer.Option(help="Folder of RedPajama: a folder per subset.")]
_Dolma = Annotated[Optional[Path], typer.Option(help="Folder of Dolma: .json.gz files.")]
_Pile = Annotated[Optional[Path], typer.Option(help="Folder of the Pile: train/NN.jsonl.zst.")]
_MIXTURE_HELP = 'Preset (strategy_1, strategy_2) or weights as JSON, such as \'{"dolma": 0.7, "pile": 0.3}\'.'
_Workers = Annotated[int, typer.Option(min=1, help="Processes; each takes one file at a time.")]


def _console() -> Console:
    """Standard output; in a file or a pipe lines are not broken at the 80 columns rich would assume."""
    return Console() if Console().is_terminal else Console(width=200)


def _corpora(redpajama: Path | None, dolma: Path | None, pile: Path | None) -> dict[str, Path]:
    given = {"redpajama": redpajama, "dolma": dolma, "pile": pile}
    return {name: path for name, path in given.items() if path is not None}


@app.command()
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


@app.command()
def build(
    out: _Set,
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json.")],
    redpajama: _RedPajama = None,
    dolma: _Dolma = None,
    pile: _Pile = None,
    held_out: Annotated[float, typer.Option(help="Share of documents kept for validation.")] = 0.005,
    workers: _Workers = 1,
    max_bad_share: Annotated[
        float, typer.Option(help="Share of a file's lines that may be bad; 10 lines always may.")
    ] = 0.001,
    eos: Annotated[
        Optional[str], typer.Option(help="End-of-document token, where the tokenizer leaves a choice.")
    ] = None,
) -> None:
    """Build shards from raw corpora. Run it again to go on after an interruption."""
    with BuildProgress(Console()) as progress:
        report = build_set(
            out,
            tokenizer_file=tokenizer,
            corpora=_corpora(redpajama, dolma, pile),
            held_out=held_out,
            workers=workers,
            max_bad_share=max_bad_share,
            eos=eos,
            watcher=progress,
        )
    files = report.manifest.files
    tokens, held = (sum(file.split(split).tokens for file in files) for split in ("train", "held_out"))
    bad_lines = sum(file.bad_lines for file in files)
    print(
        f"{report.built:,} files built, {report.kept:,} kept: {tokens:,} tokens to train on, {held:,}"
        " held out"
    )
    if bad_lines:
        print(f"{bad_lines:,} bad lines are in {out / 'quarantine'}")


@app.command()
def verify(out: _Set) -> None:
    """Read every shard in full: checksums, ids, document ends."""
    with simple_bar(Console(stderr=True), "bytes verified") as add:
        result = verify_set(out, add)
    for problem in result.problems:
        print(problem)
    if result.problems:
        raise DataError(f"{len(result.problems):,} problems in {out}; {result.shards:,} shards are sound")
    print(f"PASS: {result.shards:,} shards, {result.tokens:,} tokens, {result.bytes:,} bytes")


@app.command()
def describe(
    out: _Set,
    mixture: Annotated[Optional[str], typer.Option(help=_MIXTURE_HELP)] = None,
    token_budget: Annotated[
        Optional[int], typer.Option(min=1, help="Tokens of a run, to tell epochs.")
    ] = None,
) -> None:
    """Print what a set holds and how a mixture draws on it."""
    console = _console()
    console.print(describe_set(out))
    if mixture is not None:
        console.print(describe_mixture(out, _mixture(mixture), token_budget=token_budget))


@app.command()
def count(
    out: _Set,
    redpajama: _RedPajama = None,
    dolma: _Dolma = None,
    pile: _Pile = None,
    mixture: Annotated[Optional[str], typer.Option(help=_MIXTURE_HELP)] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Prefixes of the stream to check the shares at.")
    ] = 100_000,
    workers: _Workers = 1,
) -> None:
    """Prove that no token was lost: raw files against shards, and the mixture's shares at every prefix."""
    corpora = _corpora(redpajama, dolma, pile)
    failures = 0
    if corpora or mixture is None:
        with simple_bar(Console(stderr=True), "files counted") as add:
            counted = count_set(out, corpora, workers=workers, on_file=lambda file: add(1))
        failures += _print_counted(counted)
    if mixture is not None:
        failures += _print_deviations(out, mixture, rows)
    if failures:
        raise DataError(f"{failures:,} counts do not agree for {out}: see above")
    print("PASS")


def _print_counted(counted: Counted) -> int:
    for label in sorted({*counted.raw, *counted.shards}):
        raw, shards = counted.raw.get(label, Tally()), counted.shards.get(label, Tally())
        verdict = "equal" if raw == shards else f"but the shards hold {shards}"
        print(f"{label:28} {raw}: {verdict}")
    total = sum(counted.raw.values(), Tally())
    print(f"{'all':28} {total}")
    for problem in counted.problems:
        print(problem)
    return len(counted.problems)


def _print_deviations(out: Path, mixture: str, rows: int) -> int:
    """The largest deviation from its share of each source; how many are over the bound."""
    drawn_from = Mixture(flatten_mixture(_mixture(mixture)).weights)
    claim_files(read_manifest(out), drawn_from.names)
    deviations = drawn_from.largest_deviation(rows)
    print(
        f"largest deviation from its share, in rows, at every prefix of {rows:,} rows (bound"
        f" {DEVIATION_BOUND}):"
    )
    for name, deviation in deviations.items():
        print(f"{name:28} {deviation:.4f}")
    return sum(deviation > DEVIATION_BOUND for deviation in deviations.values())


@app.command()
def show(
    out: _Set,
    mixture: Annotated[str, typer.Option(help=_MIXTURE_HELP)],
    row: Annotated[int, typer.Option(min=0, help="Index of the first row in the training stream.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 1,
    seq_len: Annotated[int, typer.Option(min=1, help="Targets per row.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The run's data.seed.")] = 0,
) -> None:
    """Print rows of the training stream as text, with their sources and the ends of documents."""
    config = DataConfig(path=str(out), mixture=_mixture(mixture), seq_len=seq_len, seed=seed)
    console = _console()
    for text in show_rows(config, row, rows):
        console.print(text, soft_wrap=True)


def _mixture(given: str) -> str | dict[str, Any]:
    """The name of a preset, or the mapping that a JSON object spells; DataError when it is no sound mixture."""
    mixture: str | dict[str, Any] = given
    if given.lstrip().startswith("{"):
        try:
            mixture = orjson.loads(given)
        except orjson.JSONDecodeError as error:
            raise DataError(f"--mixture {given!r} is no JSON object ({error})") from None
    flatten_mixture(mixture)
    return mixture


def main() -> None:
    """Run the command line; print a `DataError`, or what the system refused, as one message and exit with 1."""
    try:
        app()
    except (DataError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(
            Text.assemble(("error: ", "bold red"), (str(error), "red"))
        )
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
