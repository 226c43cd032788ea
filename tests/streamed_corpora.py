"""Raw corpora that are read as they lie, and the same built into a set, to compare what training gets of the two."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raw_corpora import lines_of, text_of, write_raw, write_tokenizer

from data_pipeline.build import build_set
from data_pipeline.config import DataConfig

HELD_OUT = 0.2
PART_TOKENS = 24
MAX_BAD_SHARE = 0.5
SPLIT_BYTES = 400
EXCLUDED = ["USPTO Backgrounds"]
BAD = b"no json\n"
MIXTURE = {"dolma": 0.5, "pile": 0.3, "redpajama/book": 0.2}


@dataclass(frozen=True)
class StreamedCorpora:
    """Where they lie: corpora in folders of their names, tokenizer.json and the set beside them."""

    root: Path

    @property
    def set(self) -> Path:
        return self.root / "set"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def corpora(self) -> dict[str, Path]:
        return {name: self.root / name for name in ("redpajama", "dolma", "pile")}

    def prepared(self, **changes: Any) -> DataConfig:
        return DataConfig(path=str(self.set), **{**_order(), **changes})

    def streamed(self, spool: Path, raw: Mapping[str, Any] | None = None, **changes: Any) -> DataConfig:
        inputs = {
            **{name: str(path) for name, path in self.corpora.items()},
            "tokenizer": str(self.tokenizer),
            "held_out": HELD_OUT,
            "max_bad_share": MAX_BAD_SHARE,
            "part_tokens": PART_TOKENS,
            "split_bytes": SPLIT_BYTES,
            "pile_exclude": EXCLUDED,
            "disk_bytes": 300_000,
            **(raw or {}),
        }
        return DataConfig(mode="stream", path=str(spool), raw=inputs, **{**_order(), **changes})


def _order() -> dict[str, Any]:
    return {"mixture": MIXTURE, "seq_len": 16, "seed": 3, "shuffle_window": 32, "interleave": 4}


def write_streamed(root: Path) -> StreamedCorpora:
    """Files of unequal size in all containers, some without a document and with bad lines, plain ones in pieces, and a
    source smaller than a window of 32 rows."""
    numbers = iter(range(10**6))

    def texts(count: int) -> bytes:
        return lines_of([text_of(next(numbers)) for _ in range(count)])

    for file, documents in enumerate([1, 3, 0, 150, 40, 2, 90, 7, 1]):
        suffix = (".json.gz", ".jsonl.zst", ".jsonl")[file % 3]
        data = texts(documents // 2) + b"\n" + BAD + texts(documents - documents // 2) + BAD
        write_raw(root / f"dolma/wiki/wiki-{file}{suffix}", data)
    write_raw(root / "pile/train/00.jsonl.zst", _of_sets([text_of(next(numbers)) for _ in range(300)]))
    write_raw(root / "pile/train/01.jsonl.zst", _of_sets([text_of(next(numbers)) for _ in range(20)]))
    write_raw(root / "redpajama/book/book.jsonl", texts(20))
    made = StreamedCorpora(root)
    build_set(
        made.set,
        tokenizer_file=write_tokenizer(made.tokenizer),
        corpora=made.corpora,
        held_out=HELD_OUT,
        max_bad_share=MAX_BAD_SHARE,
        part_tokens=PART_TOKENS,
        split_bytes=SPLIT_BYTES,
        pile_exclude=EXCLUDED,
    )
    return made


def _of_sets(texts: Sequence[str]) -> bytes:
    """Lines of the Pile, every fourth of a set that is excluded."""
    sets = itertools.cycle(["Books3", "ArXiv", "HackerNews", *EXCLUDED])
    records = [{"text": text, "meta": {"pile_set_name": name}} for text, name in zip(texts, sets)]
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)
