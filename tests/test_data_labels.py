"""Which corpus and which source a file is of: told by its path, by its records, or refused."""

from __future__ import annotations

import pytest
from raw_corpora import ONE, SPLIT, labels, touch

from data_pipeline.document import DataError
from data_pipeline.readers import READERS, raw_files

# --- sources ---


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
        b'{"text": "x", "meta": "{\'redpajama_set_name\': \'RedPajamaStackExchange\'}"}\n',
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
    with pytest.raises(DataError, match=r"x/a\.jsonl: .*, nor its first 0 records name one of"):
        labels("redpajama", tmp_path)


@pytest.mark.parametrize(
    "name, label",
    {
        "wiki/en_simple_wiki_v0-0000.json.gz": "dolma/wiki",
        "cc_en_head/part/0.json.gz": "dolma/cc_en_head",
        "dolma-v1_7/proof_pile_2-algebraic_stack/algebraic-stack-train-0000.json.gz": (
            "dolma/proof_pile_2-algebraic_stack"
        ),
        "v1_5/peS2o/s2_v3-0000.json.gz": "dolma/peS2o",
        "cc_en_head-0000.json.gz": "dolma/cc_en_head",
        "c4-train.00000-of-01024.json.gz": "dolma/c4-train",
        "v1_6/cc_news-0000.json.gz": "dolma/cc_news",
        "v1_5r2_sample-0000.json.gz": "dolma",
        "documents-000.json.gz": "dolma",
        "flat.jsonl.gz": "dolma",
    }.items(),
)
def test_dolma_labels_are_the_sources_that_folders_or_the_starts_of_names_tell(tmp_path, name, label):
    assert labels("dolma", touch(tmp_path, name)) == {name: label}


def test_pile_trains_on_neither_val_nor_test(tmp_path):
    names = (
        *("train/00.jsonl.zst", "train/01.jsonl.zst"),
        *("val.jsonl.zst", "test.jsonl.zst", "val/0.jsonl", "validation-00000-of-00001.parquet"),
    )
    touch(tmp_path, *names)
    assert labels("pile", tmp_path) == {"train/00.jsonl.zst": "pile", "train/01.jsonl.zst": "pile"}
    for name in names[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"no training files at .*, only test\.jsonl\.zst, val\."):
        labels("pile", tmp_path)


# --- several corpora ---


def test_raw_files_of_all_corpora(tmp_path):
    touch(tmp_path / "pile", "train/00.jsonl.zst")
    touch(tmp_path / "rp", "book/b.jsonl", data=ONE * 10)
    corpora = {"redpajama": str(tmp_path / "rp"), "pile": tmp_path / "pile"}
    assert [(corpus, file.name, file.source) for corpus, file in raw_files(corpora, split_bytes=80)] == [
        ("redpajama", "book/b.jsonl@0000", "redpajama/book"),
        ("redpajama", "book/b.jsonl@0001", "redpajama/book"),
        ("pile", "train/00.jsonl.zst", "pile"),
    ]
    with pytest.raises(DataError, match=r"00\.jsonl\.zst would be read as pile and as dolma; name it once"):
        raw_files({"pile": tmp_path / "pile", "dolma": tmp_path / "pile"}, split_bytes=SPLIT)
    (tmp_path / "link").symlink_to(tmp_path / "pile")
    with pytest.raises(DataError, match=r"00\.jsonl\.zst would be read as pile and as dolma; name it once"):
        raw_files({"pile": tmp_path / "pile", "dolma": tmp_path / "link"}, split_bytes=SPLIT)


DOLMA = b'{"id": "1", "text": "x", "source": "wiki", "added": "2023", "created": "2023", "metadata": {}}\n'
ARXIV = b'{"text": "x", "meta": {"timestamp": "", "yymm": "1", "arxiv_id": "1", "language": "en", "url": ""}}\n'
CC = b'{"pred_label": "a", "pred_label_prob": 1, "wiki_prob": 1, "text": "x", "source": "cc/2019-30/0"}\n'
PILE = b'{"text": "x", "meta": {"pile_set_name": "Github"}}\n'
HUB = b'{"text": "x", "meta": "{}", "red_pajama_subset": "book"}\n'


@pytest.mark.parametrize(
    "corpus, record, look",
    [
        *(("dolma", record, "redpajama") for record in (ARXIV, CC, HUB)),
        *(("pile", record, "redpajama") for record in (ARXIV, CC, HUB)),
        *(("pile", DOLMA, "dolma"), ("redpajama", DOLMA, "dolma")),
        *(("dolma", PILE, "pile"), ("redpajama", PILE, "pile")),
    ],
)
def test_a_location_of_another_corpus_is_refused_where_that_is_certain(tmp_path, corpus, record, look):
    touch(tmp_path, "c4/a.jsonl", data=b"\nbad\n" + record)
    with pytest.raises(DataError, match=rf"a\.jsonl was given as {corpus}, but its first record is one of {look}"):
        raw_files({corpus: tmp_path}, split_bytes=SPLIT)


@pytest.mark.parametrize(
    "record",
    [
        ONE,
        b'{"id": "1", "text": "x", "source": "wiki"}',
        b'{"text": "x", "meta": {"url": "x"}}',
        b'{"text": "x", "meta": null, "source": null}',
        b'{"text": "x", "meta": "{\'pile_set"}',
        DOLMA.replace(b'"wiki"', b'"redpajama/c4"'),
        b"bad",
        b'{"id": 1}',
    ],
)
@pytest.mark.parametrize("corpus", READERS)
def test_what_might_be_true_data_is_never_refused(tmp_path, corpus, record):
    assert raw_files({corpus: touch(tmp_path, "c4/a.jsonl", data=record)}, split_bytes=SPLIT)


def test_a_corpus_is_never_taken_for_another_by_its_own_records(tmp_path):
    for corpus, records in {"dolma": [DOLMA], "pile": [PILE], "redpajama": [ARXIV, CC, HUB]}.items():
        for number, record in enumerate(records):
            folder = touch(tmp_path / corpus / str(number), "book/a.jsonl", data=record)
            assert raw_files({corpus: folder}, split_bytes=SPLIT)
