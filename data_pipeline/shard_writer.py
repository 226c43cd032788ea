"""Writing a shard: documents in, one complete file out, in constant memory.

Tokens go to the file as they come; document ends wait in a second, nameless file until the number of tokens
is known; the header is written last, over the zeros that held its place. Then the file is synced and gets its
name.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from data_pipeline.atomic import TEMPORARY, commit, create_beside
from data_pipeline.document import DataError
from data_pipeline.shards import (
    CHUNK_BYTES,
    DEFAULT_PART_TOKENS,
    HEADER_BYTES,
    ShardHeader,
    section_sum,
    token_width,
)


class ShardWriter:
    """Write one shard in constant memory; use it as a context manager.

        with ShardWriter(path, vocab_size=..., eos_id=..., fingerprint=...) as writer:
            writer.write(ids_per_document, text_bytes=...)
        writer.header      # what was written; None when there was no document, and then there is no file

    The file appears under its name when the block ends without an exception, and not before.
    """

    def __init__(
        self,
        path: Path,
        *,
        vocab_size: int,
        eos_id: int,
        fingerprint: str,
        part_tokens: int = DEFAULT_PART_TOKENS,
    ) -> None:
        self.path = path
        self.header: ShardHeader | None = None
        self._vocab_size, self._eos_id, self._fingerprint = vocab_size, eos_id, fingerprint
        self._part_tokens, self._next_mark = part_tokens, part_tokens
        self._dtype = np.dtype(f"<u{token_width(vocab_size)}")
        self._tokens = self._documents = self._text_bytes = 0
        self._cuts = array("Q")
        self._tokens_digest = hashlib.blake2b(digest_size=16)
        self._ends_digest = hashlib.blake2b(digest_size=16)
        self._file = create_beside(path)
        self._ends: IO[bytes] = tempfile.TemporaryFile(prefix=TEMPORARY, dir=path.parent)
        self._file.write(bytes(HEADER_BYTES))

    def write(self, documents: Sequence[np.ndarray], *, text_bytes: int) -> None:
        """Append documents, each a 1-D integer array of ids without its end; `text_bytes`: UTF-8, of all."""
        if documents:
            end = np.array([self._eos_id], dtype=documents[0].dtype)
            tokens = np.concatenate([part for ids in documents for part in (ids, end)])
            self.write_tokens(tokens, np.cumsum([len(ids) + 1 for ids in documents]), text_bytes=text_bytes)

    def write_tokens(self, tokens: np.ndarray, ends: np.ndarray, *, text_bytes: int) -> None:
        """Append whole documents as they lie in a shard: ids with their ends, and where in `tokens` each ends."""
        if not len(ends):
            return
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise DataError(
                f"token id {lowest if lowest < 0 else highest} is outside the tokenizer's vocabulary of"
                f" {self._vocab_size:,} ids, so {self.path} is not written; the tokenizer, or the shard that is copied,"
                " is damaged: replace it"
            )
        stored = np.ascontiguousarray(tokens, dtype=self._dtype)
        stored_ends = ends.astype("<u8") + np.uint64(self._tokens)
        self._file.write(stored.data)
        self._tokens_digest.update(stored.data)
        self._ends.write(stored_ends.data)
        self._ends_digest.update(stored_ends.data)
        self._cut_parts(stored_ends)
        self._tokens += len(stored)
        self._documents += len(ends)
        self._text_bytes += text_bytes

    def _cut_parts(self, ends: np.ndarray) -> None:
        while self._next_mark <= int(ends[-1]):
            cut = int(ends[np.searchsorted(ends, np.uint64(self._next_mark))])
            self._cuts.append(cut)
            self._next_mark = (cut // self._part_tokens + 1) * self._part_tokens

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file, self._ends:
            try:
                if kind is None and self._documents:
                    self._finish()
                elif kind is None:
                    self.path.unlink(missing_ok=True)  # an earlier build may have found documents
            finally:
                if self.header is None:  # before the files are closed, which fails too when the disk is full
                    Path(self._file.name).unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self._cuts or self._cuts[-1] != self._tokens:
            self._cuts.append(self._tokens)
        cuts = np.array(self._cuts, dtype="<u8")
        header = ShardHeader(
            width=self._dtype.itemsize,
            tokens=self._tokens,
            documents=self._documents,
            parts=len(cuts),
            text_bytes=self._text_bytes,
            vocab_size=self._vocab_size,
            eos_id=self._eos_id,
            part_tokens=self._part_tokens,
            fingerprint=self._fingerprint,
            tokens_sum=self._tokens_digest.digest(),
            ends_sum=self._ends_digest.digest(),
            cuts_sum=section_sum(cuts),
        )
        self._file.write(bytes(header.ends_offset - self._file.tell()))
        self._ends.seek(0)
        while chunk := self._ends.read(CHUNK_BYTES):
            self._file.write(chunk)
        self._file.write(cuts.data)
        self._file.seek(0)
        self._file.write(header.encode())
        commit(self._file, self.path)
        self.header = header
