"""`moepp-data` from the outside: every command on a small corpus, exit codes, and errors as one message."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from raw_corpora import write_corpora, write_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def moepp_data(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipeline", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def passes(*args: object) -> str:
    done = moepp_data(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fails(*args: object) -> str:
    """The message of a command that must fail with code 1 and without a traceback."""
    done = moepp_data(*args)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw corpora, a tokenizer and a set built from them by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    write_corpora(folder / "raw")
    write_tokenizer(folder / "tokenizer.json")
    out = passes(
        "build", folder / "set", "--tokenizer", folder / "tokenizer.json", *corpora(folder), "--held-out", 0.1
    )
    assert "building 6 files" in out
    assert "6 files built, 0 kept: " in out
    return folder


def corpora(folder: Path) -> list[object]:
    names = ("redpajama", "dolma", "pile")
    return [word for name in names for word in (f"--{name}", folder / "raw" / name)]


MIXTURE = '{"dolma": 0.5, "redpajama": {"book": 0.2}, "pile": 0.3}'


def test_build_again_keeps_everything(folder: Path) -> None:
    out = passes(
        "build", folder / "set", "--tokenizer", folder / "tokenizer.json", *corpora(folder), "--held-out", 0.1
    )
    assert "0 files built, 6 kept" in out


def test_tasks_finish_and_dedup(folder: Path, tmp_path: Path) -> None:
    options = ("--tokenizer", folder / "tokenizer.json", *corpora(folder))
    assert "neither i/n, such as 1/8" in fails("build", tmp_path / "set", *options, "--task", "1")
    out = passes("build", tmp_path / "set", *options, "--task", "1/1", "--dedup")
    assert "when all tasks have ended: moepp-data finish, with the same corpora" in out
    out = passes("finish", tmp_path / "set", *corpora(folder))
    assert "looking for equal texts among 223 documents" in out
    assert "0 files built, 6 kept: " in out


def test_verify(folder: Path) -> None:
    assert passes("verify", folder / "set").startswith("PASS: ")
    assert "holds no shard set" in fails("verify", folder)


def test_verify_fails_on_damage(folder: Path, tmp_path: Path) -> None:
    tokenizer = ("--tokenizer", folder / "tokenizer.json")
    passes("build", tmp_path / "set", *tokenizer, "--pile", folder / "raw/pile", "--held-out", 0)
    shard = tmp_path / "set/shards/pile/train/00.jsonl.zst.train"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = moepp_data("verify", tmp_path / "set")
    assert done.returncode == 1
    assert "00.jsonl.zst.train has" in done.stdout
    assert f"error: 1 problem in {tmp_path}/set, beside 1 sound shard" in done.stderr


def test_describe(folder: Path) -> None:
    out = passes("describe", folder / "set", "--mixture", MIXTURE, "--token-budget", 10_000)
    for expected in (
        "6 files",
        "tokenizer/tokenizer.json, 100 ids",
        "common_crawl",
        "epochs in a run of 10.0K tokens",
    ):
        assert expected in out
    assert "is not among the shards" in fails("describe", folder / "set", "--mixture", "strategy_1")
    assert "unknown mixture 'strategi_1' (nearest: 'strategy_1')" in fails(
        "describe", folder / "set", "--mixture", "strategi_1"
    )
    assert "name --mixture or --recipe too" in fails("describe", folder / "set", "--token-budget", 10_000)
    assert "is no JSON object" in fails("describe", folder / "set", "--mixture", "{dolma: 1}")
    small = '{"dolma": 1, "pile": 1e-9}'
    assert "'pile' is 1e-09 of the total, which rounds" in fails("describe", folder / "set", "--mixture", small)
    assert "and there is no such home folder" in fails("describe", "~no body/set", "--mixture", MIXTURE)


def test_count(folder: Path) -> None:
    out = passes("count", folder / "set", *corpora(folder), "--mixture", MIXTURE, "--rows", 20_000)
    assert out.endswith("PASS\n")
    assert "largest deviation from its share, in rows, at every prefix of 20,000 rows (bound 1.1):" in out
    assert "redpajama/book" in out and ": equal" in out
    assert out.startswith("raw files against shards; to train on and held out together:\n")
    assert "nothing to count" in fails("count", folder / "set")
    assert passes("count", folder / "set", "--mixture", MIXTURE).endswith("PASS\n")
    some = passes("count", folder / "set", "--pile", folder / "raw/pile")
    assert "not counted: dolma, redpajama; name --dolma, --redpajama too for the whole set\nPASS\n" in some


def test_count_fails_when_a_document_is_missing(folder: Path, tmp_path: Path) -> None:
    raw = write_corpora(tmp_path / "raw", documents=41)
    done = moepp_data("count", folder / "set", "--pile", raw["pile"])
    assert done.returncode == 1
    assert "but the shards hold" in done.stdout and "PASS" not in done.stdout
    assert f"error: 2 differences in {folder}/set: see above" in done.stderr


def test_show(folder: Path) -> None:
    options = ("--mixture", MIXTURE, "--seq-len", 16, "--row", 3, "--rows", 2)
    out = passes("show", folder / "set", *options)
    assert "row 3 · " in out and "row 4 · " in out and "end of document" in out
    assert "fewer than one row of 2048 + 1" in fails("show", folder / "set", "--mixture", MIXTURE)
    assert "unknown mixture 'strategy_3'" in fails("show", folder / "set", "--mixture", "strategy_3")


RECIPE = """
data:
  path: elsewhere
  seq_len: 16
  stages: [{mixture: {dolma: 1}, tokens: 160}, {mixture: {dolma: 1, pile: 1}}]
  max_epochs: {dolma: 3}
train: {token_budget: 1e4}
"""


def test_recipes_say_what_is_drawn(folder: Path, tmp_path: Path) -> None:
    """Stages, limits and budget of a recipe, over the set named or its own data.path."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    out = passes("describe", folder / "set", "--recipe", recipe)
    assert "stage 1  rows 0 to 9, 160 tokens" in out and "at most 3 epochs" in out
    end = re.search(r"the stream ends after [\d,]+ rows = (\S+) tokens: dolma has", out)
    assert end and f"epochs in a run of {end[1]} tokens" in out  # and not of the 10.0K of the budget
    recipe.write_text(RECIPE.replace("elsewhere", str(folder / "set")))
    facts = json.loads(passes("describe", "--recipe", recipe, "--json"))
    assert facts["mixture"]["ended_by"] == "dolma" and 2.9 < facts["mixture"]["sources"]["dolma"]["epochs"] <= 3
    assert {"documents", "tokens_per_byte", "duplicates", "excluded"} < facts["sources"][0].keys()
    assert "row 10 · " in passes("show", "--recipe", recipe, "--row", 10)
    out = passes("count", folder / "set", "--recipe", recipe, "--rows", 1000)
    assert "at every prefix of 10 rows from row 0 (bound 1.1)" in out and "rows from row 10 (bound 1.1)" in out
    assert "give one of them" in fails("show", folder / "set", "--recipe", recipe, "--mixture", MIXTURE)
    assert "leave --seq-len and --seed out" in fails("describe", "--recipe", recipe, "--seq-len", 32)
    assert "say what the rows are drawn by" in fails("show", folder / "set")
    assert "name a shard set (OUT)" in fails("describe")


def test_input_errors_are_one_message(folder: Path, tmp_path: Path) -> None:
    tokenizer = ("--tokenizer", folder / "tokenizer.json")
    assert "nothing to build" in fails("build", tmp_path / "set", *tokenizer)
    assert "does not exist; check the path" in fails(
        "build", tmp_path / "set", *tokenizer, "--pile", tmp_path / "no"
    )
    assert "cannot read the tokenizer" in fails(
        "build", tmp_path / "set", "--tokenizer", tmp_path / "no", "--pile", folder / "raw/pile"
    )
    (tmp_path / "file").touch()
    assert "File exists" in fails("build", tmp_path / "file", *tokenizer, "--pile", folder / "raw/pile")


def test_help_names_every_command() -> None:
    out = passes("--help")
    for command in ("sample", "build", "finish", "verify", "describe", "count", "show", "diff"):
        assert command in out
