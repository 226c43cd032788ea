"""Census: sums over the files of a source, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shard_sets import write_set

from data_pipeline.census import SourceCensus, census
from data_pipeline.manifest import read_manifest


def test_the_census_of_a_set(tmp_path: Path) -> None:
    files = {"book": {"a": [[5, 6], [7], [8, 9, 10]], "b": [[11], [12]]}, "wiki": {"c": [[13, 14]], "d": []}}
    manifest = read_manifest(write_set(tmp_path, files, {"book": {"a": [[20]]}}))  # 7 bytes of text a document
    noted = [replace(file, input_bytes=100, bad_lines=1, excluded=2, duplicates=3) for file in manifest.files]
    book, wiki = census(replace(manifest, files=noted))
    assert book == SourceCensus(
        source="book",
        files=2,
        input_bytes=200,
        documents=6,
        held_out_documents=1,
        text_bytes=42,
        tokens=15,
        held_out_tokens=2,
        bad_lines=2,
        excluded=4,
        duplicates=6,
    )
    assert book.tokens_per_byte == 15 / 42
    assert (wiki.documents, wiki.tokens, wiki.text_bytes) == (1, 3, 7)


def test_a_source_without_text(tmp_path: Path) -> None:
    (empty,) = census(read_manifest(write_set(tmp_path, {"book": {"a": []}})))
    assert (empty.files, empty.documents, empty.tokens_per_byte) == (1, 0, 0.0)
