"""The embedded sample: small raw corpora in the true schemas and containers, from text every Python carries.

    DIR/redpajama/<subset>/<subset>_00.jsonl ...          book arxiv wikipedia stackexchange c4
    DIR/redpajama/common_crawl/2023-06/..._00.jsonl.zst
    DIR/dolma/<folder>/<folder>-0000.json.gz ...          modules network packages
    DIR/pile/train/00.jsonl.zst ...   DIR/pile/val.jsonl.zst
    DIR/tokenizer/tokenizer.model                         SentencePiece BPE trained on all of it but val
    DIR/sample.json                                       what it was made of, with the Python version

    1. `texts` takes the standard library's sources apart.
    2. `corpora` makes records of them.
    3. Here they are written as files, byte for byte the same for one version of Python and of the libraries.

The folder appears whole: everything is written beside it first and then moved in.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import zstandard

from data_pipeline.document import DataError
from data_pipeline.sample.corpora import Record, as_line, compose
from data_pipeline.sample.vocabulary import train_vocabulary

PARTS = ("redpajama", "dolma", "pile", "tokenizer", "sample.json")
"""Everything `write_sample` puts into its folder, and all it ever removes from it."""

_FILE_BYTES = 1 << 19
_PILE_VALIDATION_EVERY = 20


@dataclass(frozen=True, slots=True)
class SampleReport:
    """What was written; `sample.json` holds the same fields."""

    python: str
    """Version whose standard library the text is, such as `3.11.7`."""
    megabytes: float
    """Text asked for, in million bytes."""
    vocab_size: int
    files: int
    documents: dict[str, int]
    """Documents by source label, the Pile's validation file apart as `pile/val`."""
    text_bytes: dict[str, int]
    """Bytes of text by the same labels."""


def write_sample(directory: Path, megabytes: float = 8.0, vocab_size: int = 4096) -> SampleReport:
    """Write the sample corpora and a tokenizer of `vocab_size` pieces, replacing an older sample.

    megabytes: text in million bytes; a Python installation holds 8 to 12, and no more than that is written.
    Raises `DataError` when `directory` holds anything else, and for sizes that are not possible.
    """
    if not megabytes > 0:
        raise DataError(f"--megabytes {megabytes} is not possible: a sample has some text; the default is 8")
    directory = Path(os.path.abspath(directory))
    _check_target(directory)
    corpora = compose(megabytes)
    pile = corpora.pop("pile")
    splits = {
        **corpora,
        "pile": [record for i, record in enumerate(pile) if i % _PILE_VALIDATION_EVERY],
        "pile/val": pile[::_PILE_VALIDATION_EVERY],
    }
    training = [records for label, records in splits.items() if label != "pile/val"]
    vocabulary = train_vocabulary((record["text"] for records in training for record in records), vocab_size)
    contents = {name: data for label, records in splits.items() for name, data in _files(label, records)}
    contents["tokenizer/tokenizer.model"] = vocabulary
    report = SampleReport(
        python=platform.python_version(),
        megabytes=megabytes,
        vocab_size=vocab_size,
        files=len(contents),
        documents={label: len(records) for label, records in splits.items()},
        text_bytes={label: _text_bytes(records) for label, records in splits.items()},
    )
    contents["sample.json"] = json.dumps(asdict(report), indent=2).encode() + b"\n"
    _replace(directory, contents)
    return report


def _check_target(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory} is a file; pass a folder for the sample")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "sample.json").is_file():
        raise DataError(f"{directory} is not empty and holds no sample.json; pass a new folder")


def _text_bytes(records: list[Record]) -> int:
    return sum(len(record["text"].encode()) for record in records)


def _files(label: str, records: list[Record]) -> Iterator[tuple[str, bytes]]:
    """(path below the sample folder, content) of every file of `label`, in its corpus's container."""
    corpus, _, part = label.partition("/")
    for number, data in enumerate([_joined(records)] if part == "val" else _split(records)):
        if label == "pile/val":
            yield "pile/val.jsonl.zst", _zstd(data)
        elif corpus == "pile":
            yield f"pile/train/{number:02}.jsonl.zst", _zstd(data)
        elif corpus == "dolma":
            yield f"dolma/{part}/{part}-{number:04}.json.gz", gzip.compress(data, mtime=0)
        elif part == "common_crawl":
            yield f"redpajama/{part}/2023-06/en_head_{number:04}.jsonl.zst", _zstd(data)
        else:
            yield f"redpajama/{part}/{part}_{number:02}.jsonl", data


def _joined(records: list[Record]) -> bytes:
    return b"".join(map(as_line, records))


def _split(records: list[Record]) -> Iterator[bytes]:
    """JSON lines in files of about `_FILE_BYTES`; in two at least where one record is not most of them."""
    data = _joined(records)
    least = min(_FILE_BYTES, len(data) // 2)
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + least - 1) + 1 or len(data)
        yield data[start:end]
        start = end


def _zstd(data: bytes) -> bytes:
    """One frame with neither size nor checksum in its header, as the Pile's are."""
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=False, write_content_size=False)
    return compressor.compress(data)


def _replace(directory: Path, contents: dict[str, bytes]) -> None:
    """Write `contents` beside `directory`, then move them in; `sample.json` goes first and comes last."""
    beside = directory.with_name(directory.name + ".partial")
    if beside.exists():
        shutil.rmtree(beside)  # what an interrupted run left
    for name, data in contents.items():
        path = beside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    directory.mkdir(parents=True, exist_ok=True)
    for part in reversed(PARTS):
        old = directory / part
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    for part in PARTS:
        (beside / part).rename(directory / part)
    beside.rmdir()
