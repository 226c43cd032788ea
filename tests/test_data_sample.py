"""The embedded sample: true schemas, distinct looks, the same bytes each time, a lossless tokenizer."""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import re
from pathlib import Path

import pytest
import sentencepiece
import zstandard

from data_pipeline.document import DataError, Document
from data_pipeline.readers import READERS, read_documents, reader_for
from data_pipeline.sample import SampleReport, write_sample
from data_pipeline.sample.corpora import LABELS, MIN_DOCUMENTS
from data_pipeline.sample.texts import library_folder, module_files, read_module
from data_pipeline.sample.vocabulary import train_vocabulary
from data_pipeline.tokenizer import load_tokenizer

MEGABYTES = 0.3


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[Path, SampleReport]:
    folder = tmp_path_factory.mktemp("sample") / "new" / "raw"
    return folder, write_sample(folder, MEGABYTES, vocab_size=1000)


def records(path: Path) -> list[dict]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".zst":
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            data = reader.read()
    return [json.loads(line) for line in data.decode().split("\n") if line]


def documents(folder: Path) -> list[Document]:
    """Every training document, through the readers; there is no bad line."""
    found = []
    for corpus in READERS:
        for file in reader_for(corpus).find_files(folder / corpus, split_bytes=1 << 30):
            for item in read_documents(file, corpus):
                assert isinstance(item, Document), item
                found.append(item)
    return found


def texts_of(folder: Path, source: str) -> list[str]:
    return [document.text for document in documents(folder) if document.source == source]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_layout_and_containers(sample):
    names = list(digests(sample[0]))
    for pattern in (
        *(rf"redpajama/{subset}/{subset}_\d\d\.jsonl" for subset in ("book", "arxiv", "wikipedia", "c4")),
        r"redpajama/stackexchange/stackexchange_\d\d\.jsonl",
        r"redpajama/common_crawl/2023-06/en_head_\d{4}\.jsonl\.zst",
        *(rf"dolma/{folder}/{folder}-\d{{4}}\.json\.gz" for folder in ("modules", "network", "packages")),
        r"pile/train/\d\d\.jsonl\.zst",
    ):
        assert len([name for name in names if re.fullmatch(pattern, name)]) >= 1, pattern
    assert len([name for name in names if name.startswith("pile/train/")]) >= 2
    assert {"pile/val.jsonl.zst", "tokenizer/tokenizer.model", "sample.json"} <= set(names)


def test_schemas_are_those_of_the_corpora(sample):
    folder, _ = sample
    schemas = {
        "redpajama/book": {"meta", "text"},
        "redpajama/arxiv": {"text", "meta"},
        "redpajama/wikipedia": {"text", "meta"},
        "redpajama/stackexchange": {"text", "meta"},
        "redpajama/c4": {"text", "meta"},
        "redpajama/common_crawl": {"pred_label", "pred_label_prob", "wiki_prob", "text", "source"},
        "dolma": {"id", "text", "source", "added", "created", "metadata"},
        "pile": {"text", "meta"},
    }
    metas = {
        "redpajama/book": {"short_book_title", "publication_date", "url"},
        "redpajama/arxiv": {"timestamp", "yymm", "arxiv_id", "language", "url"},
        "redpajama/wikipedia": {"title", "url", "language", "timestamp"},
        "redpajama/stackexchange": {"language", "url", "timestamp", "source", "question_score"},
        "redpajama/c4": {"timestamp", "url", "language", "source"},
        "pile": {"pile_set_name"},
    }
    for part, fields in schemas.items():
        for path in (folder / part).rglob("*.*"):
            if path.is_file():
                for record in records(path):
                    assert set(record) == fields, path
                    assert set(record.get("meta", ())) == metas.get(part, set()), path


def test_pile_frames_carry_neither_size_nor_checksum_and_its_sets_are_named(sample):
    names = set()
    for path in (sample[0] / "pile").rglob("*.zst"):
        frame = zstandard.get_frame_parameters(path.read_bytes())
        assert frame.content_size == zstandard.CONTENTSIZE_UNKNOWN and not frame.has_checksum
        names |= {record["meta"]["pile_set_name"] for record in records(path)}
    assert names == {"Github", "Pile-CC"}


def test_readers_find_every_label_and_the_report_counts_what_they_read(sample):
    folder, report = sample
    found = documents(folder)
    assert {document.source for document in found} == set(LABELS)
    validation = [record["text"] for record in records(folder / "pile" / "val.jsonl.zst")]
    texts = {label: [document.text for document in found if document.source == label] for label in LABELS}
    texts["pile/val"] = validation
    assert report.documents == {label: len(items) for label, items in texts.items()}
    assert report.text_bytes == {label: len("".join(items).encode()) for label, items in texts.items()}
    assert all(report.documents[label] >= MIN_DOCUMENTS - 1 for label in LABELS)  # val takes one
    assert report.files == len(digests(folder)) - 1  # all but sample.json
    assert 1e6 * MEGABYTES <= sum(report.text_bytes.values()) < 1e6 * 2 * MEGABYTES


def test_no_text_comes_twice_not_even_in_the_validation_file(sample):
    folder, _ = sample
    texts = [document.text for document in documents(folder)]
    texts += [record["text"] for record in records(folder / "pile" / "val.jsonl.zst")]
    assert len(set(texts)) == len(texts)


def test_every_corpus_has_its_own_look(sample):
    folder, _ = sample
    looks = {
        "redpajama/arxiv": r"\\section\{The module \\texttt\{",
        "redpajama/stackexchange": r"Q: .*\?\n.*\((?s:.*)\n\nA: ",
        "redpajama/common_crawl": r"Home \| .* \| Index \| Contact\n",
        "redpajama/wikipedia": r"\w[\w.]* \([\w.]+\)\n\n",
        "dolma/modules": r"(?s)(?!\"\"\").*(import|def|class|=)",
        "pile": r"(def|class|async def) \w|[\w.]+\n\n",
    }
    for source, look in looks.items():
        for text in texts_of(folder, source):
            assert re.match(look, text), (source, text[:200])


def test_the_same_bytes_again_and_an_older_sample_is_replaced(sample, tmp_path):
    folder, report = sample
    write_sample(tmp_path, 0.6, vocab_size=900)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path.with_name(tmp_path.name + ".partial") / "left").mkdir(parents=True)  # by an interrupted run
    assert write_sample(tmp_path, MEGABYTES, vocab_size=1000) == report
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "notes.txt").unlink()
    assert digests(tmp_path) == digests(folder)
    assert not tmp_path.with_name(tmp_path.name + ".partial").exists()


def test_sample_json_records_the_python_version_and_the_report(sample):
    folder, report = sample
    recorded = json.loads((folder / "sample.json").read_text())
    assert recorded["python"] == platform.python_version() == report.python
    assert SampleReport(**recorded) == report


def test_tokenizer_is_lossless_and_fits_the_path(sample):
    folder, report = sample
    tokenizer = load_tokenizer(folder / "tokenizer" / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (1000, 2) == (report.vocab_size, 2)
    texts = [document.text for document in documents(folder)]
    texts += ["", " ", "\n\n\t x", "</s>", "a  b   c ", "\u4e2d\u6587 \U0001f600", "1234567890", "\r\n\x00"]
    arrays = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in arrays] == texts
    assert sum(map(len, arrays)) < sum(map(len, texts)) / 2  # tokens of over two characters


def test_tokenizer_has_llama2s_settings(sample):
    model = sentencepiece.SentencePieceProcessor(model_file=str(sample[0] / "tokenizer" / "tokenizer.model"))
    assert [model.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    pieces = [model.id_to_piece(i) for i in range(259, model.vocab_size())]
    assert not any("\n" in piece for piece in pieces)
    assert not any(re.search("[^\u2581]\u2581", piece) for piece in pieces)  # none spans two words
    assert not any(re.search(r"\d.", piece) for piece in pieces)  # digits stand alone
    assert "\u2581" * 4 in pieces  # indentation


def test_vocabulary_of_impossible_size_is_refused_with_the_limit():
    with pytest.raises(DataError, match=r"no vocabulary of 270 pieces .*required_chars.*--vocab-size"):
        train_vocabulary(["abcdefghijklmnopqrstuvwxyz"], 270)
    with pytest.raises(DataError, match=r"no vocabulary of 5000 pieces .*value <= \d+\.\); choose another"):
        train_vocabulary(["a few words only"], 5000)


def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is not empty and holds no sample.json; pass a new folder"):
        write_sample(tmp_path, MEGABYTES)
    with pytest.raises(DataError, match="thesis.tex is a file; pass a folder"):
        write_sample(tmp_path / "thesis.tex", MEGABYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("megabytes", [0.0, -1.0, float("nan")])
def test_a_sample_without_text_is_refused(tmp_path, megabytes):
    with pytest.raises(DataError, match=f"--megabytes {megabytes} is not possible"):
        write_sample(tmp_path / "new", megabytes)
    assert not (tmp_path / "new").exists()


def test_a_source_file_is_taken_apart_without_doubling_a_passage(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        '"""What it is.\n\nAnd more."""\n'
        "# one\n#  two\n# -----\n# three\n"
        "import os\n"
        "# short\n"
        "class A(dict, B):\n"
        '    """An A."""\n'
        "    def get(self, key, default=None):\n"
        '        """Get it."""\n'
        "        return key  # kept\n"
        'def one_line(): "stays where it is"\n'
    )
    module = read_module("package.example", path)
    assert module is not None
    assert (module.name, module.docstring) == ("package.example", "What it is.\n\nAnd more.")
    assert module.comments == ("one\n two\n\nthree",)
    assert module.code == (
        "import os\n# short\nclass A(dict, B):\n    def get(self, key, default=None):\n"
        '        return key  # kept\ndef one_line(): "stays where it is"\n'
    )
    assert [(d.name, d.signature, d.is_class, d.is_nested, d.docstring) for d in module.definitions] == [
        ("A", "A(dict, B)", True, False, "An A."),
        ("A.get", "A.get(self, key, default=None)", False, True, "Get it."),
        ("one_line", "one_line()", False, False, "stays where it is"),
    ]
    source = module.definitions[1].source
    assert source.startswith("    def get(self") and source.endswith("# kept\n") and source.count("\n") == 3


def test_files_that_are_no_source_are_passed_over(tmp_path):
    path = tmp_path / "bad.py"
    path.write_bytes(b"\xff\xfe not python")
    assert read_module("bad", path) is None


def test_the_library_is_that_of_the_base_installation_without_its_tests():
    names = [name for name, _ in module_files(library_folder())]
    assert names == sorted(names)
    assert {"json", "json.decoder", "argparse", "asyncio.events"} <= set(names)
    assert not {"test", "site-packages", "encodings"} & {part for name in names for part in name.split(".")}
