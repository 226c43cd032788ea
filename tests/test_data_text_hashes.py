"""Hashes of texts: the bytes by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import text_hashes
from data_pipeline.text_hashes import HashWriter, runs


def test_the_bytes_of_the_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_hashes, "RUN_DOCUMENTS", 3)
    texts = [b"b", b"a", b"b", b"cc", b""]
    with HashWriter(tmp_path / "hashes") as writer:
        writer.write(texts[:1], [False])
        writer.write([], [])
        writer.write(texts[1:], [False, False, True, False])
    rows = np.fromfile(tmp_path / "hashes", dtype="<u8").reshape(-1, 4).tolist()
    words = [np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype="<u8").tolist() for text in texts]
    expected = [[*words[place], place, 2 * len(texts[place]) + (place == 3)] for place in range(5)]
    assert rows == sorted(expected[:3]) + sorted(expected[3:])
    assert [len(run) for run in runs(tmp_path / "hashes")] == [3, 2]
    with pytest.raises(KeyboardInterrupt), HashWriter(tmp_path / "hashes") as writer:
        raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 1
