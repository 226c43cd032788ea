"""The nouns of the data path: what a raw file is, what one of its lines becomes, and how bad input is named.

    RawFile    one file of a corpus as it lies on disk, with the label the mixture knows it by
    Document   one training document: a text and where it came from
    BadLine    one line that is no document, kept whole so that it can be copied to the quarantine
    DataError  everything a user can put right: the message says value, rule, place and next step

Every non-blank line of a raw file becomes exactly one `Document` or one `BadLine`, so
documents + bad lines = non-blank lines, and nothing is lost in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git-LFS pointer begins: the few lines left in place of a large file that was never downloaded."""


class DataError(ValueError):
    """Input that cannot be used. The command line prints it as one message, without a traceback."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document, before tokenisation."""

    text: str
    """Never empty, and always encodable as UTF-8 (readers refuse lone surrogates)."""
    source: str
    """The label of its file, such as `redpajama/book`; mixture weights are given to labels."""
    id: str
    """Names the document in messages: `<file name>:<line>`, or the corpus's own id where it has one."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """One line that is no document."""

    file: str
    """The raw file's `name`."""
    line: int
    """1-based line number in the decompressed file."""
    reason: str
    """What is wrong with it, in words."""
    raw: bytes
    """The line as read, without its newline."""


@dataclass(frozen=True, slots=True)
class RawFile:
    """One file of a corpus."""

    path: str
    """Absolute path on this machine; never stored in shards."""
    name: str
    """Path below the corpus root with forward slashes: the stable key by which files are ordered."""
    source: str
    """The label all documents of this file carry."""
