"""Full verification: every byte of a shard set, and all that the manifest says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.document import DataError
from data_pipeline.manifest import SPLITS, FileRecord, Split, checked_shard, read_manifest, shard_path
from data_pipeline.shards import Shard
from data_pipeline.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Verified:
    """What was read, and what is wrong with it."""

    shards: int
    tokens: int
    bytes: int
    problems: list[str]
    """One message for each shard that is missing or damaged; empty when the set is sound."""


def verify_set(root: Path, on_shard: Callable[[int], None] = lambda size: None) -> Verified:
    """Read the whole set at `root`; `on_shard(bytes)` is called after each sound shard.

    Checked: the tokenizer beside the shards is the one they were made with; every shard the manifest lists is
    there, of that tokenizer, with the counts listed; `Shard.verify` of each. Raises DataError when the
    manifest cannot be read; everything else is collected, so that one run names all the damage.
    """
    manifest = read_manifest(root)
    tokenizer = manifest.settings.tokenizer
    problems = []
    try:
        found = load_tokenizer(root / tokenizer.file, tokenizer.eos_token)
        if (found.fingerprint, found.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
            problems.append(
                f"{root / tokenizer.file} is not the tokenizer the shards were made with; copy it anew"
            )
    except DataError as error:
        problems.append(str(error))
    shards = tokens = size = 0
    for file in manifest.files:
        for split in SPLITS:
            try:
                header = checked_shard(root, tokenizer, file, split)
                if header is None:
                    continue
                _verify_shard(root, file, split)
            except DataError as error:
                problems.append(str(error))
                continue
            shards, tokens, size = shards + 1, tokens + header.tokens, size + header.file_bytes
            on_shard(header.file_bytes)
    return Verified(shards, tokens, size, problems)


def _verify_shard(root: Path, file: FileRecord, split: Split) -> None:
    shard, record = Shard(shard_path(root, file.key, split)), file.split(split)
    shard.verify()
    if (shard.header.documents, shard.header.text_bytes) != (record.documents, record.text_bytes):
        raise DataError(f"the manifest's counts for {shard.path} are not the shard's; build the set again")
