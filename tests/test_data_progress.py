"""Progress: what a build says in a log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from raw_corpora import write_corpora, write_tokenizer
from rich.console import Console

from data_pipeline import progress
from data_pipeline.build import build_set


def test_a_build_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_SECONDS", 0.0)
    raw = write_corpora(tmp_path / "raw")
    book = raw["redpajama"] / "book/book.jsonl"
    book.write_bytes(book.read_bytes() + b"bad line\n")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    log = io.StringIO()
    with progress.BuildProgress(Console(file=log, width=200)) as watcher:
        report = build_set(tmp_path / "out", tokenizer_file=tokenizer, corpora=raw, watcher=watcher)
    word_cache, *lines = log.getvalue().splitlines()
    assert word_cache == "no word cache for this tokenizer, so a slower build: it is a Hugging Face tokenizer"
    assert lines[0].startswith("building 6 files, ") and " are free" in lines[1]
    assert lines[-1].startswith("6/6 files  ") and lines[-1].endswith("1 bad lines  0:00:00 left")
    assert "MB/s)  " in lines[-1] and " tokens (" in lines[-1] and "/s)" in lines[-1]
    with progress.BuildProgress(Console(file=log, width=200)) as watcher:
        build_set(tmp_path / "out", tokenizer_file=tokenizer, corpora=raw, watcher=watcher)
    assert log.getvalue().splitlines()[-1] == "building 0 files, 0B; 6 already built"
    assert report.built == 6
