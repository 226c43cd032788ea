"""Count: raw files against shards, to the token, and every way they can differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from raw_corpora import ids_of, lines_of, write_corpora, write_raw, write_tokenizer

from data_pipeline.build import build_set
from data_pipeline.count import Tally, count_set
from data_pipeline.document import DataError


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    raw = write_corpora(tmp_path / "raw")
    book = raw["redpajama"] / "book/book.jsonl"
    book.write_bytes(book.read_bytes() + b"bad line\n")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    build_set(tmp_path / "out", tokenizer_file=tokenizer, corpora=raw, held_out=0.1)
    return tmp_path / "out", raw


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_lost(made: tuple[Path, dict[str, Path]], workers: int) -> None:
    root, raw = made
    counted = count_set(root, raw, workers=workers)
    assert counted.problems == []
    assert counted.raw == counted.shards
    lines = (raw["redpajama"] / "book/book.jsonl").read_text().splitlines()[:-1]
    tokens = sum(len(ids_of(json.loads(line)["text"])) + 1 for line in lines)
    assert counted.raw["redpajama/book"] == Tally(documents=40, tokens=tokens, bad_lines=1)
    assert {label: tally.documents for label, tally in counted.raw.items()} == {
        "redpajama/book": 40,
        "redpajama/common_crawl": 20,
        "dolma/wiki": 83,
        "pile": 80,
    }


def test_a_raw_file_that_changed_after_the_build(made: tuple[Path, dict[str, Path]]) -> None:
    root, raw = made
    write_raw(raw["dolma"] / "wiki/wiki-1.json.gz", lines_of(["w1 w2", "w3"]))
    (problem,) = count_set(root, {"dolma": raw["dolma"]}).problems
    assert "wiki-1.json.gz holds 2 documents, 5 tokens, 0 bad lines; its shards hold 3 documents, " in problem


def test_files_on_one_side_only(made: tuple[Path, dict[str, Path]]) -> None:
    root, raw = made
    (raw["pile"] / "train/00.jsonl.zst").rename(raw["pile"] / "train/07.jsonl.zst")
    new, gone = count_set(root, {"pile": raw["pile"]}).problems
    assert "07.jsonl.zst is not in the set: run `moepp-data build` again to add it" in new
    assert gone == "the set holds pile/train/00.jsonl.zst, which is not among the raw files any more"


def test_no_corpus_named(made: tuple[Path, dict[str, Path]]) -> None:
    with pytest.raises(DataError, match="nothing to count: name at least one corpus folder"):
        count_set(made[0], {})
