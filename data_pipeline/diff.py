"""What two shard sets have in common, and where the rest differs.

Files are matched by corpus and name. Shards are the same when their checksums are, which the manifests list; only
shards that differ are opened, and read up to the first document that differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import SPLITS, FileRecord, Split, read_manifest, shard_path
from data_pipeline.set_settings import differences
from data_pipeline.shards import CHUNK_BYTES, Shard


@dataclass(frozen=True, slots=True)
class Differences:
    """Two sets, A and B, side by side."""

    settings: list[tuple[str, str, str]]
    """(setting, in A, in B) where they differ."""
    same: int
    """Files whose shards are the same."""
    changed: dict[str, list[str]]
    """File -> what differs, in words."""
    only_a: list[str]
    only_b: list[str]
    tokens_a: int
    """To train on, in all of A."""
    tokens_b: int

    @property
    def any(self) -> bool:
        """Whether there is any difference."""
        return bool(self.settings or self.changed or self.only_a or self.only_b)


def diff_sets(a: Path, b: Path) -> Differences:
    """Compare the sets at `a` and `b`. Raises DataError where a manifest or a shard cannot be read."""
    manifest_a, manifest_b = read_manifest(a), read_manifest(b)
    files_a, files_b = ({file.key: file for file in manifest.files} for manifest in (manifest_a, manifest_b))
    common = sorted(files_a.keys() & files_b.keys())
    changed = {key: _compare(a, files_a[key], b, files_b[key]) for key in common}
    changed = {key: said for key, said in changed.items() if said}
    return Differences(
        settings=differences(manifest_a.settings, manifest_b.settings),
        same=len(common) - len(changed),
        changed=changed,
        only_a=sorted(files_a.keys() - files_b.keys()),
        only_b=sorted(files_b.keys() - files_a.keys()),
        tokens_a=sum(file.train.tokens for file in manifest_a.files),
        tokens_b=sum(file.train.tokens for file in manifest_b.files),
    )


def _compare(a: Path, file_a: FileRecord, b: Path, file_b: FileRecord) -> list[str]:
    said = [
        f"{name} {before:,} in A, {now:,} in B"
        for name, before, now in (
            ("bad lines", file_a.bad_lines, file_b.bad_lines),
            ("excluded", file_a.excluded, file_b.excluded),
            ("duplicates", file_a.duplicates, file_b.duplicates),
        )
        if before != now
    ]
    if file_a.source != file_b.source:
        said.append(f"source {file_a.source} in A, {file_b.source} in B")
    for split in SPLITS:
        if file_a.split(split).checksum != file_b.split(split).checksum:
            said.append(_compare_split(a, b, file_a, file_b, split))
    return said


def _compare_split(a: Path, b: Path, file_a: FileRecord, file_b: FileRecord, split: Split) -> str:
    of_a, of_b = file_a.split(split), file_b.split(split)
    sizes = (
        f"{split}: {of_a.documents:,} documents of {of_a.tokens:,} tokens in A,"
        f" {of_b.documents:,} of {of_b.tokens:,} in B"
    )
    if not of_a.documents or not of_b.documents:
        return sizes
    shard_a, shard_b = (Shard(shard_path(root, file_a.key, split)) for root in (a, b))
    document = first_different_document(shard_a, shard_b)
    if document is None:
        return f"{split}: the same documents, with another tokenizer, text size or part length"
    return f"{sizes}; the first that differs is document {document + 1:,}"


def first_different_document(a: Shard, b: Shard) -> int | None:
    """Number, from 0, of the first document that is not the same in both shards; None when all are.

    When one shard is the beginning of the other, it is the number of its documents.
    """
    shorter = min(a.header.tokens, b.header.tokens)
    for start in range(0, shorter, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, shorter)
        unequal = np.flatnonzero(a.tokens[start:stop] != b.tokens[start:stop])
        if len(unequal):
            return int(np.searchsorted(a.ends, start + unequal[0], side="right"))
    documents = min(a.header.documents, b.header.documents)
    return None if a.header.tokens == b.header.tokens and a.header.documents == b.header.documents else documents
