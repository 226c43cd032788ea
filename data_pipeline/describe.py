"""A shard set for people: as a tree with sizes and shares, and its rows as text.

The trees are made of facts in JSON values, which `moepp-data describe --json` prints as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.text import Text
from rich.tree import Tree

from data_pipeline.census import census
from data_pipeline.config import DataConfig
from data_pipeline.document import counted
from data_pipeline.manifest import read_manifest
from data_pipeline.stream import claim_files, open_mixture, open_stream, source_tokens
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.weights import SLOTS

_UNITS = ("", "K", "M", "B", "T")


def amount(number: float) -> str:
    """A count in four characters or so: 950, 1.2K, 34.0M, 1.0T."""
    step = 0
    while abs(number) >= 999.95 and step < len(_UNITS) - 1:
        number, step = number / 1000, step + 1
    return f"{number:.1f}{_UNITS[step]}" if step else f"{number:,.0f}"


def set_facts(root: Path) -> dict[str, Any]:
    """What the set at `root` holds, in JSON values: its settings, and a census by source label."""
    manifest = read_manifest(root)
    sources = census(manifest)
    return {
        "path": str(root),
        "settings": asdict(manifest.settings),
        "sources": [{**asdict(one), "tokens_per_byte": one.tokens_per_byte} for one in sources],
    }


def describe_set(facts: Mapping[str, Any]) -> Tree:
    """`set_facts` as a tree of source labels, with files, documents, tokens and what was left out."""
    settings, sources = facts["settings"], facts["sources"]
    tokenizer = settings["tokenizer"]
    tree = Tree(f"[bold]{escape(facts['path'])}[/]  {_sizes(sources)}")
    tree.add(
        f"tokenizer  {escape(tokenizer['file'])}, {tokenizer['vocab_size']:,} ids, end"
        f" {escape(tokenizer['eos_token'])} = {tokenizer['eos_id']}, {tokenizer['fingerprint'][:12]}"
    )
    left_out = ", ".join(settings["pile_exclude"])
    tree.add(
        f"held out  {settings['held_out']:.3%} of documents; parts of {settings['part_tokens']:,} tokens"
        + ("; equal texts once" if settings["dedup"] else "")
        + (f"; without {escape(left_out)} of the Pile" if left_out else "")
    )
    branches: dict[str, Tree] = {"": tree.add("sources")}
    for label in (one["source"] for one in sources):
        steps = label.split("/")
        for depth in range(len(steps)):
            name, above = "/".join(steps[: depth + 1]), "/".join(steps[:depth])
            if name not in branches:
                below = [one for one in sources if f"{one['source']}/".startswith(name + "/")]
                branches[name] = branches[above].add(f"[bold]{escape(steps[depth])}[/]  {_sizes(below)}")
    return tree


def _sizes(sources: Sequence[Mapping[str, Any]]) -> str:
    total: Counter[str] = Counter()
    for one in sources:
        total.update({key: value for key, value in one.items() if isinstance(value, int)})
    documents, tokens = total["held_out_documents"], total["held_out_tokens"]
    parts = [
        counted(total["files"], "file"),
        f"to train on {_texts(total['documents'] - documents, total['tokens'] - tokens)}",
        f"held out {_texts(documents, tokens)}",
        f"{total['text_bytes'] / max(total['tokens'], 1):.2f} bytes a token",
    ]
    left_out = {"bad_lines": ("bad line", ""), "excluded": ("document", " excluded"), "duplicates": ("duplicate", "")}
    parts += [f"[yellow]{counted(total[key], noun)}{how}[/]" for key, (noun, how) in left_out.items() if total[key]]
    return " · ".join(parts)


def _texts(documents: int, tokens: int) -> str:
    return f"{counted(documents, 'document', amount)}, {counted(tokens, 'token', amount)}"


def mixture_facts(config: DataConfig, *, token_budget: int | None = None) -> dict[str, Any]:
    """What a run with this configuration draws from the set at `config.path`, in JSON values.

    Stages are those of the recipe and those that begin where a source has given its epochs. With a budget,
    `tokens_drawn` and `epochs` tell what the run takes of each source, whole rows alone.
    """
    manifest = read_manifest(Path(config.path))
    tokens = source_tokens(config, manifest)
    mixture = open_mixture(config, tokens)
    rows = None
    if token_budget is not None:
        asked = token_budget // config.seq_len
        rows = asked if mixture.rows_total is None else min(asked, mixture.rows_total)
    drawn = mixture.drawn(rows or 0)
    sources: dict[str, dict[str, Any]] = {}
    for name in mixture.names:
        limit = config.epoch_limit(name)
        sources[name] = {"tokens": tokens[name], "max_epochs": None if limit is None else float(limit)}
        if rows is not None:
            sources[name]["tokens_drawn"] = drawn[name] * config.seq_len
            sources[name]["epochs"] = drawn[name] * config.seq_len / tokens[name] if tokens[name] else None
    used = {file.source for files in claim_files(manifest, mixture.names).values() for file in files}
    return {
        "mixture": config.mixture if isinstance(config.mixture, str) else None,
        "notices": config.notices,
        "seq_len": config.seq_len,
        "token_budget": token_budget,
        "stages": [
            {
                "first_row": stage.start,
                "stop_row": stage.stop,
                "ended": list(stage.ended),
                "sources": {
                    name: {"weight": float(weight), "slots": quota, "rounded": weight * SLOTS != quota}
                    for (name, weight), quota in zip(stage.mixture.weights.items(), stage.mixture.quotas.values())
                },
            }
            for stage in mixture.stages
        ],
        "rows_total": mixture.rows_total,
        "ended_by": mixture.ended_by,
        "sources": sources,
        "without_weight": [label for label in manifest.labels() if label not in used],
    }


def describe_mixture(facts: Mapping[str, Any]) -> Tree:
    """`mixture_facts` as a tree: share and slots of each source in each stage, and its epochs at the budget."""
    title = facts["mixture"] or "mixture"
    tree = Tree(f"[bold]{escape(title)}[/]" + "".join(f"  [yellow]{notice}[/]" for notice in facts["notices"]))
    stages = facts["stages"]
    for number, stage in enumerate(stages, start=1):
        branch = tree if len(stages) == 1 else tree.add(_stage_line(number, stage, facts["seq_len"]))
        for name, share in stage["sources"].items():
            line = f"[bold]{escape(name)}[/]  {share['weight']:.4%} = {share['slots']:,} of {SLOTS:,} slots"
            if share["rounded"]:
                line += f" [yellow](rounded to {share['slots'] / SLOTS:.2%})[/]"
            branch.add(line + (f", {_epochs(facts, name)}" if branch is tree else ""))
    if len(stages) > 1:
        branch = tree.add("sources")
        for name in facts["sources"]:
            branch.add(f"[bold]{escape(name)}[/]  {_epochs(facts, name)}")
    if facts["rows_total"] is not None:
        tree.add(
            f"[yellow]the stream ends after {facts['rows_total']:,} rows ="
            f" {amount(facts['rows_total'] * facts['seq_len'])} tokens: {escape(facts['ended_by'])} has given all of"
            " its epochs[/]"
        )
    for label in facts["without_weight"]:
        tree.add(f"[yellow]{escape(label)}  has no weight: it is not trained on[/]")
    return tree


def _stage_line(number: int, stage: Mapping[str, Any], seq_len: int) -> str:
    first, stop = stage["first_row"], stage["stop_row"]
    after = f", after {escape(', '.join(stage['ended']))} ended" if stage["ended"] else ""
    if stop is None:
        return f"stage {number}  from row {first:,} on{after}"
    return f"stage {number}  rows {first:,} to {stop - 1:,}, {amount((stop - first) * seq_len)} tokens{after}"


def _epochs(facts: Mapping[str, Any], name: str) -> str:
    source, run = facts["sources"][name], facts["token_budget"]
    line = counted(source["tokens"], "token", amount)
    if source.get("epochs") is not None:
        if facts["rows_total"] is not None:  # the stream may end before the budget is spent
            run = min(run, facts["rows_total"] * facts["seq_len"])
        line += f", {source['epochs']:.2f} epochs in a run of {amount(run)} tokens"
    limit = source["max_epochs"]
    return line + ("" if limit is None else f", at most {counted(limit, 'epoch', '{:g}'.format)}")


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
