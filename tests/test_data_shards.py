"""Shards: the bytes by hand, and every kind of damage found and named."""

from __future__ import annotations

import hashlib
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from shard_sets import EOS, FINGERPRINT, write_shard

from data_pipeline.atomic import TEMPORARY, clear_unfinished
from data_pipeline.document import DataError
from data_pipeline.shard_writer import ShardWriter
from data_pipeline.shards import HEADER_BYTES, Shard, read_header, token_width


def test_the_bytes_of_a_small_shard(tmp_path: Path) -> None:
    # Documents [5, 6, 7], [] and [8] with end 1, vocabulary 1000: 7 tokens of 2 bytes, 14 padded to 16.
    # Ends 4, 5, 7. Parts of 4: the first ends at the document end 4; then at 7, the end of all.
    path = tmp_path / "a.train"
    write_shard(path, [[5, 6, 7], [], [8]], part_tokens=4, text_bytes=11)
    raw = path.read_bytes()
    tokens = struct.pack("<7H", 5, 6, 7, 1, 1, 8, 1)
    ends, cuts = struct.pack("<3Q", 4, 5, 7), struct.pack("<2Q", 4, 7)
    sums = [hashlib.blake2b(section, digest_size=16).digest() for section in (tokens, ends, cuts)]
    head = (
        b"MOEPPSHD"
        + struct.pack("<II", 1, 2)
        + struct.pack("<4Q", 7, 3, 2, 11)
        + struct.pack("<IIQ", 1000, 1, 4)
    )
    head += bytes.fromhex(FINGERPRINT) + b"".join(sums)
    head += hashlib.blake2b(head, digest_size=16).digest()
    assert raw == head.ljust(256, b"\0") + tokens + b"\0\0" + ends + cuts
    shard = Shard(path)
    assert shard.tokens.tolist() == [5, 6, 7, 1, 1, 8, 1]
    assert (shard.ends.tolist(), shard.cuts.tolist()) == ([4, 5, 7], [4, 7])
    assert shard.header.checksum == head[144:160].hex()
    assert shard.tokens.dtype == np.uint16 and not shard.tokens.flags.writeable
    shard.verify()


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert [token_width(size) for size in (1, 65_536, 65_537)] == [2, 2, 4]
    write_shard(tmp_path / "a", [[70_000]], vocab_size=70_001)
    shard = Shard(tmp_path / "a")
    assert shard.tokens.tolist() == [70_000, EOS] and shard.tokens.dtype == np.uint32
    shard.verify()


@pytest.mark.parametrize("bad", [1000, -1, 70_000])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, bad: int) -> None:
    with pytest.raises(DataError, match=f"token id {bad} is outside the tokenizer's vocabulary of 1,000 ids"):
        write_shard(tmp_path / "a", [[5, bad]])
    assert list(tmp_path.iterdir()) == []


def cuts_by_definition(ends: list[int], part_tokens: int) -> list[int]:
    cuts = {ends[-1]}
    for mark in range(part_tokens, ends[-1] + 1, part_tokens):
        cuts.add(min(end for end in ends if end >= mark))
    return sorted(cuts)


def test_parts_are_cut_at_document_ends_however_they_are_written(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(60):
        documents = [[2] * rng.choice([0, 1, 3, 9, 30]) for _ in range(rng.randint(1, 20))]
        part_tokens = rng.randint(1, 12)
        with ShardWriter(
            tmp_path / "a", vocab_size=9, eos_id=EOS, fingerprint=FINGERPRINT, part_tokens=part_tokens
        ) as writer:
            at = 0
            while at < len(documents):
                step = rng.randint(1, 5)
                writer.write(
                    [np.array(ids, dtype=np.int32) for ids in documents[at : at + step]], text_bytes=1
                )
                at += step
        shard = Shard(tmp_path / "a")
        ends = np.cumsum([len(ids) + 1 for ids in documents]).tolist()
        assert shard.ends.tolist() == ends
        assert shard.cuts.tolist() == cuts_by_definition(ends, part_tokens)
        shard.verify()


def test_no_documents_no_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[3]])
    write_shard(tmp_path / "a", [])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[3]])
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with ShardWriter(tmp_path / "a", vocab_size=9, eos_id=EOS, fingerprint=FINGERPRINT) as writer:
            writer.write([np.array([4, 5])], text_bytes=2)
            raise KeyboardInterrupt
    assert (tmp_path / "a").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_writer_leaves_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in (TEMPORARY + "x", "deep/" + TEMPORARY + "y", "kept"):
        (tmp_path / name).touch()
    clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "kept"]


def damaged(tmp_path: Path, change: dict[int, bytes], *, cut: int | None = None) -> Path:
    """A small shard with bytes replaced at offsets, or cut short."""
    path = tmp_path / "a"
    write_shard(path, [[5, 6, 7], [], [8]], part_tokens=4)
    raw = bytearray(path.read_bytes())
    for offset, data in change.items():
        raw[offset : offset + len(data)] = data
    path.write_bytes(raw[:cut])
    return path


def with_header_sum(tmp_path: Path, offset: int, data: bytes) -> Path:
    """A small shard whose header says something else, and says it consistently."""
    path = damaged(tmp_path, {offset: data})
    raw = bytearray(path.read_bytes())
    raw[144:160] = hashlib.blake2b(raw[:144], digest_size=16).digest()
    path.write_bytes(raw)
    return path


def test_missing(tmp_path: Path) -> None:
    message = f"shard {tmp_path}/a is missing; run `moepp-data build` again, or copy the whole folder"
    with pytest.raises(DataError, match=re.escape(message)):
        read_header(tmp_path / "a")


@pytest.mark.parametrize("length", [0, 100, 255])
def test_shorter_than_a_header(tmp_path: Path, length: int) -> None:
    with pytest.raises(DataError, match="is no shard: it starts with"):
        Shard(damaged(tmp_path, {}, cut=length))


@pytest.mark.parametrize("length", [256, 260, 311])
def test_truncated(tmp_path: Path, length: int) -> None:
    with pytest.raises(DataError, match=f"has {length} bytes and should have 312: it was cut short or grew"):
        Shard(damaged(tmp_path, {}, cut=length))


def test_grown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 313 bytes and should have 312"):
        Shard(damaged(tmp_path, {312: b"x"}))


def test_other_magic_and_version(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=re.escape("is no shard: it starts with b'NUMPY...' instead of b'MOEPPSHD'")
    ):
        Shard(damaged(tmp_path, {0: b"NUMPY..."}))
    with pytest.raises(
        DataError, match="has format version 2; this program reads version 1: update the program"
    ):
        Shard(damaged(tmp_path, {8: b"\2"}))
    with pytest.raises(
        DataError, match="has format version 0; this program reads version 1: build the shard again"
    ):
        Shard(damaged(tmp_path, {8: b"\0"}))


def test_wrong_token_width(tmp_path: Path) -> None:
    message = "has tokens of 4 bytes, but a vocabulary of 1,000 ids takes 2; build it again"
    with pytest.raises(DataError, match=message):
        Shard(with_header_sum(tmp_path, 12, b"\4"))


def test_a_flipped_bit_in_any_byte_is_found(tmp_path: Path) -> None:
    path = damaged(tmp_path, {})
    raw = path.read_bytes()
    for offset in range(len(raw)):
        path.write_bytes(raw[:offset] + bytes([raw[offset] ^ 1 << offset % 8]) + raw[offset + 1 :])
        with pytest.raises(DataError):
            Shard(path).verify()


def test_verify_names_the_section(tmp_path: Path) -> None:
    for offset, name in ((256, "tokens"), (272, "document ends"), (296, "part cuts")):
        with pytest.raises(DataError, match=f"the {name} do not match their checksum, so bytes have changed"):
            Shard(damaged(tmp_path, {offset: b"\xff"})).verify()


def consistent(tmp_path: Path, tokens: list[int], ends: list[int], cuts: list[int]) -> Path:
    """A small shard with other contents and the checksums that fit them: wrong, but not damaged."""
    sections = struct.pack("<7H", *tokens), struct.pack("<3Q", *ends), struct.pack("<2Q", *cuts)
    sums = b"".join(hashlib.blake2b(section, digest_size=16).digest() for section in sections)
    return with_header_sum_and_body(tmp_path, sums, sections[0] + b"\0\0" + sections[1] + sections[2])


def with_header_sum_and_body(tmp_path: Path, sums: bytes, body: bytes) -> Path:
    path = with_header_sum(tmp_path, 96, sums)
    path.write_bytes(path.read_bytes()[:HEADER_BYTES] + body)
    return path


def test_verify_checks_what_the_tokens_say(tmp_path: Path) -> None:
    good = [5, 6, 7, 1, 1, 8, 1]
    Shard(consistent(tmp_path, good, [4, 5, 7], [4, 7])).verify()
    with pytest.raises(DataError, match="token id 1000 is outside the vocabulary of 1,000"):
        Shard(consistent(tmp_path, [1000, *good[1:]], [4, 5, 7], [4, 7])).verify()
    with pytest.raises(DataError, match="end-of-document ids and document ends disagree near token 0"):
        Shard(consistent(tmp_path, good, [3, 5, 7], [4, 7])).verify()
    with pytest.raises(DataError, match="disagree near token 0"):
        Shard(consistent(tmp_path, [1, *good[1:]], [4, 5, 7], [4, 7])).verify()
    with pytest.raises(DataError, match="2 end-of-document ids for 3 documents"):
        Shard(consistent(tmp_path, [5, 6, 7, 1, 1, 8, 9], [4, 5, 7], [4, 7])).verify()
    with pytest.raises(DataError, match="the part cuts are not those of its documents"):
        Shard(consistent(tmp_path, good, [4, 5, 7], [5, 7])).verify()
