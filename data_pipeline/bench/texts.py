"""Real text for measurements: every textual file of the running Python, each content once."""

from __future__ import annotations

import gzip
import hashlib
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from data_pipeline.document import DataError

SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".md", ".rst", ".txt", ".tex", ".html", ".css", ".js", ".sh", ".cmake"}
SUFFIXES |= {".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".f", ".f90", ".toml", ".cfg", ".ini", ".yaml", ".yml"}
"""No tables of data (.json, .csv, .xml): these repeat a few words without end."""
CORPUS_FILES = 64


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents to measure with."""

    texts: list[str]
    bytes: int
    """UTF-8 bytes of all of them; no two are the same."""
    places: list[str]
    """Folders and files they are from."""


def python_folders() -> list[Path]:
    """Where the running Python has its standard library and its packages."""
    return sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})


def distinct_texts(places: Sequence[Path], megabytes: float) -> Texts:
    """At least `megabytes` of the UTF-8 files at `places`, if there is so much: whole files, shuffled, each once.

    A file that is named is taken whatever its suffix; of folders, those with one of `SUFFIXES`. Raises DataError
    where nothing is found.
    """
    paths = {path.resolve() for place in places for path in _files(place)}
    order = sorted(paths)
    random.Random(0).shuffle(order)  # else the first megabytes would be of one package
    texts: list[str] = []
    seen: set[bytes] = set()
    size = 0
    for path in order:
        if size >= megabytes * 1e6:
            break
        data = path.read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if not data.strip() or digest in seen:
            continue
        try:
            texts.append(data.decode())
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        size += len(data)
    if not texts:
        raise DataError(f"no text is found in {', '.join(map(str, places))}; name files or folders of text with --text")
    return Texts(texts, size, [str(place) for place in places])


def _files(place: Path) -> list[Path]:
    if not place.exists():
        raise DataError(f"{place} does not exist; name files or folders of text with --text")
    if place.is_file():
        return [place]
    return [path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]


def write_corpus(texts: Sequence[str], folder: Path, *, repeat: int) -> None:
    """Write documents as a Dolma corpus, in `CORPUS_FILES` files of about the same size for each repetition."""
    files: list[list[bytes]] = [[] for _ in range(min(CORPUS_FILES, len(texts)))]
    sizes = [0] * len(files)
    for place, text in enumerate(sorted(texts, key=len, reverse=True)):
        smallest = sizes.index(min(sizes))
        files[smallest].append(orjson.dumps({"id": str(place), "text": text, "source": "bench"}))
        sizes[smallest] += len(text)
    folder.mkdir(parents=True)
    for number, lines in enumerate(files):
        data = gzip.compress(b"\n".join(lines) + b"\n", compresslevel=6)
        for again in range(repeat):
            (folder / f"{number:02}-{again:04}.json.gz").write_bytes(data)
