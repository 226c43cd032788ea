"""Held-out text of raw files: as much as evaluation scores, the very documents that a prepared set begins with.

Files are read in the order of their keys until there are tokens enough; what the hash does not hold out is passed
over and never encoded. The result is a shard in the spool's folder, named by all that it depends on, so that it
is made once for all ranks and runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_atomically
from data_pipeline.document import Document
from data_pipeline.locks import held
from data_pipeline.readers import read_documents
from data_pipeline.row_stream import order_hash
from data_pipeline.shard_writer import ShardWriter
from data_pipeline.shards import read_header
from data_pipeline.spool.documents import CorpusFile, Encoding
from data_pipeline.stream import HeldOut

BATCH_CHARACTERS = 1 << 16
"""Encoded together: little, since reading stops when there is enough."""


def held_out_text(
    folder: Path, files: Sequence[CorpusFile], encoding: Encoding, *, tokens: int, depends_on: Any
) -> HeldOut | None:
    """At least the first `tokens` tokens of the files' held-out text, or all there are; None where there are none.

    files: of one source, in the order of their keys. depends_on: what the result depends on beside them, as JSON.
    """
    versions = [[file.key, file.raw.version] for file in files]
    path = folder / f"{order_hash([versions, depends_on, tokens])}.held_out"
    none = path.with_suffix(".none")
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / ".lock"):
        if not path.exists() and not none.exists() and not _write(path, files, encoding, tokens):
            write_atomically(none, b"")
    if none.exists():
        return None
    header = read_header(path)
    return HeldOut(
        tokens=header.tokens,
        text_bytes=header.text_bytes,
        documents=header.documents,
        eos_id=header.eos_id,
        paths=[path],
    )


def _write(path: Path, files: Sequence[CorpusFile], encoding: Encoding, tokens: int) -> bool:
    """Write the shard; False where there is no held-out document, and then no shard."""
    tokenizer, written = encoding.tokenizer, 0
    with ShardWriter(
        path, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, fingerprint=tokenizer.fingerprint
    ) as writer:
        for texts in _batches(files, encoding):
            ids = tokenizer.encode_batch(texts)
            writer.write(ids, text_bytes=sum(len(text.encode()) for text in texts))
            written += sum(len(own) + 1 for own in ids)
            if written >= tokens:
                break
    return written > 0


def _batches(files: Sequence[CorpusFile], encoding: Encoding) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for file in files:
        for item in read_documents(file.raw, file.corpus, exclude=encoding.exclude):
            if isinstance(item, Document) and encoding.is_held_out(item.text.encode()):
                texts.append(item.text)
                characters += len(item.text)
                if characters >= BATCH_CHARACTERS:
                    yield texts
                    texts, characters = [], 0
    yield texts
