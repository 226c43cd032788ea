"""Verify: a sound set passes, and every kind of damage is named, all of it in one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from raw_corpora import WORDS, write_corpora, write_tokenizer

from data_pipeline.build import build_set
from data_pipeline.manifest import read_manifest, shard_path
from data_pipeline.verify import verify_set


@pytest.fixture
def root(tmp_path: Path) -> Path:
    raw = write_corpora(tmp_path / "raw")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    build_set(tmp_path / "out", tokenizer_file=tokenizer, corpora=raw, held_out=0.1)
    return tmp_path / "out"


def test_a_sound_set_passes(root: Path) -> None:
    sizes: list[int] = []
    result = verify_set(root, sizes.append)
    splits = [split for file in read_manifest(root).files for split in (file.train, file.held_out)]
    assert result.problems == []
    assert result.shards == sum(1 for split in splits if split.documents) == len(sizes)
    assert result.tokens == sum(split.tokens for split in splits)
    assert (
        result.bytes
        == sum(sizes)
        == sum(path.stat().st_size for path in (root / "shards").rglob("*.*_*"))
        + sum(path.stat().st_size for path in (root / "shards").rglob("*.train"))
    )


def test_all_damage_is_named_in_one_run(root: Path) -> None:
    missing = shard_path(root, "pile/train/00.jsonl.zst", "train")
    missing.unlink()
    short = shard_path(root, "pile/train/01.jsonl.zst", "train")
    short.write_bytes(short.read_bytes()[:-1])
    flipped = shard_path(root, "redpajama/book/book.jsonl", "train")
    data = bytearray(flipped.read_bytes())
    data[300] ^= 4
    flipped.write_bytes(data)
    problems = verify_set(root).problems
    assert len(problems) == 3
    assert f"{missing} is missing" in problems[0]
    assert f"{short} has" in problems[1] and "cut short or grew" in problems[1]
    assert f"{flipped}: the tokens do not match their checksum" in problems[2]


def test_a_damaged_header_is_made_anew_by_the_build_that_its_message_asks_for(tmp_path: Path, root: Path) -> None:
    shard = shard_path(root, "redpajama/book/book.jsonl", "train")
    sound = shard.read_bytes()
    shard.write_bytes(sound[:50] + bytes([sound[50] ^ 1]) + sound[51:])
    (problem,) = verify_set(root).problems
    assert "has a damaged header (its checksum does not match); run `moepp-data build` again, which makes" in problem
    raw = {name: tmp_path / "raw" / name for name in ("redpajama", "dolma", "pile")}
    report = build_set(root, tokenizer_file=tmp_path / "tokenizer.json", corpora=raw, held_out=0.1)
    assert report.built == 1 and shard.read_bytes() == sound
    assert verify_set(root).problems == []


def test_another_tokenizer_beside_the_shards(root: Path) -> None:
    path = root / "tokenizer/tokenizer.json"
    write_tokenizer(path, [*WORDS, "more"])
    assert verify_set(root).problems == [
        f"{path} is not the tokenizer the shards were made with; copy it anew"
    ]
    path.unlink()
    assert "cannot read the tokenizer" in verify_set(root).problems[0]


def test_a_manifest_whose_counts_are_not_the_shards(root: Path) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"][0]["train"]["documents"] += 1
    (root / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify_set(root).problems
    assert "the manifest's counts for" in problem and "wiki-0.json.gz.train are not the shard's" in problem
