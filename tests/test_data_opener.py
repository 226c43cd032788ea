"""Files of every container to lines; and each way in which a file can be less than it seems."""

from __future__ import annotations

import gzip
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from data_pipeline.document import DataError
from data_pipeline.readers import opener
from data_pipeline.readers.opener import SUFFIXES

NOT_NEWLINES = "caf\u00e9 \u2028 \u0085 \x0b \x0c \x1c".encode()
LINES = [b'{"text": "one"}', b"", b'{"text": "two"}\r', NOT_NEWLINES, b"last"]
CONTENT = b"\n".join(LINES)


def read_lines(path: str, **options) -> Iterator[bytes]:
    return (line for line, _ in opener.read_lines(path, **options))


def zstd(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False, **options).compress(data)


PACK: dict[str, Callable[[bytes], bytes]] = {"plain": bytes, "gzip": gzip.compress, "zstandard": zstd}


def packed(folder: Path, suffix: str, data: bytes = CONTENT) -> Path:
    path = folder / f"file{suffix}"
    path.write_bytes(PACK[SUFFIXES[suffix]](data))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_are_cut_at_newlines_alone_with_and_without_a_last_one(tmp_path, suffix, end):
    assert list(read_lines(str(packed(tmp_path, suffix, CONTENT + end)))) == LINES


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_byte_order_mark_is_removed_at_the_start_only(tmp_path, suffix):
    bom = b"\xef\xbb\xbf"
    assert list(read_lines(str(packed(tmp_path, suffix, bom + b"a\n" + bom + b"b")))) == [b"a", bom + b"b"]


def test_byte_order_mark_is_removed_when_it_comes_in_pieces(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstd(bytes([byte])) for byte in b"\xef\xbb\xbfa"))
    assert list(read_lines(str(path))) == [b"a"]


def test_lines_longer_than_a_block_and_blocks_of_many_lines(tmp_path):
    lines = [b"x" * 700_000, b"", b"y" * 300_000, *(b"%d" % i for i in range(200_000))]
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        assert list(read_lines(str(packed(tmp_path, suffix, b"\n".join(lines))))) == lines


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 30, 64])
def test_several_frames_and_members_read_as_one_file(tmp_path, size):
    pieces = [CONTENT[i : i + size] for i in range(0, len(CONTENT), size)]
    for suffix, pack in ((".jsonl.zst", zstd), (".json.gz", gzip.compress)):
        path = tmp_path / f"several{suffix}"
        path.write_bytes(b"".join(map(pack, pieces)))
        assert list(read_lines(str(path))) == LINES


def test_frames_that_end_at_every_place_of_the_pieces_fed_to_zstandard(tmp_path):
    incompressible = bytes(range(128, 256)) * 20
    path = tmp_path / "a.jsonl.zst"
    for length in (opener._ZSTD_FEED_BYTES - 40, opener._ZSTD_FEED_BYTES, 2500):
        frame = zstd(incompressible[:length], write_checksum=True)
        path.write_bytes(frame * 60)
        assert list(read_lines(str(path))) == [incompressible[:length] * 60]


def test_skippable_frames_and_zero_padding_hold_nothing(tmp_path):
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"extra"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable + zstd(CONTENT) + skippable)
    assert list(read_lines(str(path))) == LINES
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(CONTENT) + bytes(1000) + gzip.compress(b"\nmore") + bytes(7))
    assert list(read_lines(str(path))) == [*LINES, b"more"]


def test_window_logs_up_to_31(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=30, hash_log=10, chain_log=10, strategy=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(CONTENT) + compressor.flush()
    assert zstandard.get_frame_parameters(frame).window_size == 1 << 30
    path.write_bytes(frame)
    assert list(read_lines(str(path))) == LINES
    # The window descriptor follows magic and frame header descriptor; its upper five bits are log - 10.
    path.write_bytes(frame[:5] + bytes([21 << 3]) + frame[6:])
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 31
    assert list(read_lines(str(path))) == LINES


@pytest.mark.parametrize("suffix, unit", [(".jsonl.zst", "zstandard frame"), (".json.gz", "gzip member")])
def test_truncation_is_found_at_every_byte(tmp_path, suffix, unit):
    path = packed(tmp_path, suffix)
    whole = path.read_bytes()
    for length in range(4, len(whole)):
        for complete in (b"", whole):  # in the only frame, and in a later one
            path.write_bytes(complete + whole[:length])
            with pytest.raises(DataError, match=rf"file{suffix} is truncated: it ends inside a {unit}"):
                list(read_lines(str(path)))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("block_bytes", [4, 7, 1 << 18])
def test_every_line_comes_with_its_end_and_can_be_the_last_that_is_skipped(
    tmp_path, suffix, block_bytes, monkeypatch
):
    path = str(packed(tmp_path, suffix))
    monkeypatch.setattr(opener, "_BLOCK_BYTES", block_bytes)
    lines = list(opener.read_lines(path))
    ends = [len(b"\n".join(LINES[: place + 1])) + 1 for place in range(len(LINES))]
    assert lines == list(zip(LINES, [*ends[:-1], len(CONTENT)], strict=True))
    for place, (_, end) in enumerate(lines):
        assert list(opener.read_lines(path, skip=end)) == lines[place + 1 :]


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".json.gz"])
@pytest.mark.parametrize("inner", ["gzip", "zstandard"])
def test_what_was_compressed_twice_is_named(tmp_path, suffix, inner):
    path = packed(tmp_path, suffix, PACK[inner](CONTENT))
    with pytest.raises(DataError, match=f"file{suffix} is compressed twice: there is {inner} data inside"):
        list(read_lines(str(path)))


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".json.gz"])
def test_lines_before_a_truncation_come_out_first(tmp_path, suffix):
    path = packed(tmp_path, suffix, b"\n".join(b"%d" % (i * i) for i in range(500_000)))
    path.write_bytes(path.read_bytes()[:-100])
    lines = read_lines(str(path))
    assert [next(lines) for _ in range(400_000)] == [b"%d" % (i * i) for i in range(400_000)]
    with pytest.raises(DataError, match="is truncated"):
        list(lines)


def test_damage_is_found(tmp_path):
    checksummed = {".jsonl.zst": zstd(CONTENT, write_checksum=True), ".json.gz": gzip.compress(CONTENT)}
    for suffix, data in checksummed.items():
        whole = bytearray(data)
        whole[-2 if suffix == ".jsonl.zst" else -6] ^= 0x10  # inside the checksum
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(whole)
        with pytest.raises(DataError, match=rf"damaged{suffix}: damaged (gzip|zstandard) data \(.*download"):
            list(read_lines(str(path)))


@pytest.mark.parametrize("garbage", [b"garbage", b"\x1fx", b"\0\0x", b"{"])
def test_trailing_garbage_after_gzip(tmp_path, garbage):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(CONTENT) * 2 + garbage)
    with pytest.raises(DataError, match="after 2 complete gzip members come bytes that are no gzip data"):
        list(read_lines(str(path)))


def test_trailing_garbage_after_zstandard(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(CONTENT) + b"garbage")
    with pytest.raises(DataError, match="a.jsonl.zst: damaged zstandard data"):
        list(read_lines(str(path)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_git_lfs_pointer_and_empty_file(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=f"a{suffix} is a Git-LFS pointer, .*; run `git lfs pull`"):
        list(read_lines(str(path)))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"a{suffix} is empty \(0 bytes\); download it again or remove it"):
        list(read_lines(str(path)))


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".json.gz"])
def test_compressed_nothing_is_empty_too(tmp_path, suffix):
    with pytest.raises(DataError, match="is compressed, but empty: it holds 0 bytes"):
        list(read_lines(str(packed(tmp_path, suffix, b""))))


@pytest.mark.parametrize(
    "suffix, content, message",
    [
        (".json.gz", CONTENT, r"as gzip data but begins with b'\{\"text\":', which is neither gzip nor zst"),
        (".jsonl.zst", gzip.compress(CONTENT), r"as zstandard data but begins with b'\\x1f.*, which is gzip"),
        (".jsonl", zstd(CONTENT), r"as plain data but begins with b'\(.*, which is zstandard; .* rename it"),
    ],
    ids=["plain-as-gzip", "gzip-as-zstandard", "zstandard-as-plain"],
)
def test_content_must_agree_with_the_suffix(tmp_path, suffix, content, message):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_lines(str(path)))


def test_unknown_suffix_and_missing_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(CONTENT)
    with pytest.raises(DataError, match=r"a\.txt has none of the known suffixes \.jsonl, .*\.json\.zst"):
        list(read_lines(str(path)))
    missing = tmp_path / "b.jsonl"
    with pytest.raises(DataError, match=re.escape(f"cannot read {missing}: No such file or directory")):
        list(read_lines(str(missing)))


def test_a_line_without_end_stops_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(opener, "MAX_LINE_BYTES", 1_000_000)
    with pytest.raises(DataError, match="a line is longer than 1000000 bytes; .* convert it to JSON lines"):
        list(read_lines(str(packed(tmp_path, ".jsonl.zst", b"x" * 3_000_000))))


def test_memory_stays_constant_where_data_expands_a_thousandfold(tmp_path):
    line = b"z" * 65_535 + b"\n"
    for suffix in (".jsonl.zst", ".json.gz"):
        path = packed(tmp_path, suffix, line * 3200)  # 200 MiB
        assert path.stat().st_size < 250_000
        tracemalloc.start()
        count = sum(1 for _ in read_lines(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 3200
        assert peak < 150_000_000
