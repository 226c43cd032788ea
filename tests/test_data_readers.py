"""Lines to documents, bad lines and what is passed over: one of the three for each, from any place on."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from raw_corpora import lines_of, write_raw

from data_pipeline.document import BadLine, DataError, Document, Mark, PassedOver, RawFile
from data_pipeline.readers import READERS, checked_sets, raw_files, read_documents, reader_for

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data with the real files")


def raw_file(path: Path, name: str, source: str) -> RawFile:
    return RawFile(str(path), name, source, size=path.stat().st_size, version="1")


def read(tmp_path: Path, *lines: bytes, corpus: str = "pile", source: str = "pile") -> list:
    path = tmp_path / "00.jsonl"
    path.write_bytes(b"\n".join(lines))
    return list(read_documents(raw_file(path, "train/00.jsonl", source), corpus))


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
    assert read(tmp_path, line) == [Document(text, "pile", "train/00.jsonl:1", 1, len(line))]


def test_redpajama_record_of_another_subset_is_a_bad_line(tmp_path):
    lines = (b'{"text": "x", "red_pajama_subset": "c4"}', b'{"text": "y", "red_pajama_subset": "book"}')
    good, bad = read(tmp_path, *lines, corpus="redpajama", source="redpajama/c4")
    assert good == Document("x", "redpajama/c4", "train/00.jsonl:1", line=1, end=len(lines[0]) + 1)
    assert isinstance(bad, BadLine)
    assert bad.reason == "the record is of subset 'book', but its file is read as 'redpajama/c4'"


def test_blank_lines_are_counted_but_are_nothing(tmp_path):
    found = read(tmp_path, b"", b"  \t\r", b'{"text": "a"}', b"", b"nonsense")
    assert [(type(item), item.line, item.end) for item in found] == [(Document, 3, 20), (BadLine, 5, 29)]
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
    assert document == Document("a", "dolma/wiki", expected, line=1, end=len(line))


def test_a_file_that_cannot_be_trusted_stops_with_an_error_not_a_bad_line(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 3)[:-3])
    documents = read_documents(raw_file(path, "a.json.gz", "dolma"), "dolma")
    with pytest.raises(DataError, match="a.json.gz is truncated"):
        list(documents)


# --- going on at a mark ---

MIXED_LINES = b'\xef\xbb\xbf{"text": "a"}\n\nbad\n \n{"text": "\xc3\xa9"}\r\n\nx'


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_reading_goes_on_after_any_item_as_if_it_had_never_stopped(tmp_path, name, end):
    file = raw_file(write_raw(tmp_path / name, MIXED_LINES + end), name, "pile")
    items = list(read_documents(file, "pile"))
    assert [(type(item), item.line) for item in items] == [(Document, 1), (BadLine, 3), (Document, 5), (BadLine, 7)]
    for place, item in enumerate(items):
        assert list(read_documents(file, "pile", after=Mark(item.line, item.end))) == items[place + 1 :]


def test_reading_goes_on_within_a_piece(tmp_path):
    path = write_raw(tmp_path / "a.jsonl", lines_of([str(number) for number in range(100)]))
    for file in reader_for("pile").find_files(path, split_bytes=300):
        items = list(read_documents(file, "pile"))
        assert items[-1].end == file.size
        for place, item in enumerate(items):
            assert list(read_documents(file, "pile", after=Mark(item.line, item.end))) == items[place + 1 :]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_mark_behind_the_end_of_a_file_is_refused(tmp_path, name):
    file = raw_file(write_raw(tmp_path / name, lines_of(["a", "b"])), name, "pile")
    assert list(read_documents(file, "pile", after=Mark(2, 28))) == []
    with pytest.raises(DataError, match=rf"{name} holds 28 bytes, but .* up to byte 29: it has changed since then"):
        list(read_documents(file, "pile", after=Mark(2, 29)))


# --- what is passed over ---


def pile_line(name: str, meta_as) -> bytes:
    return json.dumps({"text": name, "meta": meta_as({"pile_set_name": name})}).encode()


@pytest.mark.parametrize("meta_as", [dict, repr, json.dumps], ids=["object", "repr", "json"])
def test_sets_of_the_pile_are_excluded_by_name_in_every_form_of_meta(tmp_path, meta_as):
    names = ("Github", "Pile-CC", "Books3", "Github")
    path = write_raw(tmp_path / "00.jsonl", b"\n".join(pile_line(name, meta_as) for name in names))
    items = list(read_documents(raw_file(path, "00.jsonl", "pile"), "pile", exclude=["Books3", "Github"]))
    assert [type(item) for item in items] == [PassedOver, Document, PassedOver, PassedOver]
    assert items[2] == PassedOver(line=3, end=items[2].end, reason="set 'Books3' is excluded")
    assert items[3].end == path.stat().st_size
    assert list(read_documents(raw_file(path, "00.jsonl", "pile"), "pile", after=Mark(1, items[0].end))) != []


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "a"}', "names no set of the Pile, so it cannot be told"),
        (b'{"text": "a", "meta": "__import__(\'os\').abort() # pile_set_name"}', "names no set of the Pile"),
        (b'{"text": "a", "meta": "{\'pile_set_name\': %s}"}' % (b"(" * 5000), "names no set"),
        (b'{"text": "a", "meta": "{\'pile_set_name\': %s}"}' % (b"1" * 20_000), "names no set"),
        (b'{"text": "a", "meta": {"pile_set_name": "books3"}}', "is of 'books3', which is no set of the Pile"),
        (b'{"text": "a", "meta": {"pile_set_name": ["Books3"]}}', "names no set of the Pile"),
        (b"not json", "not valid JSON"),
    ],
)
def test_what_does_not_say_whether_it_is_excluded_is_a_bad_line(tmp_path, line, reason):
    path = write_raw(tmp_path / "00.jsonl", line)
    (bad,) = read_documents(raw_file(path, "00.jsonl", "pile"), "pile", exclude=["Books3"])
    assert isinstance(bad, BadLine) and reason in bad.reason and bad.raw == line


def test_names_of_sets_are_checked():
    assert checked_sets(["Pile-CC", "Github", "Pile-CC"]) == ("Github", "Pile-CC")
    with pytest.raises(DataError, match="the Pile has no set 'books'; did you mean 'Books3'. Its sets are ArXiv, "):
        checked_sets(["books"])


def test_a_file_of_several_subsets_is_offered_once_for_each_and_every_line_counts_once(tmp_path):
    names = ("RedPajamaCommonCrawl", "RedPajamaC4", "RedPajamaCommonCrawl", "RedPajamaBook")
    lines = [json.dumps({"text": name, "meta": {"redpajama_set_name": name}}).encode() for name in names]
    lines += [b"bad", b'{"text": "no meta"}', b'{"text": "x", "meta": {"redpajama_set_name": "Else"}}', b"", b"{}"]
    write_raw(tmp_path / "chunk1" / "0.jsonl.zst", b"\n".join(lines))
    files = [file for _, file in raw_files({"redpajama": tmp_path}, split_bytes=1 << 30)]
    subsets = ("arxiv", "book", "c4", "common_crawl", "github", "stackexchange", "wikipedia")
    assert [(file.name, file.source) for file in files] == [
        (f"chunk1/0.jsonl.zst@{subset}", f"redpajama/{subset}") for subset in subsets
    ]
    items = {file.source: list(read_documents(file, "redpajama")) for file in files}
    assert {len(of_one) for of_one in items.values()} == {8}
    kept = {
        source: [item.line for item in of_one if not isinstance(item, PassedOver)] for source, of_one in items.items()
    }
    assert kept == {
        **{f"redpajama/{subset}": [] for subset in subsets},
        "redpajama/arxiv": [5, 6, 7, 9],
        "redpajama/book": [4],
        "redpajama/c4": [2],
        "redpajama/common_crawl": [1, 3],
    }
    assert [item.reason for item in items["redpajama/arxiv"] if isinstance(item, BadLine)] == [
        "not valid JSON: Expecting value (character 1)",
        "the record is of subset None, and its file holds several",
        "the record is of subset 'Else', and its file holds several",
        "the record is of subset None, and its file holds several",
    ]


# --- real files ---


def counted(corpus: str, folder: Path) -> tuple[int, list[BadLine], set[str]]:
    files = reader_for(corpus).find_files(folder, split_bytes=1 << 30)
    items = [item for file in files for item in read_documents(file, corpus)]
    bad = [item for item in items if isinstance(item, BadLine)]
    return len(items) - len(bad), bad, {item.source for item in items if isinstance(item, Document)}


@needs_real_files
def test_real_dolma_files():
    documents, bad, sources = counted("dolma", SHARED / "dolma")
    assert (documents, bad, sources) == (30, [], {"dolma", "dolma/cc_en_head"})


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
    (file,) = reader_for("redpajama").find_files(SHARED / "redpajama", split_bytes=1 << 30)
    lines = Path(file.path).read_bytes().strip(b"\n").split(b"\n")
    texts = [item.text for item in read_documents(file, "redpajama") if isinstance(item, Document)]
    assert texts == [json.loads(line)["text"] for line in lines]
