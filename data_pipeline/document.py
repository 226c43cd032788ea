"""The nouns of the data path: what a raw file is, what one of its lines becomes, and how bad input is named.

    RawFile     one file of a corpus (or a piece of one) as it is stored, with the label the mixture knows it by
    Document    one training document: a text and where it came from
    BadLine     one line that is no document, kept whole so that it can be copied to the quarantine
    PassedOver  one line that is left out on purpose: the user excluded its set, or it belongs to another `RawFile`
    Mark        how far a file has been read
    DataError   everything a user can put right: the message says value, rule, place and next step
    counted     so many of them, in words

Every non-blank line of a raw file becomes exactly one `Document`, `BadLine` or `PassedOver`, so
documents + bad lines + passed over = non-blank lines, and nothing is lost in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git-LFS pointer begins: the few lines left in place of a large file that was never downloaded."""


class DataError(ValueError):
    """Input that cannot be used. The command line prints it as one message, without a traceback."""


def counted(number: float, noun: str, write: Callable[[float], str] = "{:,}".format) -> str:
    """`1 file`, `1,200 files`: a number, as `write` writes it, with its noun."""
    return f"{write(number)} {noun}" + "s" * (number != 1)


@dataclass(frozen=True, slots=True)
class Document:
    """One document, before tokenisation."""

    text: str
    """Never empty, and always encodable as UTF-8 (readers refuse lone surrogates)."""
    source: str
    """The label of its file, such as `redpajama/book`; mixture weights are given to labels."""
    id: str
    """Names the document in messages: `<file name>:<line>`, or the corpus's own id where it has one."""
    line: int
    """1-based number of its line (of its record, in a table) within the raw file."""
    end: int
    """Offset in the raw file's decompressed content just after its line: reading can go on from there."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """One line that is no document."""

    file: str
    """The raw file's `name`."""
    line: int
    """As `Document.line`."""
    reason: str
    """What is wrong with it, in words."""
    raw: bytes
    """The line as read, without its newline; of a table, the record as JSON."""
    end: int
    """As `Document.end`."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """One line that is left out on purpose."""

    line: int
    """As `Document.line`."""
    end: int
    """As `Document.end`."""
    reason: str
    """Why, in words."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a raw file has been read: `line` lines, blank ones too, which are `end` bytes of its content."""

    line: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True)
class RawFile:
    """One file of a corpus, or one piece of a large plain file: the unit that is read, built and ordered."""

    path: str
    """Absolute path on this machine, or URL; never stored in shards."""
    name: str
    """Path below the corpus's location with forward slashes, the stable key by which files are ordered. A
    piece has `@` and its number behind it (`book.jsonl@0003`), one subset of a mixed file its name
    (`chunk1/0.jsonl.zst@book`)."""
    source: str
    """The label all documents of this file carry."""
    size: int
    """Bytes as stored, of the piece where it is one."""
    version: str
    """Another text when the file's content is another, as far as its storage can tell without reading it."""
    span: tuple[int, int] | None = None
    """First byte and the byte after the last of a piece of a plain file; None for a whole file."""
