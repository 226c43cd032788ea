"""A small shard set of a few sources, of which every token is known, and a configuration over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shard_sets import counting_documents

from data_pipeline.config import DataConfig

SEQ_LEN = 6
TRAIN = {
    "dolma/wiki": {
        "w0": counting_documents([3, 0, 9, 2], 100),
        "w1": counting_documents([20], 150),
        "w2": counting_documents([1, 1], 180),
    },
    "dolma/books": {"b0": counting_documents([30, 11], 200)},
    "pile": {"p0": counting_documents([4, 4, 4], 300), "p1": counting_documents([2], 350), "p2": []},
    "unused": {"u0": counting_documents([5], 400)},
}
HELD_OUT = {"dolma/wiki": {"w0": [[500, 501]], "w1": [[502, 503, 504]]}, "unused": {"u0": [[505]]}}


def config(root: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"mixture": {"dolma": 0.7, "pile": 0.3}, "seq_len": SEQ_LEN, "seed": 5}
    return DataConfig(path=str(root), **{**values, "shuffle_window": 8, "interleave": 2, **changes})
