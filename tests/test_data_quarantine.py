"""Quarantine: what is left of it when the reading of a file ends in one way or another."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.document import BadLine, DataError
from data_pipeline.quarantine import Quarantine


def test_an_interruption_leaves_the_quarantine_of_an_earlier_build(tmp_path: Path) -> None:
    bad = BadLine("a.jsonl", 1, "reason", b"raw", 4)
    path = tmp_path / "a.jsonl.jsonl"
    for kind, left in ((KeyboardInterrupt, b"before"), (BrokenPipeError, b"before"), (DataError, b'{"file"')):
        path.write_bytes(b"before")
        with pytest.raises(kind), Quarantine(path, raw_path="a.jsonl", max_bad_share=0.0) as quarantine:
            quarantine.add(bad)
            raise kind("stop")
        assert path.read_bytes().startswith(left) and list(tmp_path.iterdir()) == [path]
