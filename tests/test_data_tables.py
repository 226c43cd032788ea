"""Parquet files and datasets of the hub: every record is one item, from any place on. Nothing here needs a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.document import BadLine, DataError, Document, Mark, PassedOver, RawFile
from data_pipeline.readers import raw_files, read_documents, reader_for

SPLIT = 1 << 30


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_table(path: Path, texts: list[str | None], **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()), **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    return path


def write_dataset(root: Path) -> Path:
    """A folder as the hub has it: two shards to train on, one to test, in each of two configurations."""
    for config in ("arxiv", "book"):
        for name, first in (("train-00000-of-00002", 0), ("train-00001-of-00002", 5), ("test-00000-of-00001", 50)):
            texts = [f"{config} {number}" for number in range(first, first + 5)]
            write_table(root / config / f"{name}.parquet", texts, n=list(range(5)))
    front = "".join(
        f"- config_name: {config}\n  data_files:\n"
        f"  - split: train\n    path: {config}/train-*\n  - split: test\n    path: {config}/test-*\n"
        for config in ("arxiv", "book")
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{front}---\n")
    return root


def test_parquet_files_lie_among_others_and_every_record_is_one_item(tmp_path):
    texts = ["one", None, "", "line\u2028one\nand two", "last"]
    write_table(tmp_path / "wiki" / "a.parquet", texts, id=["i0", "i1", "i2", "i3", ""])
    (tmp_path / "wiki" / "b.jsonl").write_bytes(b'{"text": "b"}')
    table, lines = (file for _, file in raw_files({"dolma": tmp_path}, split_bytes=10))
    assert (table.name, table.source, lines.name) == ("wiki/a.parquet", "dolma/wiki", "wiki/b.jsonl@0000")
    assert table.size == (tmp_path / "wiki" / "a.parquet").stat().st_size
    items = list(read_documents(table, "dolma"))
    assert items == [
        Document("one", "dolma/wiki", "i0", 1, 1),
        BadLine("wiki/a.parquet", 2, "field 'text' is null, not a string", b'{"text":null,"id":"i1"}', 2),
        BadLine("wiki/a.parquet", 3, "field 'text' is empty", b'{"text":"","id":"i2"}', 3),
        Document(texts[3], "dolma/wiki", "i3", 4, 4),
        Document("last", "dolma/wiki", "wiki/a.parquet:5", 5, 5),
    ]
    for place, item in enumerate(items):
        assert list(read_documents(table, "dolma", after=Mark(item.line, item.end))) == items[place + 1 :]


def test_records_name_their_sets_in_tables_too(tmp_path):
    sets = ["Github", "Books3", "Github"]
    write_table(tmp_path / "00.parquet", sets, meta=[{"pile_set_name": name} for name in sets])
    ((_, file),) = raw_files({"pile": tmp_path}, split_bytes=SPLIT)
    items = read_documents(file, "pile", exclude=["Github"])
    assert [type(item) for item in items] == [PassedOver, Document, PassedOver]
    write_table(tmp_path / "rp" / "0.parquet", ["a"], red_pajama_subset=["c4"])
    assert reader_for("redpajama").find_files(tmp_path / "rp", split_bytes=SPLIT)[0].source == "redpajama/c4"


def test_tables_that_cannot_be_read(tmp_path):
    path = write_table(tmp_path / "a.parquet", ["a"] * 100)
    content = path.read_bytes()
    file = RawFile(str(path), "a.parquet", "pile", len(content), "1")
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for data in (b"", pointer, content[:-9], content[:4] + bytes(len(content) - 4)):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"cannot read .*a\.parquet: "):
            list(read_documents(file, "pile"))
    write_table(path, [])
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(read_documents(file, "pile"))
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet: "):
        list(read_documents(file, "pile"))


def test_every_shard_of_a_dataset_is_a_file(tmp_path):
    hub = f"hub:{write_dataset(tmp_path)}"
    files = [file for _, file in raw_files({"redpajama": f"{hub}:book"}, split_bytes=SPLIT)]
    assert [(file.name, file.source) for file in files] == [
        ("book/train-00000-of-00002", "redpajama/book"),
        ("book/train-00001-of-00002", "redpajama/book"),
    ]
    assert [file.size for file in files] == [
        (tmp_path / "book" / f"train-0000{n}-of-00002.parquet").stat().st_size for n in (0, 1)
    ]
    assert files[0].version != files[1].version
    items = list(read_documents(files[1], "redpajama"))
    assert [(item.text, item.line, item.end) for item in items] == [(f"book {5 + n}", n + 1, n + 1) for n in range(5)]
    for done in range(6):
        assert list(read_documents(files[1], "redpajama", after=Mark(done, done))) == items[done:]
    (test,) = reader_for("dolma").find_files(f"{hub}:arxiv:test", split_bytes=SPLIT)
    assert (test.name, test.source) == ("arxiv/test-00000-of-00001", "dolma/arxiv")


def test_datasets_and_splits_that_are_not_there(tmp_path):
    hub = f"hub:{write_dataset(tmp_path)}"
    for location, message in {
        f"{hub}:book:dev": r"book:dev has no split 'dev'; its splits are train, test \(hub:NAME:CONFIG:SPLIT\)",
        f"{hub}:novel": r"cannot read hub:.*:novel: ValueError: BuilderConfig 'novel' not found",
        hub: "cannot read hub:.*: ValueError: Config name is missing",
        f"hub:{tmp_path}/absent": "cannot read hub:.*absent: ",
        "hub:": "'hub:' names no dataset; write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT",
        "hub:a:b:c:d": "names no dataset; write",
    }.items():
        with pytest.raises(DataError, match=message):
            reader_for("dolma").find_files(location, split_bytes=SPLIT)


def test_datasets_is_imported_for_tables_alone():
    program = (
        "import sys; from data_pipeline.readers import read_documents;"
        "assert not {'datasets', 'pyarrow', 'pandas', 'fsspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
