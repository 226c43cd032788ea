"""Describe and show: what people read, on a set of which every token is known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from raw_corpora import EOS, WORDS, ids_of, lines_of, write_raw, write_tokenizer
from rich.console import Console
from rich.tree import Tree
from shard_sets import counting_documents, write_set

from data_pipeline.build import build_set
from data_pipeline.config import DataConfig
from data_pipeline.describe import amount, describe_mixture, describe_set, mixture_facts, set_facts, show_rows
from data_pipeline.document import DataError
from data_pipeline.stream import open_stream

TRAIN = {
    "dolma/wiki": {"w0": counting_documents([9, 9], 10), "w1": counting_documents([19], 40)},
    "dolma/books": {"b0": counting_documents([59], 100)},
    "pile": {"p0": counting_documents([99], 200)},
}


def printed(*items: object) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        for item in items:
            console.print(item)
    return capture.get()


def mixture(root: Path, weights: str | dict[str, Any] | None, **options: Any) -> Tree:
    """A mixture over the set as a tree; rows of one token, so that budgets come out even."""
    budget = options.pop("token_budget", None)
    config = DataConfig(path=str(root), mixture=weights, **{"seq_len": 1, **options})
    return describe_mixture(mixture_facts(config, token_budget=budget))


def test_amounts() -> None:
    assert [amount(n) for n in (0, 950, 999, 1000, 1234, 999_949, 999_950, 10**12)] == [
        "0",
        "950",
        "999",
        "1.0K",
        "1.2K",
        "999.9K",
        "1.0M",
        "1.0T",
    ]


def test_a_set_as_a_tree(tmp_path: Path) -> None:
    lines = printed(describe_set(set_facts(write_set(tmp_path / "set", TRAIN, {"pile": {"p0": [[5]]}})))).splitlines()
    assert (
        f"{tmp_path}/set  4 files · to train on 5 documents, 200 tokens · held out 1 document, 2 tokens"
        " · 0.21 bytes a token" == lines[0]
    )
    assert [line.strip("├└─│ ").split("  ")[0] for line in lines[3:]] == [
        "sources",
        "dolma",
        "books",
        "wiki",
        "pile",
    ]
    assert "dolma  3 files · to train on 4 documents, 100 tokens · held out 0 documents, 0 tokens" in lines[4]
    assert "books  1 file · to train on 1 document, 60 tokens" in lines[5]
    assert "wiki  2 files · to train on 3 documents, 40 tokens" in lines[6]


def test_a_mixture_with_shares_and_epochs(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", TRAIN)
    text = printed(mixture(root, {"dolma/wiki": 3, "pile": 1}, token_budget=4000))
    assert "mixture  mixture weights sum to 4; they were scaled to sum to 1" in text
    # 3/4 of 4,000 tokens from 40 are 75 epochs; 1/4 of 4,000 from 100 are 10.
    assert (
        "dolma/wiki  75.0000% = 7,500 of 10,000 slots, 40 tokens, 75.00 epochs in a run of 4.0K tokens"
        in text
    )
    assert "pile  25.0000% = 2,500 of 10,000 slots, 100 tokens, 10.00 epochs in a run of 4.0K tokens" in text
    assert "dolma/books  has no weight: it is not trained on" in text


def test_stages_limits_and_the_end_of_the_stream(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", TRAIN)
    stages = [{"mixture": {"pile": 1, "dolma": 1}, "tokens": 100}, {"mixture": {"dolma": 1}}]
    options = {"stages": stages, "token_budget": 10_000, "max_epochs": {"dolma": 2}}
    text = printed(mixture(root, None, **options))
    # dolma gives 50 of its 100 tokens in the first stage, and 150 more: two epochs; the budget is not reached.
    for expected in (
        "stage 1  rows 0 to 99, 100 tokens",
        "dolma  50.0000% = 5,000 of 10,000 slots\n",
        "stage 2  rows 100 to 249, 150 tokens",
        "dolma  100 tokens, 2.00 epochs in a run of 250 tokens, at most 2 epochs",
        "pile  100 tokens, 0.50 epochs in a run of 250 tokens\n",
        "the stream ends after 250 rows = 250 tokens: dolma has given all of its epochs",
    ):
        assert expected in text
    reweighted = mixture_facts(
        DataConfig(path=str(root), mixture={"pile": 1, "dolma": 3}, seq_len=1, max_epochs=1, on_max_epochs="reweight"),
        token_budget=150,
    )
    # Of rows d d p d d d p d ..., the 101st d would be row 133.
    assert [stage["stop_row"] for stage in reweighted["stages"]] == [133, 200]
    assert reweighted["sources"] == {
        "dolma": {"tokens": 100, "max_epochs": 1.0, "tokens_drawn": 100, "epochs": 1.0},
        "pile": {"tokens": 100, "max_epochs": 1.0, "tokens_drawn": 50, "epochs": 0.5},
    }
    text = printed(describe_mixture(reweighted))
    assert "stage 1  rows 0 to 132, 133 tokens\n" in text
    assert "stage 2  rows 133 to 199, 67 tokens, after dolma ended\n" in text
    assert "dolma  100 tokens, 1.00 epochs in a run of 150 tokens, at most 1 epoch\n" in text


def test_rounded_weights_are_said(tmp_path: Path) -> None:
    text = printed(mixture(write_set(tmp_path / "set", TRAIN), {"dolma": 1, "pile": 2}))
    assert "dolma  33.3333% = 3,333 of 10,000 slots (rounded to 33.33%), 100 tokens" in text
    assert "pile  66.6667% = 6,667 of 10,000 slots (rounded to 66.67%), 100 tokens" in text


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=re.escape("'redpajama/arxiv' is not among the shards; they hold dolma/books, dolma/wiki")
    ):
        mixture(write_set(tmp_path / "set", TRAIN), "strategy_1")


def test_rows_as_text_with_sources_and_document_ends(tmp_path: Path) -> None:
    texts = [f"w{n} w{n + 1}" for n in range(30)]
    write_raw(tmp_path / "pile/00.jsonl", lines_of(texts))
    build_set(
        tmp_path / "set",
        tokenizer_file=write_tokenizer(tmp_path / "tokenizer.json"),
        corpora={"pile": tmp_path / "pile"},
        held_out=0.0,
    )
    config = DataConfig(path=str(tmp_path / "set"), mixture={"pile": 1}, seq_len=8, shuffle_window=4)
    shown = printed(*show_rows(config, 2, 1))
    row = open_stream(config).rows([2])[0].tolist()
    number = int(open_stream(config).locate([2]).row[0])
    assert f"row 2 · pile · its row {number}\n" in shown
    assert f"00.jsonl.train, tokens {8 * number} to {8 * number + 9}\n" in shown
    assert shown.count("── </s> end of document ──") == row.count(EOS) == 3
    for token in row:
        assert token == EOS or WORDS[token] in shown
    assert ids_of("w0") == [1]


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    words = ["<unk>", "a", "\x1b[31m"]
    write_raw(tmp_path / "pile/00.jsonl", lines_of(["a \x1b[31m a", "a a"]))
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", words)
    build_set(tmp_path / "set", tokenizer_file=tokenizer, corpora={"pile": tmp_path / "pile"}, held_out=0.0)
    config = DataConfig(path=str(tmp_path / "set"), mixture={"pile": 1}, seq_len=6, shuffle_window=1)
    shown = printed(*show_rows(config, 0, 1))
    assert "\x1b" not in shown and "\\x1b[31m" in shown
