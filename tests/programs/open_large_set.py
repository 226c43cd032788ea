"""Open a set of 1e12 tokens in 10,000 shards: time against opening the shard files alone, memory, far rows.

    python -m tests.programs.open_large_set

The shards are holes but for their headers, document ends and part cuts; some 100 MB of disk are taken for a while.
"""

from __future__ import annotations

import mmap
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.stream import open_stream

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shard_sets import write_sparse_set  # noqa: E402  found beside this folder

SOURCES, SHARDS, TOKENS, REPEATS = 8, 10_000, 100_000_000, 5


def open_files(paths: list[str]) -> None:
    """What opening the shard files themselves takes at the least: open, map, read the header."""
    for path in paths:
        with open(path, "rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            mapped[:256]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_sparse_set(Path(folder, "set"), sources=SOURCES, shards=SHARDS, tokens=TOKENS)
        config = DataConfig(path=str(root), mixture={f"source_{n}": n + 1 for n in range(SOURCES)})
        paths = [str(path) for path in (root / "shards").rglob("*.train")]
        taken = [(seconds(lambda: open_files(paths)), seconds(lambda: open_stream(config))) for _ in range(REPEATS)]
        files, stream = (statistics.median(column) for column in zip(*taken))
        print(f"{SHARDS:,} shards, {SHARDS * TOKENS:.0e} tokens")
        print(f"opening the files {files:.3f} s, twice {2 * files:.3f} s; opening the set {stream:.3f} s")
        print(f"ratio to opening the files twice: {stream / 2 / files:.2f} (at most 1 is asked for)")
        for row in (0, 10**9):
            fresh = open_stream(config)
            located = seconds(lambda: fresh.locate(np.arange(row, row + 512)))
            print(f"index work for the first rows at row {row:,}: {1000 * located:.0f} ms")
        tracemalloc.start()
        rows = open_stream(config)
        held, peak = tracemalloc.get_traced_memory()
        rows.locate(np.arange(10**9, 10**9 + 512))
        index = tracemalloc.get_traced_memory()[0]
        print(f"held {held / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB; with the index of rows in use {index / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
