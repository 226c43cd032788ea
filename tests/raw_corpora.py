"""Small raw corpora and a word tokenizer, for tests of what is made from them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import zstandard

from data_pipeline.readers import reader_for

WORDS = ["<unk>", *(f"w{number}" for number in range(98))]
"""The vocabulary: word w0 is id 1."""
EOS = len(WORDS)
"""The end of a document, which the tokenizer adds to the vocabulary as a special token."""
ONE = b'{"text": "one"}\n'
SPLIT = 1 << 30
"""Bytes above which a plain file would be read in pieces: more than any in the tests has."""


def write_tokenizer(path: Path, words: Sequence[str] = WORDS) -> Path:
    """A Hugging Face tokenizer.json that knows whole words only."""
    model = tokenizers.models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def text_of(number: int) -> str:
    """A text of 1 to 7 words that differs from that of every other number."""
    return (
        " ".join(f"w{(number * 13 + place * (number // 98 + 1)) % 98}" for place in range(1 + number % 7))
        + f" w{number % 98} w{number // 98}"
    )


def ids_of(text: str) -> list[int]:
    """What the tokenizer makes of a text, without its end."""
    return [WORDS.index(word) if word in WORDS else 0 for word in text.split()]


def lines_of(texts: Sequence[str]) -> bytes:
    """JSON lines with one text each."""
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write_raw(path: Path, data: bytes) -> Path:
    """Write `data` in the container that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def write_corpora(root: Path, documents: int = 40) -> dict[str, Path]:
    """All three corpora in six files; returns {corpus: folder}. No two texts are equal."""
    numbers = iter(range(10**6))

    def texts(count: int) -> list[str]:
        return [text_of(next(numbers)) for _ in range(count)]

    write_raw(root / "redpajama/book/book.jsonl", lines_of(texts(documents)))
    write_raw(root / "redpajama/common_crawl/2023-06/cc.jsonl.zst", lines_of(texts(documents // 2)))
    write_raw(root / "dolma/wiki/wiki-0.json.gz", lines_of(texts(2 * documents)))
    write_raw(root / "dolma/wiki/wiki-1.json.gz", lines_of(texts(3)))
    write_raw(root / "pile/train/00.jsonl.zst", lines_of(texts(documents)))
    write_raw(root / "pile/train/01.jsonl.zst", lines_of(texts(documents)))
    return {name: root / name for name in ("redpajama", "dolma", "pile")}


def touch(root: Path, *names: str, data: bytes = ONE) -> Path:
    """Write the same lines to every name below `root`, which is returned."""
    for name in names:
        write_raw(root / name, data)
    return root


def labels(corpus: str, location: str | Path) -> dict[str, str]:
    """The label of each file that a corpus has at a location, by name."""
    return {file.name: file.source for file in reader_for(corpus).find_files(location, split_bytes=SPLIT)}
