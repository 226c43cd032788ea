"""What `moepp report` says of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline.stream import open_held_out
from moepp_ds.__main__ import app
from moepp_ds.config import RecipeError, load_recipe
from moepp_ds.report import print_report, report_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a run of 20 updates leaves it: loss 6 at first, 3 at the end, 2.5 nats on held-out text."""
    recipe = load_recipe("tests/golden/golden.yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    records = [{"step": step, "lm_loss": 6.0 if step < 19 else 3.0} for step in range(1, 21)]
    score = {"loss": 2.5, "bits_per_byte": 1.25, "tokens": 10}
    records[9]["validation"] = {source: {**score, "loss": 9.0} for source in open_held_out(recipe.data)}
    records[19]["validation"] = {source: score for source in open_held_out(recipe.data)}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_numbers_of_a_run(run: Path) -> None:
    """The last evaluation counts, the fall is from the first update to the last tenth, baselines are of the shards."""
    report = report_run(run)
    assert (report.steps, report.first_loss, report.last_loss, report.fall) == (20, 6.0, 3.0, 0.5)
    assert {source.loss for source in report.sources.values()} == {2.5}
    for source in report.sources.values():
        assert 2.5 < source.bigram < source.unigram
    assert report.beats("bigram") and report.beats("unigram")
    console = Console(record=True, width=160)
    print_report(report, console)
    text = console.export_text()
    assert "every source's loss is below that of a bigram and a unigram model" in text
    assert "training loss 6.000 at update 1, 3.000 at the end (20 updates): 50% lower" in text


def test_checks_decide_the_exit_code(run: Path) -> None:
    """--below and --fall fail a run that learned less; an unknown baseline is refused."""
    call = CliRunner().invoke
    assert call(app, ["report", str(run), "--below", "bigram", "--fall", "0.5"]).exit_code == 0
    assert call(app, ["report", str(run), "--fall", "0.51"]).exit_code == 1
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": 2.5', '"loss": 8.5'))
    assert call(app, ["report", str(run), "--below", "unigram"]).exit_code == 1
    refused = call(app, ["report", str(run), "--below", "trigram"])
    assert refused.exit_code == 2 and "trigram is no baseline" in refused.output


def test_a_folder_without_evaluation_is_named(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RecipeError, match="metrics.jsonl does not exist; name the folder of a run"):
        report_run(tmp_path / "nothing")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0])
    with pytest.raises(RecipeError, match="holds no evaluation yet; let the run go on"):
        report_run(run)


def test_a_run_on_raw_files_has_no_shards_to_compare_with(run: Path) -> None:
    streamed = ["data.mode=stream", "data.raw={dolma: raw/dolma, tokenizer: tokenizer.model}"]
    (run / "recipe.yaml").write_text(load_recipe("tests/golden/golden.yaml", streamed).dump())
    with pytest.raises(RecipeError, match="read raw files as it trained .*, and n-grams are counted in prepared"):
        report_run(run)
