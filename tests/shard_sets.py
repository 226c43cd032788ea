"""Small shard sets written token by token, for tests that want to know every one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.manifest import (
    SPLITS,
    FileRecord,
    Manifest,
    Settings,
    SplitRecord,
    TokenizerInfo,
    shard_path,
    write_manifest,
)
from data_pipeline.shard_writer import ShardWriter
from data_pipeline.shards import DEFAULT_PART_TOKENS, ShardHeader, section_sum

EOS = 1
FINGERPRINT = "ab" * 32
Documents = Sequence[Sequence[int]]


def write_shard(
    path: Path, documents: Documents, *, part_tokens: int = 8, vocab_size: int = 1000, text_bytes: int = 0
) -> SplitRecord:
    """One shard of documents given as ids without their end."""
    with ShardWriter(
        path, vocab_size=vocab_size, eos_id=EOS, fingerprint=FINGERPRINT, part_tokens=part_tokens
    ) as writer:
        writer.write([np.array(ids, dtype=np.int32) for ids in documents], text_bytes=text_bytes)
    header = writer.header
    if header is None:
        return SplitRecord()
    return SplitRecord(
        documents=header.documents,
        text_bytes=header.text_bytes,
        tokens=header.tokens,
        checksum=header.checksum,
    )


def write_set(
    root: Path,
    train: Mapping[str, Mapping[str, Documents]],
    held_out: Mapping[str, Mapping[str, Documents]] | None = None,
    *,
    part_tokens: int = 8,
    vocab_size: int = 1000,
) -> Path:
    """A shard set of {source label: {file name: documents}}; returns `root`. Files are of corpus `made`."""
    files = []
    for source, named in train.items():
        for name, documents in named.items():
            both = {"train": documents, "held_out": (held_out or {}).get(source, {}).get(name, [])}
            splits = {
                split: write_shard(
                    shard_path(root, f"made/{name}", split),
                    both[split],
                    part_tokens=part_tokens,
                    vocab_size=vocab_size,
                    text_bytes=7 * len(both[split]),
                )
                for split in SPLITS
            }
            files.append(
                FileRecord(corpus="made", name=name, source=source, input_bytes=0, bad_lines=0, **splits)
            )
    tokenizer = TokenizerInfo(
        file="tokenizer/none",
        kind="made",
        vocab_size=vocab_size,
        eos_token="</s>",
        eos_id=EOS,
        fingerprint=FINGERPRINT,
    )
    settings = Settings(tokenizer=tokenizer, held_out=0.0, part_tokens=part_tokens)
    write_manifest(root, Manifest(settings=settings, files=sorted(files, key=lambda file: file.key)))
    return root


def write_sparse_set(root: Path, *, sources: int, shards: int, tokens: int) -> Path:
    """A set of `shards` shards of `tokens` tokens each, whose tokens are holes in the files; returns `root`.

    Everything that is read when a run opens the set is true: headers, document ends, part cuts, manifest. Only
    `verify`, which reads the tokens, would find that they are zeros. One document is one part.
    """
    ends = np.append(np.arange(DEFAULT_PART_TOKENS, tokens, DEFAULT_PART_TOKENS, dtype="<u8"), np.uint64(tokens))
    header = ShardHeader(
        width=2,
        tokens=tokens,
        documents=len(ends),
        parts=len(ends),
        text_bytes=4 * tokens,
        vocab_size=32_000,
        eos_id=EOS,
        part_tokens=DEFAULT_PART_TOKENS,
        fingerprint=FINGERPRINT,
        tokens_sum=bytes(16),
        ends_sum=section_sum(ends),
        cuts_sum=section_sum(ends),
    )
    record = SplitRecord(
        documents=len(ends), text_bytes=header.text_bytes, tokens=tokens, checksum=header.checksum
    )
    files = []
    for number in range(shards):
        source, name = f"source_{number % sources}", f"{number % sources}/{number:05d}.jsonl"
        files.append(
            FileRecord(
                corpus="made",
                name=name,
                source=source,
                input_bytes=2 * tokens,
                bad_lines=0,
                train=record,
                held_out=SplitRecord(),
            )
        )
        path = shard_path(root, f"made/{name}", "train")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(header.encode())
            file.seek(header.ends_offset)
            file.write(ends.tobytes() * 2)
    info = TokenizerInfo(
        file="tokenizer/none",
        kind="made",
        vocab_size=32_000,
        eos_token="</s>",
        eos_id=EOS,
        fingerprint=FINGERPRINT,
    )
    settings = Settings(tokenizer=info, held_out=0.0, part_tokens=DEFAULT_PART_TOKENS)
    write_manifest(root, Manifest(settings=settings, files=sorted(files, key=lambda file: file.key)))
    return root


def counting_documents(lengths: Sequence[int], first: int) -> list[list[int]]:
    """Documents of the given lengths (without end) whose ids count up from `first`."""
    documents = []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents
