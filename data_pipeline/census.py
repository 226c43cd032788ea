"""What became of the raw files, source by source."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.manifest import SPLITS, FileRecord, Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCensus:
    """One source label; documents, text bytes and tokens are of both splits together."""

    source: str
    files: int
    input_bytes: int
    """Raw files as they are stored."""
    documents: int
    held_out_documents: int
    text_bytes: int
    tokens: int
    held_out_tokens: int
    bad_lines: int
    excluded: int
    duplicates: int

    @property
    def tokens_per_byte(self) -> float:
        """Tokens, document ends among them, for each byte of text; 0 without text."""
        return self.tokens / self.text_bytes if self.text_bytes else 0.0


def census(manifest: Manifest) -> list[SourceCensus]:
    """The sources of a set, sorted by label."""
    by_source: dict[str, list[FileRecord]] = {label: [] for label in manifest.labels()}
    for file in manifest.files:
        by_source[file.source].append(file)
    return [_count(source, files) for source, files in by_source.items()]


def _count(source: str, files: list[FileRecord]) -> SourceCensus:
    splits = [file.split(split) for file in files for split in SPLITS]
    return SourceCensus(
        source=source,
        files=len(files),
        input_bytes=sum(file.input_bytes for file in files),
        documents=sum(split.documents for split in splits),
        held_out_documents=sum(file.held_out.documents for file in files),
        text_bytes=sum(split.text_bytes for split in splits),
        tokens=sum(split.tokens for split in splits),
        held_out_tokens=sum(file.held_out.tokens for file in files),
        bad_lines=sum(file.bad_lines for file in files),
        excluded=sum(file.excluded for file in files),
        duplicates=sum(file.duplicates for file in files),
    )
