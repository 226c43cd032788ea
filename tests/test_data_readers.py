"""Corpus folders to labelled files, and lines to documents or bad lines: one of the two for each."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_pipeline.document import BadLine, DataError, Document, RawFile
from data_pipeline.readers import READERS, read_documents, reader_for

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data with the real files")
ONE = b'{"text": "one"}\n'


def touch(root: Path, *names: str, data: bytes = ONE) -> Path:
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack.get(path.suffix, bytes)(data))
    return root


def labels(corpus: str, root: Path) -> dict[str, str]:
    return {file.name: file.source for file in reader_for(corpus).find_files(root)}


def read(tmp_path: Path, *lines: bytes, corpus: str = "pile", source: str = "pile") -> list:
    path = tmp_path / "00.jsonl"
    path.write_bytes(b"\n".join(lines))
    return list(read_documents(RawFile(path=str(path), name="train/00.jsonl", source=source), corpus))


# --- which files ---


def test_redpajama_subset_is_known_by_folder(tmp_path):
    touch(tmp_path, "common_crawl/2019-30/a.jsonl.zst", "c4/en/b.jsonl", "book/c.jsonl", "github/d.jsonl")
    assert list(labels("redpajama", tmp_path).items()) == [  # sorted by name
        ("book/c.jsonl", "redpajama/book"),
        ("c4/en/b.jsonl", "redpajama/c4"),
        ("common_crawl/2019-30/a.jsonl.zst", "redpajama/common_crawl"),
        ("github/d.jsonl", "redpajama/github"),
    ]


def test_redpajama_subset_is_known_by_the_corpus_folder_itself_or_the_file_name(tmp_path):
    touch(tmp_path / "arxiv", "x.jsonl")
    assert labels("redpajama", tmp_path / "arxiv") == {"x.jsonl": "redpajama/arxiv"}
    touch(tmp_path / "flat", "cc_2019-30_sample.jsonl", "wiki.jsonl", "c4-train.00000-of-01024.jsonl")
    assert labels("redpajama", tmp_path / "flat") == {
        "c4-train.00000-of-01024.jsonl": "redpajama/c4",
        "cc_2019-30_sample.jsonl": "redpajama/common_crawl",
        "wiki.jsonl": "redpajama/wikipedia",
    }


@pytest.mark.parametrize(
    "record",
    [
        b'{"text": "x", "meta": "{}", "red_pajama_subset": "stackexchange"}\n',
        b'{"text": "x", "meta": {"redpajama_set_name": "RedPajamaStackExchange"}}\n',
    ],
)
def test_redpajama_subset_of_converted_forms_is_known_by_the_first_record(tmp_path, record):
    touch(tmp_path, "chunk1/example_0.jsonl.zst", data=b"\n" + record)
    assert labels("redpajama", tmp_path) == {"chunk1/example_0.jsonl.zst": "redpajama/stackexchange"}


def test_redpajama_without_a_subset_is_an_error_that_says_where_to_put_the_file(tmp_path):
    touch(tmp_path, "x/a.jsonl")
    with pytest.raises(DataError, match=r"cannot tell the RedPajama subset of .*x/a\.jsonl: .*; put it in"):
        labels("redpajama", tmp_path)
    touch(tmp_path, "x/a.jsonl", data=b"not json\n")
    with pytest.raises(DataError, match=r"x/a\.jsonl: its first line should .* but is not valid JSON"):
        labels("redpajama", tmp_path)


def test_redpajama_record_of_another_subset_is_a_bad_line(tmp_path):
    lines = (b'{"text": "x", "red_pajama_subset": "c4"}', b'{"text": "y", "red_pajama_subset": "book"}')
    good, bad = read(tmp_path, *lines, corpus="redpajama", source="redpajama/c4")
    assert good == Document(text="x", source="redpajama/c4", id="train/00.jsonl:1")
    assert isinstance(bad, BadLine)
    assert bad.reason == "the record is of subset 'book', but its file is read as 'redpajama/c4'"


def test_dolma_labels_are_folders_and_plain_dolma_where_there_is_none(tmp_path):
    touch(tmp_path, "wiki/wiki-0000.json.gz", "cc_en_head/part/0.json.gz", "flat.jsonl.gz")
    assert labels("dolma", tmp_path) == {
        "cc_en_head/part/0.json.gz": "dolma/cc_en_head",
        "flat.jsonl.gz": "dolma",
        "wiki/wiki-0000.json.gz": "dolma/wiki",
    }


def test_pile_trains_on_neither_val_nor_test(tmp_path):
    names = ("train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst", "val/0.jsonl")
    touch(tmp_path, *names)
    assert labels("pile", tmp_path) == {"train/00.jsonl.zst": "pile", "train/01.jsonl.zst": "pile"}
    for name in names[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"no training files below .*, only test\.jsonl\.zst, val\."):
        labels("pile", tmp_path)


@pytest.mark.parametrize("corpus", READERS)
def test_paths_are_absolute_and_names_are_relative(tmp_path, corpus, monkeypatch):
    touch(tmp_path, "corpus/book/a.jsonl")
    monkeypatch.chdir(tmp_path)
    (file,) = reader_for(corpus).find_files(Path("corpus"))
    assert (file.name, file.path) == ("book/a.jsonl", str(tmp_path / "corpus/book/a.jsonl"))


def test_hidden_and_other_files_are_not_data_but_links_are(tmp_path):
    touch(tmp_path / "elsewhere", "b.jsonl", "deep/c.jsonl")
    root = touch(tmp_path / "corpus", "a.jsonl", ".cache/x.jsonl.zst", ".hidden.jsonl")
    touch(root, "README.md", "urls.txt", "dataset_infos.json")
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
    with pytest.raises(DataError, match=r"b.jsonl is a broken link or no regular file"):
        labels("dolma", root)
    (root / "b.jsonl").unlink()
    os.mkfifo(root / "c.jsonl")
    with pytest.raises(DataError, match=r"c.jsonl is a broken link or no regular file"):
        labels("dolma", root)


@pytest.mark.parametrize("name", ["a.parquet", "b.jsonl.xz", "c.jsonl.zst.part", "d.gz", "E.TAR"])
def test_data_in_another_form_is_an_error_rather_than_passed_over(tmp_path, name):
    touch(tmp_path, "good.jsonl")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{re.escape(name)} \(1 such files\) would not be read.*move it"):
        labels("dolma", tmp_path)


def test_folders_that_are_missing_empty_or_files(tmp_path):
    with pytest.raises(DataError, match="the corpus folder .*absent does not exist; check the path"):
        labels("pile", tmp_path / "absent")
    with pytest.raises(DataError, match=r"no corpus files below .*: none ends in \.jsonl, "):
        labels("pile", tmp_path)
    with pytest.raises(DataError, match="README.md is a file; pass its folder"):
        labels("pile", touch(tmp_path, "README.md") / "README.md")


def test_a_file_name_that_is_no_text_is_refused(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.jsonl", "wb") as file:
        file.write(ONE)
    with pytest.raises(DataError, match=r"'\\udcff.jsonl' in .* is not valid UTF-8; rename the file"):
        labels("dolma", tmp_path)


def test_unknown_corpus():
    with pytest.raises(DataError, match="unknown corpus 'c4'; the readers are redpajama, dolma, pile"):
        reader_for("c4")


# --- what a line becomes ---

BAD = {
    b'{"text": "cut off': r"not valid JSON: Unterminated string starting at \(character 10\)$",
    b'{"text": "a"} {"text": "b"}': r"Extra data \(character 15\): several objects on one line$",
    b'["text"]': r"^not a JSON object but a list$",
    b"17": r"^not a JSON object but a number$",
    b"null": r"^not a JSON object but null$",
    b'{"id": "1", "meta": {}}': r"^no field 'text' \(fields: 'id', 'meta'\)$",
    b"{}": r"^no field 'text' \(fields: none\)$",
    b'{"text": null}': r"^field 'text' is null, not a string$",
    b'{"text": 17}': r"^field 'text' is a number, not a string$",
    b'{"text": true}': r"^field 'text' is a boolean, not a string$",
    b'{"text": ["a"]}': r"^field 'text' is a list, not a string$",
    b'{"text": {"text": "a"}}': r"^field 'text' is an object, not a string$",
    b'{"text": ""}': r"^field 'text' is empty$",
    b'{"text": "ab\\ud800c"}': r"^text holds the lone surrogate U\+D800 at character 3$",
    b'{"text": "\\udc00\\ud83d"}': r"^text holds the lone surrogate U\+DC00 at character 1$",
    b'{"text": "a\xffb"}': r"^not valid UTF-8: 0xff at byte 12$",
    '{"text": "a"}'.encode("utf-16"): r"^not valid UTF-8: 0xff at byte 1$",
    b'{"text": "a\x00b"}': r"not valid JSON: Invalid control character at",
    b"\x00\x00": r"not valid JSON: Expecting value",
    b'\xef\xbb\xbf{"text": "a"}': r"not valid JSON: Unexpected UTF-8 BOM",
    b"[" * 100_000: r"not usable JSON: maximum recursion depth",
    b'{"n": ' + b"1" * 5000 + b"}": r"not usable JSON: Exceeds the limit",
    b"<html>502 Bad Gateway</html>": r"not valid JSON: Expecting value \(character 1\)$",
}


@pytest.mark.parametrize("corpus", READERS)
@pytest.mark.parametrize("line, reason", BAD.items(), ids=[line[:24].decode("latin-1") for line in BAD])
def test_a_line_that_is_no_document_is_kept_with_its_place_and_reason(tmp_path, corpus, line, reason):
    lines = (b'{"text": "a"}', line, b'{"text": "b"}')
    before, bad, after = read(tmp_path, *lines, corpus=corpus, source="label")
    assert (before.text, after.text) == ("a", "b")
    assert (bad.file, bad.line, bad.raw) == ("train/00.jsonl", 2, line)
    assert re.search(reason, bad.reason), bad.reason


GOOD = {
    b'{"text": "a"}\r': "a",
    b'  {"text" : "a", "meta": "{\'pile_set_name\': \'Github\'}"}': "a",
    b'{"text": "line\\u2028one\\u0085 \\u0000 \\ud83d\\ude00"}': "line\u2028one\x85 \x00 \U0001f600",
    '{"text": "line\u2028one\x85"}'.encode(): "line\u2028one\x85",
    b'{"text": " "}': " ",
    b'{"text": "first", "text": "second"}': "second",
    b'{"text": "a", "score": NaN}': "a",
    b'{"text": "a", "title": "\\ud800"}': "a",
    b'{"text": "a", "n": 1e999}': "a",
}


@pytest.mark.parametrize("line, text", GOOD.items(), ids=[line[:30].decode("latin-1") for line in GOOD])
def test_a_document_needs_nothing_but_a_sound_text(tmp_path, line, text):
    assert read(tmp_path, line) == [Document(text=text, source="pile", id="train/00.jsonl:1")]


def test_blank_lines_are_counted_but_are_nothing(tmp_path):
    found = read(tmp_path, b"", b"  \t\r", b'{"text": "a"}', b"", b"nonsense")
    assert [(type(item), getattr(item, "line", None)) for item in found] == [(Document, None), (BadLine, 5)]
    assert found[0].id == "train/00.jsonl:3"


@pytest.mark.parametrize(
    "id_json, expected",
    [
        ('"wiki-7"', "wiki-7"),
        ("7", "train/00.jsonl:1"),
        ('""', "train/00.jsonl:1"),
        ('"\\ud800"', "train/00.jsonl:1"),
    ],
)
def test_dolma_documents_keep_their_id_where_it_is_one(tmp_path, id_json, expected):
    line = f'{{"id": {id_json}, "text": "a", "source": "wiki"}}'.encode()
    (document,) = read(tmp_path, line, corpus="dolma", source="dolma/wiki")
    assert document == Document(text="a", source="dolma/wiki", id=expected)


def test_a_file_that_cannot_be_trusted_stops_with_an_error_not_a_bad_line(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 3)[:-3])
    documents = read_documents(RawFile(path=str(path), name="a.json.gz", source="dolma"), "dolma")
    with pytest.raises(DataError, match="a.json.gz is truncated"):
        list(documents)


# --- real files ---


def counted(corpus: str, folder: Path) -> tuple[int, list[BadLine], set[str]]:
    items = [item for file in reader_for(corpus).find_files(folder) for item in read_documents(file, corpus)]
    bad = [item for item in items if isinstance(item, BadLine)]
    return len(items) - len(bad), bad, {item.source for item in items if isinstance(item, Document)}


@needs_real_files
def test_real_dolma_files():
    documents, bad, sources = counted("dolma", SHARED / "dolma")
    assert (documents, bad, sources) == (30, [], {"dolma"})


@needs_real_files
def test_real_pile_layout_has_thirty_training_files():
    documents, bad, sources = counted("pile", SHARED / "pile" / "layout" / "dummy_data")
    assert (documents, bad, sources) == (30, [], {"pile"})


@needs_real_files
def test_strings_that_break_programs_are_documents_and_lists_are_none():
    documents, bad, _ = counted("pile", SHARED / "pile")
    assert documents == 30 + 6
    assert [(line.file, line.reason) for line in bad] == [
        ("blns-1.jsonl.zst", "field 'text' is a list, not a string"),
        ("blns-2.jsonl.zst", "field 'text' is a list, not a string"),
    ]


@needs_real_files
def test_real_redpajama_arxiv():
    documents, bad, sources = counted("redpajama", SHARED / "redpajama")
    assert (documents, bad, sources) == (20, [], {"redpajama/arxiv"})
    (file,) = reader_for("redpajama").find_files(SHARED / "redpajama")
    lines = Path(file.path).read_bytes().strip(b"\n").split(b"\n")
    texts = [item.text for item in read_documents(file, "redpajama") if isinstance(item, Document)]
    assert texts == [json.loads(line)["text"] for line in lines]
