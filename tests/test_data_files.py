"""Locations to files: which of them are data, under which names, and where large ones are cut."""

from __future__ import annotations

import os
import re
from pathlib import Path

import fsspec
import pytest
from raw_corpora import ONE, SPLIT, labels, touch, write_raw

from data_pipeline.document import BadLine, DataError, Document, RawFile
from data_pipeline.readers import READERS, local_folder, read_documents, reader_for
from data_pipeline.readers.files import data_files


def names(location: str | Path) -> list[str]:
    return [file.name for file in data_files(location, split_bytes=SPLIT).files]


# --- folders ---


@pytest.mark.parametrize("corpus", READERS)
def test_paths_are_absolute_and_names_are_relative(tmp_path, corpus, monkeypatch):
    touch(tmp_path, "corpus/book/a.jsonl")
    monkeypatch.chdir(tmp_path)
    (file,) = reader_for(corpus).find_files(Path("corpus"), split_bytes=SPLIT)
    assert (file.name, file.path) == ("book/a.jsonl", str(tmp_path / "corpus/book/a.jsonl"))


def test_hidden_and_other_files_are_not_data_but_links_are(tmp_path):
    touch(tmp_path / "elsewhere", "b.jsonl", "deep/c.jsonl")
    root = touch(tmp_path / "corpus", "a.jsonl", ".cache/x.jsonl.zst", ".hidden.jsonl")
    touch(root, "README.md", "urls.txt")
    touch(root, "infos.json", "sub/0.json", data=b'{"default": {"features": {"text": "string"}}}')
    touch(root, "pretty.json", data=b'{\n  "text": "x"\n}\n')
    (root / "wiki").symlink_to(tmp_path / "elsewhere")
    assert list(labels("dolma", root)) == ["a.jsonl", "wiki/b.jsonl", "wiki/deep/c.jsonl"]
    (tmp_path / "elsewhere" / "loop").symlink_to(root)
    with pytest.raises(DataError, match=r"wiki/loop is a link to a folder it lies in .*; remove the link"):
        labels("dolma", root)


def test_what_cannot_be_read_or_would_be_read_twice_is_named(tmp_path):
    root = touch(tmp_path, "wiki/a.jsonl")
    (root / "latest").symlink_to(root / "wiki")
    with pytest.raises(DataError, match=r"latest/a.jsonl and .*wiki/a.jsonl are links to one file"):
        labels("dolma", root)
    (root / "latest").unlink()
    (root / "b.jsonl").symlink_to(root / "gone.jsonl")
    for location in (root, f"{root}/*"):
        with pytest.raises(DataError, match=r"b.jsonl is a broken link or no regular file"):
            labels("dolma", location)
    (root / "b.jsonl").unlink()
    os.mkfifo(root / "c.jsonl")
    for location in (root, f"{root}/*.jsonl"):
        with pytest.raises(DataError, match=r"c.jsonl is a broken link or no regular file"):
            labels("dolma", location)


@pytest.mark.parametrize("name", ["a.arrow", "b.jsonl.xz", "c.jsonl.zst.part", "d.gz", "e.jsonl.zstd", "E.TAR"])
def test_data_in_another_form_is_an_error_rather_than_passed_over(tmp_path, name):
    touch(tmp_path, "good.jsonl")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{re.escape(name)} \(1 such files\) would not be read.*move it"):
        labels("dolma", tmp_path)


def test_folders_that_are_missing_empty_or_files(tmp_path):
    with pytest.raises(DataError, match=".*absent does not exist; check the path"):
        labels("pile", tmp_path / "absent")
    with pytest.raises(DataError, match=r"no corpus files below .*: none ends in \.jsonl, "):
        labels("pile", tmp_path)
    with pytest.raises(DataError, match=r"README.md has none of the known suffixes \.jsonl, .*\.parquet; rename"):
        labels("pile", touch(tmp_path, "README.md") / "README.md")
    with pytest.raises(DataError, match=r"the pattern .*absent/\*\.jsonl matches no file that ends in \.jsonl, "):
        labels("pile", tmp_path / "absent" / "*.jsonl")


def test_a_file_name_that_is_no_text_is_refused(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.jsonl", "wb") as file:
        file.write(ONE)
    with pytest.raises(DataError, match=r"'\\udcff.jsonl' in .* is not valid UTF-8; rename the file"):
        labels("dolma", tmp_path)


def test_json_lines_under_another_name_are_not_passed_over_in_silence(tmp_path):
    touch(tmp_path, "a.ndjson", data=ONE)
    assert names(tmp_path) == ["a.ndjson"]
    touch(tmp_path, "b.json", data=b'{"text": "' + b"x" * 100_000 + b'"}\n' + ONE)
    with pytest.raises(DataError, match=r"b\.json holds JSON lines with a text, but is named \.json, .*rename"):
        names(tmp_path)


# --- single files and patterns ---


def test_a_single_file_is_named_after_itself(tmp_path):
    touch(tmp_path / "book", "a.jsonl", "b.jsonl")
    assert labels("redpajama", tmp_path / "book" / "a.jsonl") == {"a.jsonl": "redpajama/book"}


def test_patterns_name_files_from_the_longest_folder_without_wildcards(tmp_path, monkeypatch):
    touch(tmp_path / "dolma", "wiki/w-0.json.gz", "wiki/w-1.json.gz")
    touch(tmp_path / "dolma", "cc_en_head/c-0.json.gz", "cc_en_tail/c-0.json.gz")
    touch(tmp_path / "dolma", "books/.hidden.json.gz", "wiki/README.md")
    firsts = ["cc_en_head/c-0.json.gz", "cc_en_tail/c-0.json.gz", "wiki/w-0.json.gz"]
    assert names(tmp_path / "dolma" / "*" / "*-0.json.gz") == firsts
    assert names(f"{tmp_path}/dolma/wiki/w-[01]*") == ["w-0.json.gz", "w-1.json.gz"]
    everything = [*firsts, "wiki/w-1.json.gz"]
    assert names(f"{tmp_path}/dolma/**") == everything, "a folder and the files in it match, and count once"
    monkeypatch.chdir(tmp_path)
    assert names("dolma/cc_*") == everything[:2], "folders that match are walked"
    assert names(Path("dolma/*")) == everything
    assert labels("dolma", "dolma/cc_*")["cc_en_head/c-0.json.gz"] == "dolma/cc_en_head"


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path):
    assert names(touch(tmp_path / "v[1]", "a.jsonl")) == ["a.jsonl"]


def test_the_folder_a_location_reads_from(tmp_path):
    root = touch(tmp_path, "x/a.jsonl")
    assert local_folder(root) == local_folder(f"file://{root}/*.jsonl") == local_folder(str(root / "*")) == root
    assert local_folder(root / "x" / "a.jsonl") == root / "x" / "a.jsonl"
    assert local_folder("s3://bucket/dolma") is local_folder("memory://x/*") is local_folder("hub:a/b:c") is None


# --- URLs ---


@pytest.fixture
def memory(tmp_path):
    """A folder of the in-memory file system, as a stand-in for remote storage."""
    root = f"/{tmp_path.name}"
    file_system = fsspec.filesystem("memory")
    for name in ("wiki/w-0.json.gz", "wiki/w-1.jsonl.zst", "books/b.jsonl"):
        write_raw(tmp_path / name, b'{"text": "one"}\n\nbad\n{"text": "two"}')
        file_system.pipe_file(f"{root}/{name}", (tmp_path / name).read_bytes())
    for name in ("wiki/README.md", "wiki/.hidden.jsonl", ".git/x.jsonl"):
        file_system.pipe_file(f"{root}/{name}", ONE)
    yield f"memory:/{root}"
    file_system.rm(root, recursive=True)


def test_urls_of_folders_patterns_and_files(memory):
    assert labels("dolma", memory) == {
        "books/b.jsonl": "dolma/books",
        "wiki/w-0.json.gz": "dolma/wiki",
        "wiki/w-1.jsonl.zst": "dolma/wiki",
    }
    assert names(f"{memory}/*/w-*") == ["wiki/w-0.json.gz", "wiki/w-1.jsonl.zst"]
    assert names(f"{memory}/w*") == ["wiki/w-0.json.gz", "wiki/w-1.jsonl.zst"]
    assert names(f"{memory}/wiki/w-0.json.gz") == ["w-0.json.gz"]


def test_remote_files_read_like_local_ones(memory, tmp_path):
    for remote, local in zip(
        data_files(memory, split_bytes=SPLIT).files, data_files(tmp_path, split_bytes=SPLIT).files, strict=True
    ):
        assert (remote.name, remote.size) == (local.name, local.size)
        assert remote.path.endswith(f"/{tmp_path.name}/{remote.name}")
        items = list(read_documents(remote, "dolma"))
        assert items == list(read_documents(local, "dolma"))
        assert [(type(item), item.line) for item in items] == [(Document, 1), (BadLine, 3), (Document, 4)]


def test_the_version_of_a_file_changes_with_its_content(memory, tmp_path):
    def versions(location):
        return {file.name: file.version for file in data_files(location, split_bytes=SPLIT).files}

    for location in (memory, tmp_path):
        before = versions(location)
        assert versions(location) == before
        with fsspec.open(f"{location}/books/b.jsonl", "wb") as file:
            file.write(ONE * 2)
        after = versions(location)
        assert {name for name in before if before[name] != after[name]} == {"books/b.jsonl"}


def test_urls_that_cannot_be_read(memory):
    for url, message in {
        f"{memory}/absent": "memory://.*/absent does not exist, or may not be read; check the URL",
        f"{memory}/wiki/README.md": "README.md has none of the known suffixes",
        "nonsense://x": "cannot read nonsense://x: Protocol not known: nonsense",
        f"simplecache::{memory}": "is a chain of file systems, which is not read",
        f"{memory}/*.parquet": "the pattern memory://.* matches no file",
    }.items():
        with pytest.raises(DataError, match=message):
            names(url)
    gone = RawFile(f"{memory}/gone.jsonl", "gone.jsonl", "dolma", 1, "1")
    with pytest.raises(DataError, match=r"cannot read memory://.*/gone\.jsonl"):
        list(read_documents(gone, "dolma"))


def test_file_urls_are_local_files(tmp_path):
    (file,) = data_files(f"file://{touch(tmp_path, 'a.jsonl')}", split_bytes=SPLIT).files
    assert file == data_files(tmp_path, split_bytes=SPLIT).files[0]
    assert file.path == str(tmp_path / "a.jsonl")


# --- pieces of large files ---

LINES = [b'{"text": "%s"}' % (b"x" * length) for length in (0, 3, 40, 1, 1, 300, 2, 2, 0, 7, 11)] + [b"", b" ", b"bad"]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_pieces_hold_every_line_once_wherever_the_borders_fall(tmp_path, end):
    content = b"\n".join(LINES) + end
    path = write_raw(tmp_path / "book.jsonl", b"\xef\xbb\xbf" + content)
    (whole,) = data_files(path, split_bytes=SPLIT).files
    items = [(type(item), getattr(item, "text", None)) for item in read_documents(whole, "pile")]
    assert len(items) == len(LINES) - 2
    for split_bytes in range(1, whole.size + 2):
        pieces = data_files(path, split_bytes=split_bytes).files
        read = [[(type(item), getattr(item, "text", None)) for item in read_documents(p, "pile")] for p in pieces]
        assert sum(read, []) == items, split_bytes
        assert sum(piece.size for piece in pieces) == whole.size
        assert len({piece.version for piece in pieces} | {whole.version}) == 1
        if split_bytes < whole.size:
            for piece, following in zip(pieces, [*pieces[1:], None]):
                number = int(piece.name.removeprefix("book.jsonl@"))
                start, stop = piece.span
                assert number * split_bytes <= start < (number + 1) * split_bytes, "a line belongs where it begins"
                assert stop == (following.span[0] if following else whole.size)


def test_remote_plain_files_are_split_like_local_ones(memory, tmp_path):
    remote, local = (data_files(where, split_bytes=20).files for where in (memory, tmp_path))
    assert [(file.name, file.span) for file in remote] == [(file.name, file.span) for file in local]
    assert [file.name for file in remote][:3] == ["books/b.jsonl@0000", "books/b.jsonl@0001", "wiki/w-0.json.gz"]
    for one, other in zip(remote, local):
        assert list(read_documents(one, "pile")) == list(read_documents(other, "pile"))


def test_compressed_files_and_small_ones_are_not_split(tmp_path):
    touch(tmp_path, "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", data=ONE * 100)
    assert [file.name for file in data_files(tmp_path, split_bytes=len(ONE) * 100).files] == [
        *("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
    ]
    assert [(file.name, file.span) for file in data_files(tmp_path, split_bytes=len(ONE) * 60).files] == [
        ("a.jsonl@0000", (0, 960)),
        ("a.jsonl@0001", (960, 1600)),
        ("b.jsonl.gz", None),
        ("c.jsonl.zst", None),
    ]
    with pytest.raises(DataError, match="split_bytes is 0; it must be at least 1 byte"):
        data_files(tmp_path, split_bytes=0)


def test_a_file_that_shrank_since_it_was_listed_is_found(tmp_path):
    touch(tmp_path, "a.jsonl", data=ONE * 10)
    first, second = data_files(tmp_path, split_bytes=80).files
    touch(tmp_path, "a.jsonl", data=ONE * 9)
    assert len(list(read_documents(first, "pile"))) == 5
    with pytest.raises(DataError, match=r"a\.jsonl holds 144 bytes, but .* up to byte 160: it has changed since"):
        list(read_documents(second, "pile"))
