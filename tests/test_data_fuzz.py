"""Mutated raw files: each is refused by one message that names it, or every line of it is accounted for.

What is expected of a line is told by the standard library's parsers alone, and files are unpacked by other means
than the readers use.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from raw_mutations import KINDS, LONG_LINE, mutate, unpacked

from data_pipeline.document import BadLine, DataError, Document, Mark, PassedOver, RawFile
from data_pipeline.readers import raw_files, read_documents
from data_pipeline.sample import write_sample

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LONG_LINE_EVERY = 100
EXCLUDED = ("Github", "Pile-CC", "Wikipedia (en)")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[tuple[str, str, Path]]:
    """(corpus, name, path) of files of the sample and, where there are any, of real ones."""
    folder = tmp_path_factory.mktemp("originals") / "sample"
    write_sample(folder, megabytes=0.3, vocab_size=500)
    roots = [(corpus, root / corpus) for corpus in ("redpajama", "dolma", "pile") for root in (folder, SHARED)]
    return [
        (corpus, file.name, Path(file.path))
        for corpus, root in roots
        if root.is_dir()
        for _, file in raw_files({corpus: root}, split_bytes=1 << 30)
    ]


@pytest.mark.parametrize("mutations", [150, pytest.param(2_000, marks=pytest.mark.slow)])
def test_no_document_of_a_damaged_file_is_lost_in_silence(tmp_path, originals, mutations):
    outcomes: dict[str, Counter[str]] = {}
    for number in range(mutations):
        random = Random(number)
        kind = LONG_LINE if number % LONG_LINE_EVERY == 0 else KINDS[number % len(KINDS)]
        corpus, name, original = random.choice(originals)
        path = tmp_path / corpus / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, path)
        mutate(path, kind, random)
        outcome = _read_and_account_for(tmp_path / corpus, path, corpus, random)
        outcomes.setdefault(kind, Counter()).update([outcome])
        shutil.rmtree(tmp_path / corpus)
    for kind, counts in outcomes.items():
        print(f"{kind:26}", ", ".join(f"{outcome}: {count}" for outcome, count in sorted(counts.items())))
    assert sum(sum(counts.values()) for counts in outcomes.values()) == mutations


def _read_and_account_for(root: Path, path: Path, corpus: str, random: Random) -> str:
    """Read the file at `path` whole; returns how it went."""
    split_bytes = random.choice([1 << 30, 3_000])
    exclude = EXCLUDED if corpus == "pile" and random.random() < 0.5 else ()
    items: list[Document | BadLine | PassedOver] = []
    try:
        for _, file in raw_files({corpus: root}, split_bytes=split_bytes):
            of_file = list(read_documents(file, corpus, exclude=exclude))
            _check_resume(file, corpus, exclude, of_file, random)
            items += of_file
    except DataError as error:
        assert str(path) in str(error)
        return "refused"
    lines = [line for line in unpacked(path).removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert len(items) == len(lines)
    expected = [_text_of(line) for line in lines]
    for item, text, line in zip(items, expected, lines, strict=True):
        if isinstance(item, Document):
            assert item.text == text
        elif isinstance(item, BadLine):
            assert item.raw == line
            assert text is None or exclude
        else:
            assert exclude
    return "some lines bad" if any(isinstance(item, BadLine) for item in items) else "all lines good"


def _check_resume(file: RawFile, corpus: str, exclude: tuple[str, ...], items: list, random: Random) -> None:
    if items and file.size < 1_000_000:
        place = random.randrange(len(items))
        after = Mark(items[place].line, items[place].end)
        assert list(read_documents(file, corpus, exclude=exclude, after=after)) == items[place + 1 :]


def _text_of(line: bytes) -> str | None:
    try:
        text = json.loads(line.decode())["text"]
        text.encode()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return text or None
