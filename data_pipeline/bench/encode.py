"""Preparing shards, against SentencePiece alone on the same documents in the same run.

    1. Distinct texts are written as a compressed corpus.
    2. In a fresh process: their documents, in memory and in the batches of a build, are encoded by the library alone
       and by the project's tokenizer, batch about, and every id is compared.
    3. In fresh processes: `build_set` with one worker and with several, reading, parsing and writing included; every
       token of the shards is compared with the library's.
    4. As often as asked for, from 2 on; the median of each counts.
    5. In a fresh process: documents of 16 million characters, against the speed of the tokenizer on usual ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sentencepiece

from data_pipeline.bench.fresh import (
    CLOCKS,
    Seconds,
    in_fresh_process,
    median_of,
    peak_megabytes,
    peak_megabytes_of_children,
)
from data_pipeline.bench.texts import Texts, write_corpus
from data_pipeline.build import build_set
from data_pipeline.document import DataError, Document
from data_pipeline.file_build import BATCH_CHARACTERS, BATCH_DOCUMENTS
from data_pipeline.manifest import DEFAULT_SPLIT_BYTES, read_manifest, shard_path
from data_pipeline.readers import raw_files, read_documents
from data_pipeline.shards import Shard
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

LONG_CHARACTERS = 16_000_000


@dataclass(frozen=True, slots=True)
class LongDocument:
    """One document of `characters`."""

    name: str
    characters: int
    megabytes_per_second: float
    ratio: float
    """To the tokenizer's speed on the documents as they were."""


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """What was measured, with a time for each round."""

    distinct_bytes: int
    documents: int
    repeat: int
    """Times that the documents were in the corpus; hits of the second time on prove nothing."""
    tokens: int
    plain_because: tuple[str, ...]
    hit_rate: float | None
    """Share of the text's units that were known; None without the word cache."""
    encoded_bytes_share: float | None
    """Share of the text's bytes that the library was given for the units that were not."""
    plain: list[Seconds]
    tokenizer: list[Seconds]
    build: dict[int, list[Seconds]]
    """By number of workers."""
    peak_megabytes: dict[int, float]
    """The largest of a worker, by number of workers."""
    mismatches: int
    """Documents of which the tokenizer, and tokens of which the shards, say otherwise than the library."""
    long_documents: list[LongDocument]

    @property
    def ratios(self) -> dict[str, dict[str, float]]:
        """Speeds as multiples of the library's: {what: {"wall": ..., "cpu": ...}}."""
        times = {"tokenizer": self.tokenizer, **{f"build_{workers}": taken for workers, taken in self.build.items()}}
        return {
            what: {by: median_of(self.plain, by) / median_of(taken, by) for by in CLOCKS}
            for what, taken in times.items()
        }

    def megabytes_per_second(self, taken: Sequence[Seconds]) -> float:
        """Text of the corpus in the median of `taken`."""
        return self.distinct_bytes * self.repeat / 1e6 / median_of(taken, "wall")


@dataclass(frozen=True, slots=True)
class _Encoded:
    plain: Seconds
    tokenizer: Seconds
    mismatches: int
    documents: int
    tokens: int
    plain_because: tuple[str, ...]
    hit_rate: float | None
    encoded_bytes_share: float | None


def bench_encode(
    tokenizer: Path,
    texts: Texts,
    *,
    workers: Sequence[int] = (1, 2),
    repeat: int = 1,
    rounds: int = 3,
    long_characters: int = LONG_CHARACTERS,
) -> EncodeResult:
    """Measure on `texts`, in a temporary folder. `long_characters`: 0 leaves the long documents out."""
    if load_tokenizer(tokenizer).kind != "sentencepiece":
        raise DataError(f"{tokenizer} is no SentencePiece model; the word cache is for these, so compare with one")
    encoded: list[_Encoded] = []
    built: dict[int, list[Seconds]] = {count: [] for count in workers}
    peaks = dict.fromkeys(workers, 0.0)
    mismatches = 0
    with TemporaryDirectory(prefix="moepp-bench-") as name:
        folder = Path(name)
        write_corpus(texts.texts, folder / "raw" / "bench", repeat=repeat)
        for number in range(rounds):
            encoded.append(in_fresh_process(_encode, tokenizer, folder))
            for count in workers:
                shards = folder / f"shards-{count}-{number}"
                taken, peak = in_fresh_process(_build, tokenizer, folder / "raw", shards, count)
                built[count].append(taken)
                peaks[count] = max(peaks[count], peak)
                mismatches += _different_tokens(folder, shards)
        long_documents = in_fresh_process(_encode_long, tokenizer, folder, long_characters) if long_characters else []
    first = encoded[0]
    return EncodeResult(
        distinct_bytes=texts.bytes,
        documents=first.documents,
        repeat=repeat,
        tokens=first.tokens,
        plain_because=first.plain_because,
        hit_rate=first.hit_rate,
        encoded_bytes_share=first.encoded_bytes_share,
        plain=[each.plain for each in encoded],
        tokenizer=[each.tokenizer for each in encoded],
        build=built,
        peak_megabytes=peaks,
        mismatches=mismatches + sum(each.mismatches for each in encoded),
        long_documents=long_documents,
    )


def _batches(raw: Path) -> Iterator[tuple[str, list[str]]]:
    """(file, texts) of the corpus, as a build takes them."""
    for corpus, file in raw_files({"dolma": str(raw)}, split_bytes=DEFAULT_SPLIT_BYTES):
        texts: list[str] = []
        characters = 0
        for item in read_documents(file, corpus):
            assert isinstance(item, Document)
            texts.append(item.text)
            characters += len(item.text)
            if len(texts) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield file.name, texts
                texts, characters = [], 0
        yield file.name, texts


def _encode(tokenizer_file: Path, folder: Path) -> _Encoded:
    """Step 2. The library's ids stay in a file for each raw file, for `_different_tokens`."""
    fast = load_tokenizer(tokenizer_file)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    fast.encode_batch(["loads what is loaded at the first use. " * 100])
    fast_taken, plain_taken = Seconds(), Seconds()
    mismatches = documents = tokens = 0
    ids_of: dict[str, list[np.ndarray]] = {}
    for name, texts in _batches(folder / "raw"):
        with plain_taken.add():
            expected = library.encode(texts, out_type="numpy", num_threads=1)
        with fast_taken.add():
            arrays = fast.encode_batch(texts)
        mismatches += sum(not np.array_equal(ids_N, right_N) for ids_N, right_N in zip(arrays, expected))
        documents += len(texts)
        for ids_N in expected:
            ids_of.setdefault(name, []).extend((ids_N, np.array([fast.eos_id], dtype=np.int32)))
    for name, arrays in ids_of.items():
        ids_N = np.concatenate(arrays)
        tokens += len(ids_N)
        np.save(_ids_file(folder, name), ids_N)
    hit_rate, share = _cache_figures(fast)
    return _Encoded(plain_taken, fast_taken, mismatches, documents, tokens, fast.plain_because, hit_rate, share)


def _cache_figures(tokenizer: Tokenizer) -> tuple[float, float] | tuple[None, None]:
    done = tokenizer.cache_statistics()
    return (None, None) if done is None else (done.hit_rate, done.encoded_bytes / done.text_bytes)


def _ids_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '-')}.npy"


def _build(tokenizer: Path, raw: Path, shards: Path, workers: int) -> tuple[Seconds, float]:
    """Step 3: the time, and the most memory of a worker (with one worker that is this process)."""
    taken = Seconds()
    with taken.add():
        build_set(shards, tokenizer_file=tokenizer, corpora={"dolma": str(raw)}, held_out=0.0, workers=workers)
    return taken, peak_megabytes() if workers == 1 else peak_megabytes_of_children()


def _different_tokens(folder: Path, shards: Path) -> int:
    different = 0
    for file in read_manifest(shards).files:
        expected_N = np.load(_ids_file(folder, file.name), mmap_mode="r")
        tokens_N = Shard(shard_path(shards, file.key, "train")).tokens
        both = min(len(expected_N), len(tokens_N))
        different += int((expected_N[:both] != tokens_N[:both]).sum()) + abs(len(expected_N) - len(tokens_N))
    return different


def _encode_long(tokenizer_file: Path, folder: Path, characters: int) -> list[LongDocument]:
    """Step 5. Usual documents and long ones hold the same text, and each finds an empty cache."""
    texts: list[str] = []
    for _, batch in _batches(folder / "raw"):
        texts += batch
        if sum(map(len, texts)) > 1.5 * characters:
            break
    whole = "\n".join(texts)
    usual = _speed(tokenizer_file, [texts[place : place + 64] for place in range(0, len(texts), 64)])
    variants = {
        "many lines": whole,
        "one line": whole.replace("\n", " "),
        "neither spaces nor newlines": "".join(whole.split()),
        "one letter": "a" * characters,
    }
    result = []
    for name, text in variants.items():
        speed = _speed(tokenizer_file, [[text[:characters]]])
        result.append(LongDocument(name, len(text[:characters]), speed, speed / usual))
    return result


def _speed(tokenizer_file: Path, batches: Sequence[list[str]]) -> float:
    load_tokenizer(tokenizer_file, word_cache=False)  # so that the next is made anew
    tokenizer = load_tokenizer(tokenizer_file)
    tokenizer.encode_batch(["loads what is loaded at the first use. " * 100])
    taken = Seconds()
    with taken.add():
        for batch in batches:
            tokenizer.encode_batch(batch)
    return sum(len(text.encode()) for batch in batches for text in batch) / 1e6 / taken.cpu
