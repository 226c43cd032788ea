"""What a run has learned, read from its folder: the fall of the training loss, and each source's held-out loss beside
that of n-gram models of the same training tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.feed import open_held_out
from data_pipeline.ngram import training_ngrams
from moepp_ds.config import Recipe, RecipeError, load_recipe


@dataclass(frozen=True)
class SourceReport:
    """One source's held-out text: nats per token of the model, of the n-gram models, and bits per byte."""

    loss: float
    bits_per_byte: float
    unigram: float
    bigram: float


@dataclass(frozen=True)
class RunReport:
    """A run in a few numbers: the loss of its first update (1, unless it began from another run's checkpoint) and the
    mean over the last tenth of its updates."""

    first_step: int
    steps: int
    first_loss: float
    last_loss: float
    sources: dict[str, SourceReport]

    @property
    def fall(self) -> float:
        """By what share of its first value the training loss fell."""
        return 1 - self.last_loss / self.first_loss

    def beats(self, model: str) -> bool:
        """Whether the held-out loss of every source is below that of `unigram` or `bigram`."""
        return all(source.loss < getattr(source, model) for source in self.sources.values())


def report_run(path: Path) -> RunReport:
    """Read a run folder and work out the n-gram baselines from the shards it trained on.

    Held-out rows are those the run's last evaluation scored. Raises RecipeError where there is no finished evaluation.
    """
    metrics = _read_metrics(path / "metrics.jsonl")
    recipe = load_recipe(path / "recipe.yaml")
    if recipe.data.mode == "stream":
        raise RecipeError(
            f"{path} read raw files as it trained (data.mode: stream), and n-grams are counted in prepared shards; its "
            "losses are in metrics.jsonl"
        )
    scored = next((record["validation"] for record in reversed(metrics) if "validation" in record), None)
    if scored is None:
        raise RecipeError(f"{path} holds no evaluation yet; let the run go on, or lower evaluation.every")
    if not scored:
        raise RecipeError(f"no text was held out of the shards of {path}; build them with moepp-data build --held-out")
    tail = metrics[-max(1, len(metrics) // 10) :]
    return RunReport(
        first_step=metrics[0]["step"],
        steps=metrics[-1]["step"],
        first_loss=metrics[0]["lm_loss"],
        last_loss=sum(record["lm_loss"] for record in tail) / len(tail),
        sources=_with_baselines(recipe, scored),
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise RecipeError(f"{path} does not exist; name the folder of a run, such as runs/NAME")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _with_baselines(recipe: Recipe, scored: dict[str, dict[str, float]]) -> dict[str, SourceReport]:
    ngrams = training_ngrams(recipe.data)
    reports = {}
    for source, texts in open_held_out(recipe.data, rows=recipe.evaluation.rows).items():
        unigram, bigram = ngrams.cross_entropy(*texts.rows(recipe.data.seq_len, recipe.evaluation.rows))
        score = scored[source]
        reports[source] = SourceReport(score["loss"], score["bits_per_byte"], unigram, bigram)
    return reports


def print_report(report: RunReport, console: Console) -> None:
    """The report as a table and two sentences."""
    table = Table("source", "loss", "bits/byte", "bigram", "unigram", title="held-out text, nats per token")
    for name, source in report.sources.items():
        numbers = (source.loss, source.bits_per_byte, source.bigram, source.unigram)
        table.add_row(name, *(f"{number:.3f}" for number in numbers))
    console.print(table)
    beaten = " and a ".join(model for model in ("bigram", "unigram") if report.beats(model))
    verdict = f"every source's loss is below that of a {beaten}" if beaten else "not every source's is below a unigram"
    console.print(f"{verdict} model of the training tokens (add-one smoothing)")
    console.print(
        f"training loss {report.first_loss:.3f} at update {report.first_step}, {report.last_loss:.3f} at the end "
        f"({report.steps} updates): {report.fall:.0%} lower"
    )
