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


def counting_documents(lengths: Sequence[int], first: int) -> list[list[int]]:
    """Documents of the given lengths (without end) whose ids count up from `first`."""
    documents = []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents
