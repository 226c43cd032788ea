"""The shard: the tokens of one raw file on disk, to be read through a memory map.

Format version 1, all numbers little-endian and unsigned, sections in this order:

    offset  bytes  header (256 bytes)
         0      8  magic: the ASCII letters MOEPPSHD
         8      4  format version: 1
        12      4  token width w in bytes: 2 when the vocabulary has at most 65,536 ids, otherwise 4
        16      8  T, tokens
        24      8  D, documents
        32      8  P, parts
        40      8  bytes of text (UTF-8) that the documents had
        48      4  vocabulary size
        52      4  end-of-document id
        56      8  part length: the number of tokens at whose multiples parts are cut
        64     32  fingerprint of the tokenizer, SHA-256
        96     16  BLAKE2b-128 of the tokens section
       112     16  BLAKE2b-128 of the document ends section
       128     16  BLAKE2b-128 of the part cuts section
       144     16  BLAKE2b-128 of the header's first 144 bytes
       160     96  zeros

       256    w*T  tokens: each document's ids followed by one end-of-document id
                   zeros up to a multiple of 8
              8*D  document ends: the position just past each end-of-document id, ascending; the last is T
              8*P  part cuts: where each part ends, ascending; the last is T. A part ends at the first
                   document end at or after a multiple of the part length, so parts hold whole documents

The header's checksum covers the other three, so these 16 bytes name the content of the whole file. A shard is
written under a temporary name, synced and renamed: a file that bears a shard's name is complete.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.document import DataError

MAGIC = b"MOEPPSHD"
VERSION = 1
HEADER_BYTES = 256
DEFAULT_PART_TOKENS = 262_144
_LAYOUT = struct.Struct("<8sIIQQQQIIQ32s16s16s16s")
CHUNK_BYTES = 1 << 22
"""Sections are summed and checked in pieces of this size."""


def token_width(vocab_size: int) -> int:
    """Bytes per token id: 2 up to 65,536 ids, 4 beyond."""
    return 2 if vocab_size <= 1 << 16 else 4


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says about itself; see the module's docstring for the bytes."""

    width: int
    tokens: int
    documents: int
    parts: int
    text_bytes: int
    vocab_size: int
    eos_id: int
    part_tokens: int
    fingerprint: str
    """The tokenizer's, 64 hexadecimal digits."""
    tokens_sum: bytes
    ends_sum: bytes
    cuts_sum: bytes

    def _body(self) -> bytes:
        return _LAYOUT.pack(
            MAGIC,
            VERSION,
            self.width,
            self.tokens,
            self.documents,
            self.parts,
            self.text_bytes,
            self.vocab_size,
            self.eos_id,
            self.part_tokens,
            bytes.fromhex(self.fingerprint),
            self.tokens_sum,
            self.ends_sum,
            self.cuts_sum,
        )

    def encode(self) -> bytes:
        """The header's 256 bytes."""
        body = self._body()
        return (body + _digest(body)).ljust(HEADER_BYTES, b"\0")

    @property
    def checksum(self) -> str:
        """32 hexadecimal digits that name the shard's whole content."""
        return _digest(self._body()).hex()

    @property
    def ends_offset(self) -> int:
        """Where the document ends start in the file."""
        return HEADER_BYTES + -(-self.tokens * self.width // 8) * 8

    @property
    def cuts_offset(self) -> int:
        """Where the part cuts start in the file."""
        return self.ends_offset + 8 * self.documents

    @property
    def file_bytes(self) -> int:
        """Size the file must have."""
        return self.cuts_offset + 8 * self.parts


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def read_header(path: Path | str) -> ShardHeader:
    """Read a shard's header and check what is cheap: magic, version, checksum, width, size of the file."""
    try:  # plain calls of the system: a run opens ten thousand shards at its start
        descriptor = os.open(path, os.O_RDONLY)
        try:
            raw = os.read(descriptor, HEADER_BYTES)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise DataError(
            f"shard {path} is missing; run `moepp-data build` again, or copy the whole folder"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error
    if len(raw) < HEADER_BYTES or raw[:8] != MAGIC:
        raise DataError(
            f"{path} is no shard: it starts with {raw[:8]!r} instead of {MAGIC!r}, or ends within its"
            f" {HEADER_BYTES}-byte header; build it again with `moepp-data build`"
        )
    _, version, *numbers = _LAYOUT.unpack_from(raw)
    if version != VERSION:
        raise DataError(
            f"shard {path} has format version {version}; this program reads version {VERSION}: "
            + ("update the program" if version > VERSION else "build the shard again")
        )
    width, tokens, documents, parts, text_bytes, vocab_size, eos_id, part_tokens, fingerprint, *sums = numbers
    header = ShardHeader(
        width, tokens, documents, parts, text_bytes, vocab_size, eos_id, part_tokens, fingerprint.hex(), *sums
    )
    if raw != header.encode():
        raise DataError(
            f"shard {path} has a damaged header (its checksum does not match); run"
            " `moepp-data build` again, which makes it anew, or copy it again"
        )
    if width != token_width(vocab_size):
        raise DataError(
            f"shard {path} has tokens of {width} bytes, but a vocabulary of {vocab_size:,} ids takes "
            f"{token_width(vocab_size)}; build it again"
        )
    if size != header.file_bytes:
        raise DataError(
            f"shard {path} has {size:,} bytes and should have {header.file_bytes:,}: it was cut short or"
            " grew; delete it and run `moepp-data build` again, or copy it again"
        )
    return header


class Shard:
    """A shard open for reading; the arrays are views of the file, whose pages are read when touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = header = read_header(path)
        self.tokens: np.ndarray = np.empty(0, dtype=f"<u{header.width}")
        """Token ids, uint16 or uint32 [tokens], read-only."""
        self.ends: np.ndarray = np.empty(0, dtype="<u8")
        """Document ends, uint64 [documents], read-only."""
        self.cuts: np.ndarray = np.empty(0, dtype="<u8")
        """Part cuts, uint64 [parts], read-only."""
        self._padding: np.ndarray = np.empty(0, dtype=np.uint8)
        if header.tokens:
            with open(path, "rb") as file:
                raw = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
            self.tokens = raw[HEADER_BYTES : HEADER_BYTES + header.tokens * header.width].view(
                self.tokens.dtype
            )
            self._padding = raw[HEADER_BYTES + header.tokens * header.width : header.ends_offset]
            self.ends = raw[header.ends_offset : header.cuts_offset].view("<u8")
            self.cuts = raw[header.cuts_offset : header.file_bytes].view("<u8")

    def verify(self) -> None:
        """Read all of it and check checksums, ids, document ends and part cuts.

        Raises DataError naming the first thing that is wrong.
        """
        header = self.header
        for name, section, expected in (
            ("tokens", self.tokens, header.tokens_sum),
            ("document ends", self.ends, header.ends_sum),
            ("part cuts", self.cuts, header.cuts_sum),
        ):
            if section_sum(section) != expected or self._padding.any():
                raise DataError(
                    f"shard {self.path}: the {name} do not match their checksum, so bytes have changed since"
                    " it was built; delete it and run `moepp-data build` again"
                )
        self._verify_documents()
        if not np.array_equal(self.cuts, _cuts_of(self.ends, header.part_tokens)):
            raise DataError(
                f"shard {self.path}: the part cuts are not those of its documents; delete it and run"
                " `moepp-data build` again"
            )

    def _verify_documents(self) -> None:
        header, found = self.header, 0
        for start, chunk in _chunks(self.tokens):
            if int(chunk.max()) >= header.vocab_size:
                raise DataError(
                    f"shard {self.path}: token id {chunk.max()} is outside the vocabulary of"
                    f" {header.vocab_size:,}; delete it and run `moepp-data build` again"
                )
            ends = np.flatnonzero(chunk == header.eos_id) + start + 1
            if not np.array_equal(ends, self.ends[found : found + len(ends)]):
                raise DataError(
                    f"shard {self.path}: end-of-document ids and document ends disagree near token {start:,};"
                    " delete it and run `moepp-data build` again"
                )
            found += len(ends)
        if found != header.documents or (header.tokens and int(self.ends[-1]) != header.tokens):
            raise DataError(
                f"shard {self.path}: {found:,} end-of-document ids for {header.documents:,} documents, or"
                " tokens after the last of them; delete it and run `moepp-data build` again"
            )


def _chunks(section: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    step = CHUNK_BYTES // section.itemsize
    for start in range(0, len(section), step):
        yield start, section[start : start + step]


def section_sum(section: np.ndarray) -> bytes:
    """BLAKE2b-128 of a section, as the header keeps it."""
    digest = hashlib.blake2b(digest_size=16)
    for _, chunk in _chunks(section):
        digest.update(chunk.data)
    return digest.digest()


def _cuts_of(ends: np.ndarray, part_tokens: int) -> np.ndarray:
    """Part cuts of a shard by the definition, in one go: uint64 [parts]."""
    if not len(ends):
        return np.empty(0, dtype=np.uint64)
    marks = np.arange(part_tokens, int(ends[-1]), part_tokens, dtype=np.uint64)
    return np.unique(np.append(ends[np.searchsorted(ends, marks)], ends[-1]))
