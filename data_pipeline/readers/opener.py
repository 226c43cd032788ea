"""A raw file -> its lines, whatever it is compressed with. Constant memory; nothing missing in silence.

    1. The suffix says the container, the first bytes must agree: a `.zst` that is a Git-LFS pointer, a `.gz`
       that a download tool has already unpacked, a compressed file named `.jsonl` are errors that say so.
    2. Blocks are decompressed one by one, member after member (gzip) and frame after frame (zstandard).
       A file that ends inside one of them is truncated. (Stream readers end quietly there.)
    3. Lines are cut at `\\n` alone. `splitlines` would also cut at U+2028 or U+0085 inside a document.

A trailing `\\r` stays on its line (JSON takes it as white space), a UTF-8 byte order mark at the start of
the file is removed, and the last line needs no newline.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from data_pipeline.document import GIT_LFS_POINTER, DataError, RawFile
from data_pipeline.readers.storage import named_errors, open_binary

SUFFIXES = {
    ".jsonl": "plain",
    ".ndjson": "plain",
    ".jsonl.gz": "gzip",
    ".json.gz": "gzip",
    ".jsonl.zst": "zstandard",
    ".json.zst": "zstandard",
}
"""Suffix -> container. A plain `.json` is in practice no JSON lines file (`dataset_infos.json`)."""

MAX_LINE_BYTES = 1 << 29
"""A longer line means that the file is no JSON lines at all; collecting it would fill the memory."""

_MAGIC = {"gzip": b"\x1f\x8b", "zstandard": b"\x28\xb5\x2f\xfd"}
_SKIPPABLE_FRAME = b"\x2a\x4d\x18"
"""Bytes 2 to 4 of the empty zstandard frame parallel compressors begin with (byte 1: 0x50 to 0x5f)."""
_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 18
_ZSTD_FEED_BYTES = 1 << 11
"""zstandard returns all that one input expands to, at most 32,768-fold: 2 KiB bound that to 64 MiB."""
_ZSTD_MAX_WINDOW = 1 << 31
_MAX_OUTPUT_BYTES = 1 << 20


def container_of(name: str) -> str | None:
    """`plain`, `gzip` or `zstandard` by the name's suffix; None for a name that is no JSON lines file."""
    lowered = name.lower()
    matching = (container for suffix, container in SUFFIXES.items() if lowered.endswith(suffix))
    return next(matching, None)


def read_lines(
    path: str, *, span: tuple[int, int] | None = None, skip: int = 0
) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of a local path or URL in order, without their `\\n`, each with the offset just after it.

    Blank lines too, so that counting works. `span`: read the bytes [start, stop) of a plain file as if they
    were the file. `skip`: begin after so many bytes of the (decompressed) content, which must be the end of a
    line; offsets go on from there. Plain files are entered at that place, compressed ones read up to it.

    Lines before a damaged place are yielded before the `DataError` is raised. Errors: unreadable, empty
    (also when only the decompressed content is), Git-LFS pointer, content that belies the suffix, truncated
    or damaged data, trailing garbage, compressed twice, shorter than `span` or `skip`, a line over
    `MAX_LINE_BYTES`.
    """
    lines = _split(path, span, skip)
    if not skip and (span is None or span[0] == 0):
        line, end = next(lines)
        yield line.removeprefix(_BOM), end
    yield from lines


def line_start(file: BinaryIO, place: int, raw_file: RawFile) -> int:
    """Offset of the first line that begins at or after `place` in a plain file; its size where none does."""
    if place >= raw_file.size:
        return raw_file.size
    file.seek(place - 1)
    read = 0
    while block := file.read(_BLOCK_BYTES):
        newline = block.find(b"\n")
        if newline >= 0:
            return place + read + newline
        read += len(block)
        if read > MAX_LINE_BYTES:
            raise _too_long(raw_file.path)
    return raw_file.size


def _split(path: str, span: tuple[int, int] | None, skip: int) -> Iterator[tuple[bytes, int]]:
    """At least one line when nothing is skipped, or a `DataError`."""
    pieces: list[bytes] = []  # of the line not yet ended; joined once, so a long line costs no more per byte
    held = 0
    end = skip
    for block in _content(path, span, skip):
        first, *rest = block.split(b"\n")
        pieces.append(first)
        held += len(first)
        if held > MAX_LINE_BYTES:
            raise _too_long(path)
        if rest:
            end += held + 1
            yield b"".join(pieces), end
            last = rest.pop()
            for line in rest:
                end += len(line) + 1
                yield line, end
            pieces, held = [last], len(last)
    if not end and not held:
        raise DataError(f"{path} is compressed, but empty: it holds 0 bytes; download it again or remove it")
    if held:
        yield b"".join(pieces), end + held


def _content(path: str, span: tuple[int, int] | None, skip: int) -> Iterator[bytes]:
    """The decompressed bytes of `path` after the first `skip`, block by block; blocks may be empty."""
    with named_errors(path), open_binary(path) as file:
        first = file.read(_BLOCK_BYTES)
        container = _checked_container(path, first)
        if container == "plain":
            yield from _plain(path, file, first, span or (0, None), skip)
            return
        blocks = _gunzip(_blocks(first, file), path) if container == "gzip" else _unzstd(_blocks(first, file), path)
        yield from _behind(_checked_once(blocks, path), path, skip)


def _plain(
    path: str, file: BinaryIO, first: bytes, span: tuple[int, int | None], skip: int
) -> Iterator[bytes]:
    start, stop = span
    place = start + skip
    if place:
        size = file.seek(0, os.SEEK_END)
        if place > size:
            raise DataError(_shorter(path, size, place))
        file.seek(place)
        first = file.read(_BLOCK_BYTES)
    for block in _blocks(first, file):
        if stop is not None and place + len(block) >= stop:
            yield block[: stop - place]
            return
        place += len(block)
        yield block
    if stop is not None and place < stop:
        raise DataError(_shorter(path, place, stop))


def _blocks(first: bytes, file: BinaryIO) -> Iterator[bytes]:
    block = first
    while block:
        yield block
        block = file.read(_BLOCK_BYTES)


def _behind(blocks: Iterator[bytes], path: str, skip: int) -> Iterator[bytes]:
    """What comes after the first `skip` bytes."""
    left = skip
    for block in blocks:
        if left >= len(block):
            left -= len(block)
        else:
            yield block[left:] if left else block
            left = 0
    if left:
        raise DataError(_shorter(path, skip - left, skip))


def _checked_once(blocks: Iterator[bytes], path: str) -> Iterator[bytes]:
    """The same blocks, unless what was unpacked is packed once more, as some servers send files."""
    head = b""
    for block in blocks:
        if len(head) < 4:
            head += block[:4]
            inner = next((name for name, magic in _MAGIC.items() if head.startswith(magic)), None)
            if inner:
                raise DataError(
                    f"{path} is compressed twice: there is {inner} data inside; unpack it once, or download it again"
                )
        yield block


def _checked_container(path: str, head: bytes) -> str:
    """The container the suffix names, once the first bytes agree."""
    container = container_of(path)
    if container is None:
        raise DataError(f"{path} has none of the known suffixes {', '.join(SUFFIXES)}; rename or convert it")
    if not head:
        raise DataError(f"{path} is empty (0 bytes); download it again or remove it")
    if head.startswith(GIT_LFS_POINTER):
        raise DataError(
            f"{path} is a Git-LFS pointer, not the data itself; run `git lfs pull` where it lies"
        )
    found = next((name for name, magic in _MAGIC.items() if head.startswith(magic)), "plain")
    if head[1:4] == _SKIPPABLE_FRAME and 0x50 <= head[0] <= 0x5F:
        found = "zstandard"
    if found != container:
        raise DataError(
            f"{path} is named as {container} data but begins with {head[:8]!r}, which is "
            f"{found if found != 'plain' else 'neither gzip nor zstandard'}; download it again or rename it "
            f"(data_pipeline.readers.opener knows {', '.join(SUFFIXES)})"
        )
    return container


def _gunzip(blocks: Iterator[bytes], path: str) -> Iterator[bytes]:
    member = None
    members = 0
    for pending in blocks:
        while pending:
            if member is None:
                if members:
                    pending = pending.lstrip(b"\0")  # padding to a tape or disk block may follow
                    if not pending:
                        break
                if not _MAGIC["gzip"].startswith(pending[:2]):
                    raise DataError(
                        f"{path}: after {members} complete gzip members come bytes that are no gzip data "
                        f"({pending[:8]!r}); the file is damaged or was appended to: download it again"
                    )
                member = zlib.decompressobj(wbits=31)
            try:
                yield member.decompress(pending, _MAX_OUTPUT_BYTES)
            except zlib.error as error:
                raise DataError(f"{path}: damaged gzip data ({error}); download it again") from error
            if member.eof:
                pending, member, members = member.unused_data, None, members + 1
            else:
                pending = member.unconsumed_tail
    if member is not None:
        raise DataError(_truncated(path, "gzip member"))


def _unzstd(blocks: Iterator[bytes], path: str) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    frame = None
    for block in blocks:
        for start in range(0, len(block), _ZSTD_FEED_BYTES):
            end = start + _ZSTD_FEED_BYTES
            pending = block[start:end]
            while pending:
                frame = frame or decompressor.decompressobj()
                try:
                    yield frame.decompress(pending)
                except zstandard.ZstdError as error:
                    raise DataError(f"{path}: damaged zstandard data ({error}); download it again") from error
                pending = b""
                if frame.eof:
                    pending, frame = frame.unused_data, None
    if frame is not None:
        raise DataError(_truncated(path, "zstandard frame"))


def _truncated(path: str, unit: str) -> str:
    return (
        f"{path} is truncated: it ends inside a {unit}, so lines are missing at its end; download it again "
        "(compare its size with the publisher's)"
    )


def _shorter(path: str, size: int, wanted: int) -> str:
    return f"{path} holds {size:,} bytes, but was to be read from or up to byte {wanted:,}: it has changed since then"


def _too_long(path: str) -> DataError:
    return DataError(
        f"{path}: a line is longer than {MAX_LINE_BYTES} bytes; a corpus file holds one JSON object "
        "a line (data_pipeline.readers.opener); convert it to JSON lines"
    )
