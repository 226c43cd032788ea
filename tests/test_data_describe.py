"""Describe and show: what people read, on a set of which every token is known."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from raw_corpora import EOS, WORDS, ids_of, lines_of, write_raw, write_tokenizer
from rich.console import Console
from shard_sets import counting_documents, write_set

from data_pipeline.build import build_set
from data_pipeline.config import DataConfig
from data_pipeline.describe import amount, describe_mixture, describe_set, show_rows
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
    lines = printed(describe_set(write_set(tmp_path / "set", TRAIN, {"pile": {"p0": [[5]]}}))).splitlines()
    assert (
        f"{tmp_path}/set  4 files · 5 documents · 200 tokens · 0.17 bytes a token · 2 tokens held out"
        == lines[0]
    )
    assert [line.strip("├└─│ ").split("  ")[0] for line in lines[3:]] == [
        "sources",
        "dolma",
        "books",
        "wiki",
        "pile",
    ]
    assert "dolma  3 files · 4 documents · 100 tokens" in lines[4]
    assert "wiki  2 files · 3 documents · 40 tokens" in lines[6]


def test_a_mixture_with_shares_and_epochs(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", TRAIN)
    text = printed(describe_mixture(root, {"dolma/wiki": 3, "pile": 1}, token_budget=4000))
    assert "mixture  mixture weights sum to 4; they were scaled to sum to 1" in text
    # 3/4 of 4,000 tokens from 40 are 75 epochs; 1/4 of 4,000 from 100 are 10.
    assert (
        "dolma/wiki  75.0000% = 7,500 of 10,000 slots, 40 tokens, 75.00 epochs in a run of 4.0K tokens"
        in text
    )
    assert "pile  25.0000% = 2,500 of 10,000 slots, 100 tokens, 10.00 epochs in a run of 4.0K tokens" in text
    assert "dolma/books  has no weight: it is not trained on" in text


def test_rounded_weights_are_said(tmp_path: Path) -> None:
    text = printed(describe_mixture(write_set(tmp_path / "set", TRAIN), {"dolma": 1, "pile": 2}))
    assert "dolma  33.3333% = 3,333 of 10,000 slots, 100 tokens (rounded to 33.33%)" in text
    assert "pile  66.6667% = 6,667 of 10,000 slots, 100 tokens (rounded to 66.67%)" in text


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=re.escape("'redpajama/book' is not among the shards (nearest: 'dolma/books'); they")
    ):
        describe_mixture(write_set(tmp_path / "set", TRAIN), "strategy_1")


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
