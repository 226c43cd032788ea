"""Diff: every way in which two sets can differ, and where the first differing document is."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from killed_builds import moepp_data
from shard_sets import write_set, write_shard

from data_pipeline.diff import diff_sets, first_different_document
from data_pipeline.document import DataError
from data_pipeline.manifest import read_manifest, write_manifest
from data_pipeline.shards import Shard

FILES = {
    "book": {"a": [[5, 6], [7], [8, 9, 10]], "b": [[11], [12]]},
    "wiki": {"c": [[13, 14]], "d": []},
}
HELD_OUT = {"book": {"a": [[20]]}}


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return write_set(tmp_path / "one", FILES, HELD_OUT)


def test_equal_sets(tmp_path: Path, one: Path) -> None:
    found = diff_sets(one, write_set(tmp_path / "two", FILES, HELD_OUT))
    assert not found.any
    assert (found.same, found.changed, found.settings, found.only_a, found.only_b) == (4, {}, [], [], [])
    assert found.tokens_a == found.tokens_b == 9 + 4 + 3


def test_changed_documents(tmp_path: Path, one: Path) -> None:
    changed = {"book": {**FILES["book"], "a": [[5, 6], [7, 7], [8, 9, 10]]}, "wiki": FILES["wiki"]}
    found = diff_sets(one, write_set(tmp_path / "two", changed))
    assert found.any and found.same == 3
    assert found.changed == {
        "made/a": [
            "train: 3 documents of 9 tokens in A, 3 of 10 in B; the first that differs is document 2",
            "held_out: 1 documents of 2 tokens in A, 0 of 0 in B",
        ]
    }


def test_files_on_one_side(tmp_path: Path, one: Path) -> None:
    found = diff_sets(one, write_set(tmp_path / "two", {"book": {**FILES["book"], "z": [[1000 - 1]]}}, HELD_OUT))
    assert (found.same, found.only_a, found.only_b) == (2, ["made/c", "made/d"], ["made/z"])
    assert (found.tokens_a, found.tokens_b) == (16, 15)


def test_other_settings(tmp_path: Path, one: Path) -> None:
    two = write_set(tmp_path / "two", FILES, HELD_OUT, part_tokens=4)
    manifest = read_manifest(two)
    settings = replace(manifest.settings, dedup=True, pile_exclude=("Books3", "Github"))
    files = [replace(file, bad_lines=3, duplicates=1, source="web") for file in manifest.files[3:]]
    write_manifest(two, replace(manifest, settings=settings, files=[*manifest.files[:3], *files]))
    found = diff_sets(one, two)
    assert found.settings == [
        ("part length", "8", "4"),
        ("excluded Pile sets", "none", "Books3, Github"),
        ("deduplication", "False", "True"),
    ]
    same_documents = "the same documents, with another tokenizer, text size or part length"
    assert found.changed == {
        "made/a": [f"train: {same_documents}", f"held_out: {same_documents}"],
        "made/b": [f"train: {same_documents}"],
        "made/c": [f"train: {same_documents}"],
        "made/d": ["bad lines 0 in A, 3 in B", "duplicates 0 in A, 1 in B", "source wiki in A, web in B"],
    }


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([[5], [6]], [[5], [6]], None),
        ([[5], [6]], [[7], [6]], 0),
        ([[5], [6]], [[5], [6, 6]], 1),
        ([[5, 6]], [[5]], 0),
        ([[5], [6], [7]], [[5], [6]], 2),
        ([[5]], [[5], [6]], 1),
        ([[], [5]], [[5]], 0),
    ],
)
def test_the_first_document_that_differs(
    tmp_path: Path, a: list[list[int]], b: list[list[int]], expected: int | None
) -> None:
    write_shard(tmp_path / "a", a)
    write_shard(tmp_path / "b", b)
    assert first_different_document(Shard(tmp_path / "a"), Shard(tmp_path / "b")) == expected
    assert first_different_document(Shard(tmp_path / "b"), Shard(tmp_path / "a")) == expected


def test_a_missing_shard_is_an_error(tmp_path: Path, one: Path) -> None:
    two = write_set(tmp_path / "two", {"book": {"a": [[5]]}})
    (two / "shards/made/a.train").unlink()
    with pytest.raises(DataError, match=re.escape(f"shard {two}/shards/made/a.train is missing")):
        diff_sets(one, two)
    with pytest.raises(DataError, match="holds no shard set"):
        diff_sets(one, tmp_path)


def test_the_command(tmp_path: Path, one: Path) -> None:
    two = write_set(tmp_path / "two", {"book": FILES["book"]})
    done = subprocess.run(moepp_data("diff", one, one), capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        ["4 files the same, 0 changed, 0 only in A, 0 only in B; tokens to train on: 16 in A, 16 in B"],
    )
    done = subprocess.run(moepp_data("diff", one, two), capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    assert done.stdout.splitlines() == [
        "changed: made/a: held_out: 1 documents of 2 tokens in A, 0 of 0 in B",
        "only in A: made/c",
        "only in A: made/d",
        "1 file the same, 1 changed, 2 only in A, 0 only in B; tokens to train on: 16 in A, 13 in B",
    ]
