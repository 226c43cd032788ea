"""The manifest: what a shard set holds, in one JSON file that a run reads at its start.

    OUT/manifest.json                        this record; written last, so a folder that has it is a whole set
    OUT/tokenizer/<file>                     the tokenizer that made the shards
    OUT/shards/<corpus>/<raw file>.train     one shard per raw file (see `shards`), and
    OUT/shards/<corpus>/<raw file>.held_out  one of its held-out documents; no documents, no shard
    OUT/records/<corpus>/<raw file>.json     the file's entry, so that an interrupted build knows what is done
    OUT/quarantine/<corpus>/<raw file>.jsonl the lines that are no documents, when there are any
    OUT/dedup/<corpus>/<raw file>.*          with deduplication: what later builds need to know of the texts

No path of the machine that built it is stored: the folder can be moved and copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import orjson
from pydantic import TypeAdapter, ValidationError

from data_pipeline.atomic import write_atomically
from data_pipeline.document import DataError
from data_pipeline.shards import ShardHeader, read_header

VERSION = 1
MANIFEST = "manifest.json"
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
DEFAULT_SPLIT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer that made a shard set."""

    file: str
    """Its file, relative to the set."""
    kind: str
    vocab_size: int
    eos_token: str
    eos_id: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecord:
    """One split of one raw file."""

    documents: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents' texts."""
    tokens: int = 0
    """End-of-document ids included."""
    checksum: str = ""
    """The shard's `ShardHeader.checksum`; empty when there is no document and no shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One raw file and what became of it."""

    corpus: str
    name: str
    """Path below the corpus root; `corpus/name` is the key by which files are ordered."""
    source: str
    input_bytes: int
    """Size of the raw file, or of the piece of one, as it is stored."""
    bad_lines: int
    excluded: int = 0
    """Documents passed over: of a set that the user left out (`Settings.pile_exclude`), or of another subset
    of a mixed file, which has a record of its own."""
    duplicates: int = 0
    """Documents left out because the same text stays at an earlier place (`Settings.dedup`)."""
    train: SplitRecord
    held_out: SplitRecord

    @property
    def key(self) -> str:
        """Names the file within the set."""
        return f"{self.corpus}/{self.name}"

    @property
    def documents(self) -> int:
        """Documents of the raw file that were not excluded, duplicates among them."""
        return self.train.documents + self.held_out.documents + self.duplicates

    def split(self, split: Split) -> SplitRecord:
        """The record of one split."""
        return self.train if split == "train" else self.held_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all shards of a set have in common, fixed by the first build into a folder."""

    tokenizer: TokenizerInfo
    held_out: float
    """Share of documents held out."""
    part_tokens: int
    split_bytes: int = DEFAULT_SPLIT_BYTES
    """Plain raw files above this size are read in pieces, each with shards of its own."""
    pile_exclude: tuple[str, ...] = ()
    """Names of the Pile's sets whose documents are left out, sorted."""
    dedup: bool = False
    """Whether of equal texts only the first is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole shard set."""

    settings: Settings
    files: Sequence[FileRecord]
    """Sorted by `key`."""
    version: int = VERSION

    def labels(self) -> list[str]:
        """The source labels present, sorted."""
        return sorted({file.source for file in self.files})


def shard_path(root: Path, file_key: str, split: Split) -> Path:
    """Where the shard of a file and split lies in the set at `root`."""
    return root / "shards" / f"{file_key}.{split}"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `root`/manifest.json atomically."""
    write_atomically(root / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")


def read_manifest(root: Path) -> Manifest:
    """Read and check `root`/manifest.json; DataError when it is missing, damaged or of another version."""
    path = root / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{root} holds no shard set: {MANIFEST} is missing; check the path, build it with `moepp-data build`, or,"
            " if tasks have built it, complete it with `moepp-data finish`"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    try:
        manifest = TypeAdapter(Manifest).validate_json(raw)
        if manifest.version != VERSION:
            raise DataError(_another_version(path, manifest.version))
    except ValidationError as error:
        try:
            version = orjson.loads(raw)["version"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise DataError(
                f"{path} is damaged: it is no JSON object with a version; build the set again"
            ) from None
        if version != VERSION:
            raise DataError(_another_version(path, version)) from None
        first = error.errors()[0]
        raise DataError(
            f"{path} is damaged at {'.'.join(map(str, first['loc']))}: {first['msg']}; build the set again"
        ) from None
    for before, after in pairwise(file.key for file in manifest.files):
        if before >= after:
            raise DataError(f"{path} is damaged: {after} is listed twice or out of order; build the set again")
    return manifest


def _another_version(path: Path, version: object) -> str:
    return (
        f"{path} has version {version!r}; this program reads version {VERSION}: update the program, or build the"
        " set again with this one"
    )


def checked_shard(root: Path | str, tokenizer: TokenizerInfo, file: FileRecord, split: Split) -> ShardHeader | None:
    """Header of a file's shard after the cheap checks, or None when the split has no document.

    Beside `read_header`'s checks: the shard is of the set's tokenizer and it is the one the manifest lists.
    """
    record = file.split(split)
    if not record.documents:
        return None
    path = f"{root}/shards/{file.key}.{split}"  # as `shard_path`, which takes longer than reading the header
    header = read_header(path)
    if (header.fingerprint, header.vocab_size, header.eos_id) != (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eos_id,
    ):
        raise DataError(
            f"shard {path} was made by tokenizer {header.fingerprint[:12]}... ({header.vocab_size:,} ids) and"
            f" the set's is {tokenizer.fingerprint[:12]}... ({tokenizer.vocab_size:,} ids); build it again"
            " with the set's tokenizer"
        )
    if header.checksum != record.checksum or header.tokens != record.tokens:
        raise DataError(
            f"shard {path} is not the one its record lists (checksum {header.checksum} instead of"
            f" {record.checksum}); it was replaced or comes from another build: run `moepp-data build` again"
        )
    return header
