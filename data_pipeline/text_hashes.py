"""The documents of one raw file by the hashes of their texts, so that equal ones can be found among billions.

OUT/dedup/<corpus>/<raw file>.hashes has 32 bytes for each document that the raw file holds, those that
deduplication leaves out too; little-endian, unsigned:

    0  8  high    BLAKE2b-128 of the text (UTF-8), its first 8 bytes
    8  8  low     and its last 8
    16 8  place   number of the document in the file, from 0
    24 8  text    twice the bytes of the text, plus 1 when the document is held out

in runs of 524,288 documents (the last may be shorter) that follow one another as in the raw file and are
sorted inside by (high, low, place). So a file of any size is written in constant memory, and all documents
whose hashes lie in a range are a few slices. It depends on the raw file and the held-out share alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from data_pipeline.atomic import commit, create_beside

DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u8"), ("text", "<u8")])
RUN_DOCUMENTS = 1 << 19


def hashes_path(root: Path, file_key: str) -> Path:
    """Where the hashes of a raw file's documents lie in the set at `root`."""
    return root / "dedup" / f"{file_key}.hashes"


def text_hash(text: bytes) -> bytes:
    """The 16 bytes by which texts are compared."""
    return hashlib.blake2b(text, digest_size=16).digest()


class HashWriter:
    """Writes the hashes of one file's documents, in file order, in constant memory; use it as a context manager.

    The file appears under its name when the block ends without an exception.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sum = hashlib.blake2b(digest_size=16)
        self._run = np.empty(RUN_DOCUMENTS, dtype=DOCUMENT)
        self._filled = self._documents = 0
        self._file = create_beside(path)

    @property
    def checksum(self) -> str:
        """32 hexadecimal digits that name the content, once the block has ended."""
        return self._sum.hexdigest()

    def write(self, texts: Sequence[bytes], held_out: Sequence[bool]) -> None:
        """Append documents given by their texts in UTF-8."""
        new = np.empty(len(texts), dtype=DOCUMENT)
        words = np.frombuffer(b"".join(map(text_hash, texts)), dtype="<u8").reshape(-1, 2)
        new["high"], new["low"] = words[:, 0], words[:, 1]
        new["place"] = np.arange(self._documents, self._documents + len(texts))
        new["text"] = 2 * np.array([len(text) for text in texts], dtype="<u8") + np.array(held_out, dtype="<u8")
        self._documents += len(texts)
        while len(new):
            taken = new[: RUN_DOCUMENTS - self._filled]
            self._run[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            new = new[len(taken) :]
            if self._filled == RUN_DOCUMENTS:
                self._end_run()

    def _end_run(self) -> None:
        run = self._run[: self._filled]
        data = run[np.lexsort((run["low"], run["high"]))].tobytes()
        self._sum.update(data)
        self._file.write(data)
        self._filled = 0

    def __enter__(self) -> HashWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            try:
                if kind is None:
                    self._end_run()
                    commit(self._file, self.path)
            finally:
                Path(self._file.name).unlink(missing_ok=True)


def runs(path: Path) -> Iterator[np.ndarray]:
    """The runs of one file, memory-mapped: arrays of `DOCUMENT`."""
    if path.stat().st_size:
        documents = np.asarray(np.memmap(path, dtype=DOCUMENT, mode="r"))
        for start in range(0, len(documents), RUN_DOCUMENTS):
            yield documents[start : start + RUN_DOCUMENTS]
