"""The measurements measure what they say: distinct text, every token compared, the loader's own rows."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
from shard_sets import write_set
from test_data_tokenizer import huggingface_file, sentencepiece_model
from typer.testing import CliRunner

from data_pipeline.bench.encode import bench_encode
from data_pipeline.bench.fresh import Seconds, in_fresh_process, peak_megabytes
from data_pipeline.bench.loader import bench_loader
from data_pipeline.bench.texts import CORPUS_FILES, Texts, distinct_texts, python_folders, write_corpus
from data_pipeline.commands import app
from data_pipeline.config import DataConfig
from data_pipeline.document import DataError, Document
from data_pipeline.readers import raw_files, read_documents

SENTENCE = "the quick brown fox jumps over the lazy dog, {} times\n"


def text_folder(folder: Path, files: int) -> Path:
    folder.mkdir()
    for number in range(files):
        (folder / f"{number:03}.txt").write_text(SENTENCE.format(number) * (number + 1))
    return folder


# --- text ---


def test_texts_are_distinct_and_textual(tmp_path):
    folder = text_folder(tmp_path / "text", 3)
    (folder / "sub").mkdir()
    (folder / "sub" / "again.py").write_bytes((folder / "001.txt").read_bytes())
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "blank.txt").write_text(" \n")
    (folder / "table.csv").write_text("1,2\n")
    found = distinct_texts([folder, folder / "000.txt"], 1)
    expected = [SENTENCE.format(number) * (number + 1) for number in range(3)]
    assert sorted(found.texts) == sorted(expected)
    assert found.bytes == sum(map(len, expected))
    assert len(distinct_texts([folder / "table.csv"], 1).texts) == 1  # a file that is named is taken


def test_no_more_texts_than_asked_for_and_the_same_ones_each_time(tmp_path):
    folder = text_folder(tmp_path / "text", 60)
    some = distinct_texts([folder], 0.02)
    assert 20_000 <= some.bytes < 20_000 + len(SENTENCE) * 62
    assert distinct_texts([folder], 0.02) == some
    assert distinct_texts([folder], 1).texts[: len(some.texts)] == some.texts


def test_python_itself_has_text():
    assert any((folder / "os.py").is_file() for folder in python_folders())


def test_places_without_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="no text is found in .*; name files or folders of text with --text"):
        distinct_texts([tmp_path], 1)
    with pytest.raises(DataError, match="nothing does not exist; name files or folders of text with --text"):
        distinct_texts([tmp_path / "nothing"], 1)


def test_corpus_holds_each_document_as_often_as_asked_for(tmp_path):
    texts = [SENTENCE.format(number) * (number % 40 + 1) for number in range(4 * CORPUS_FILES)]
    write_corpus(texts, tmp_path / "raw" / "bench", repeat=2)
    read = []
    files = raw_files({"dolma": str(tmp_path / "raw")}, split_bytes=1 << 30)
    for corpus, file in files:
        for item in read_documents(file, corpus):
            assert isinstance(item, Document)
            read.append(item.text)
    assert len(files) == 2 * CORPUS_FILES and sorted(read) == sorted(texts * 2)
    sizes = [len(gzip.decompress(Path(file.path).read_bytes())) for _, file in files]
    assert max(sizes) - min(sizes) < 2_500  # none is more than the longest document ahead


# --- fresh processes ---


def test_a_fresh_process_is_another_one():
    assert in_fresh_process(peak_megabytes) > 1
    assert in_fresh_process(sys.getrecursionlimit) == 1_000


def test_seconds_add_up():
    taken = Seconds()
    for _ in range(2):
        before = Seconds(taken.wall, taken.cpu)
        with taken.add():
            sum(range(100_000))
        assert taken.wall > before.wall and taken.cpu >= before.cpu


# --- encode ---


def test_encode_by_the_command(tmp_path):
    model = sentencepiece_model(tmp_path)
    folder = text_folder(tmp_path / "text", 40)
    figures = tmp_path / "figures.json"
    command = ["bench", "encode", "--tokenizer", model, "--text", folder, "--rounds", 1, "--long", 2_000]
    done = CliRunner().invoke(app, [str(word) for word in [*command, "--repeat", 2, "--json", figures]])
    assert done.exit_code == 0, done.output
    found = json.loads(figures.read_text())
    size = sum(len(path.read_bytes()) for path in folder.iterdir())
    assert f"40 documents, {size:,} distinct bytes, from {folder}" in done.stdout
    assert "in the corpus 2 times: all but the first are repetitions" in done.stdout
    assert (found["distinct_bytes"], found["documents"], found["mismatches"]) == (size, 80, 0)
    assert found["tokens"] > 80 and f"{found['tokens']:,} tokens compared in each round, 0 mism" in done.stdout
    assert 0.9 < found["hit_rate"] < 1 and f"hit rate {found['hit_rate']:.4f}" in done.stdout
    assert list(found["build"]) == ["1", "2"] and all(peak > 1 for peak in found["peak_megabytes"].values())
    assert list(found["ratios"]) == ["tokenizer", "build_1", "build_2"]
    plain, built = found["plain"][0]["wall"], found["build"]["2"][0]["wall"]
    assert found["ratios"]["build_2"]["wall"] == pytest.approx(plain / built)
    assert [document["name"] for document in found["long_documents"]] == [
        *("many lines", "one line", "neither spaces nor newlines", "one letter")
    ]
    assert {document["characters"] for document in found["long_documents"]} == {2_000}


def test_encode_without_the_word_cache_says_why(tmp_path):
    model = sentencepiece_model(tmp_path, model_type="unigram", vocab_size=290)
    texts = Texts(["the fox", "the dog"], 14, [])
    result = bench_encode(model, texts, workers=[1], rounds=1, long_characters=0)
    assert result.plain_because == ("its type is UNIGRAM, not BPE",)
    assert (result.hit_rate, result.mismatches, result.long_documents) == (None, 0, [])


def test_encode_is_for_sentencepiece(tmp_path):
    with pytest.raises(DataError, match="tokenizer.json is no SentencePiece model"):
        bench_encode(huggingface_file(tmp_path, "</s>"), Texts(["a"], 1, []))


# --- loader ---


@pytest.fixture
def shards(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 1_000, 50).tolist() for _ in range(60)]
    return write_set(tmp_path / "set", {"dolma": {"a": documents[:20], "b": documents[20:]}})


def test_loader_by_the_command(shards, tmp_path):
    figures = tmp_path / "figures.json"
    command = ["bench", "loader", shards, "--mixture", '{"dolma": 1}', "--seq-len", 16, "--rows", 128]
    done = CliRunner().invoke(app, [str(word) for word in [*command, "--json", figures]])
    assert done.exit_code == 0, done.output
    found = orjson.loads(figures.read_bytes())
    assert (found["rows"], found["seq_len"]) == (128, 16)
    assert len(found["loader"]) == len(found["gather"]) >= 5
    _, bare, loader = done.stdout.splitlines()
    assert bare.split()[-2:] == ["1.00", "1.00"]
    assert loader.split()[-2:] == [f"{found['ratios'][by]:.2f}" for by in ("wall", "cpu")]


def test_loader_measures_only_rows_that_there_are(shards):
    config = DataConfig(path=str(shards), mixture={"dolma": 1}, seq_len=16)
    with pytest.raises(DataError, match="100 rows are no multiple of the batch of 64; use 128"):
        bench_loader(config, rows=100)
    limited = DataConfig(path=str(shards), mixture={"dolma": 1}, seq_len=16, max_epochs=1.0)
    with pytest.raises(DataError, match="the stream has 19[01] rows and 256 were asked for; use fewer rows"):
        bench_loader(limited, rows=256)
