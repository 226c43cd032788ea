"""A shard set for people: as a tree with sizes and shares, and its rows as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.text import Text
from rich.tree import Tree

from data_pipeline.config import DataConfig, flatten_mixture
from data_pipeline.manifest import FileRecord, Manifest, read_manifest
from data_pipeline.mixture import SLOTS, slot_quotas
from data_pipeline.stream import claim_files, open_stream
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

_UNITS = ("", "K", "M", "B", "T")


def amount(number: float) -> str:
    """A count in four characters or so: 950, 1.2K, 34.0M, 1.0T."""
    step = 0
    while abs(number) >= 999.95 and step < len(_UNITS) - 1:
        number, step = number / 1000, step + 1
    return f"{number:.1f}{_UNITS[step]}" if step else f"{number:,.0f}"


def describe_set(root: Path) -> Tree:
    """The set at `root` as a tree of its source labels, with files, documents, tokens and bad lines."""
    manifest = read_manifest(root)
    settings, tokenizer = manifest.settings, manifest.settings.tokenizer
    tree = Tree(f"[bold]{escape(str(root))}[/]  {_sizes(manifest.files)}")
    tree.add(
        f"tokenizer  {escape(tokenizer.file)}, {tokenizer.vocab_size:,} ids, end"
        f" {escape(tokenizer.eos_token)} = {tokenizer.eos_id}, {tokenizer.fingerprint[:12]}"
    )
    tree.add(f"held out  {settings.held_out:.3%} of documents; parts of {settings.part_tokens:,} tokens")
    branches: dict[str, Tree] = {"": tree.add("sources")}
    for label in manifest.labels():
        steps = label.split("/")
        for depth in range(len(steps)):
            name, above = "/".join(steps[: depth + 1]), "/".join(steps[:depth])
            if name not in branches:
                below = [file for file in manifest.files if f"{file.source}/".startswith(name + "/")]
                branches[name] = branches[above].add(f"[bold]{escape(steps[depth])}[/]  {_sizes(below)}")
    return tree


def _sizes(files: Sequence[FileRecord]) -> str:
    train, held_out = [file.train for file in files], [file.held_out for file in files]
    tokens, text_bytes = sum(split.tokens for split in train), sum(split.text_bytes for split in train)
    bad_lines = sum(file.bad_lines for file in files)
    parts = [
        f"{len(files):,} files",
        f"{amount(sum(split.documents for split in train))} documents",
        f"{amount(tokens)} tokens",
        f"{text_bytes / max(tokens, 1):.2f} bytes a token",
        f"{amount(sum(split.tokens for split in held_out))} tokens held out",
    ]
    return " · ".join(parts + ([f"[yellow]{bad_lines:,} bad lines[/]"] if bad_lines else []))


def describe_mixture(
    root: Path, mixture: str | Mapping[str, Any], *, token_budget: int | None = None
) -> Tree:
    """The mixture over the set at `root`: share and slots of each source, and its epochs at a token
    budget."""
    manifest = read_manifest(root)
    flat = flatten_mixture(mixture)
    quotas = slot_quotas(flat.weights)
    claimed = claim_files(manifest, list(flat.weights))
    title = mixture if isinstance(mixture, str) else "mixture"
    tree = Tree(f"[bold]{escape(title)}[/]" + (f"  [yellow]{flat.notice}[/]" if flat.notice else ""))
    for name, weight in flat.weights.items():
        tokens = sum(file.train.tokens for file in claimed[name])
        line = (
            f"[bold]{escape(name)}[/]  {float(weight):.4%} = {quotas[name]:,} of {SLOTS:,} slots,"
            f" {amount(tokens)} tokens"
        )
        if weight * SLOTS != quotas[name]:
            line += f" [yellow](rounded to {quotas[name] / SLOTS:.2%})[/]"
        if token_budget is not None and tokens:
            epochs = token_budget * quotas[name] / SLOTS / tokens
            line += f", {epochs:.2f} epochs in a run of {amount(token_budget)} tokens"
        tree.add(line)
    for label in _unclaimed(manifest, claimed):
        tree.add(f"[yellow]{escape(label)}  has no weight: it is not trained on[/]")
    return tree


def _unclaimed(manifest: Manifest, claimed: Mapping[str, Sequence[FileRecord]]) -> list[str]:
    used = {file.source for files in claimed.values() for file in files}
    return [label for label in manifest.labels() if label not in used]


def show_rows(config: DataConfig, first: int, count: int) -> Iterator[Text]:
    """Rows `first`, `first` + 1, ... of the training stream as text, with their sources and document ends."""
    manifest = read_manifest(Path(config.path))
    info = manifest.settings.tokenizer
    tokenizer = load_tokenizer(Path(config.path, info.file), info.eos_token)
    stream = open_stream(config)
    for index in range(first, first + count):
        located = stream.locate([index])
        yield Text(
            f"row {index:,} · {stream.source_names[located.source[0]]} · its row {located.row[0]:,}",
            style="bold cyan",
        )
        for file, offset, length in stream.pieces(index):
            yield Text(f"  {file}, tokens {offset:,} to {offset + length:,}", style="cyan")
        yield _row_text(stream.rows([index])[0].tolist(), tokenizer)


def _row_text(ids: list[int], tokenizer: Tokenizer) -> Text:
    """The row decoded, document by document, with a mark at each end of a document."""
    text = Text()
    start = 0
    for place, token in enumerate(ids + [tokenizer.eos_id]):
        if token == tokenizer.eos_id:
            decoded = tokenizer.decode(ids[start:place])
            text.append("".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in decoded))
            if place < len(ids):
                text.append(f"\n── {tokenizer.eos_token} end of document ──\n", style="magenta")
            start = place + 1
    return text
