"""Which files at a location are a corpus's data, in an order that is the same on every machine.

A location is a folder, one file, a pattern with wildcards (`*`, `?`, `[...]`, and `**` for folders of any
depth), or a URL of either (see `storage`). Names are relative to the folder, to the file's folder, or to the
longest folder before the first wildcard.

    1. List what lies there. Links are followed; hidden files and folders are not data.
    2. Files that are neither data nor look like it (README.md, urls.txt) are passed over. One that looks like
       data in a form not read here stops with a `DataError`: passing it over would lose data in silence.
    3. Plain files above `split_bytes` are cut into pieces that begin at lines, so that several processes can
       share one. Piece k holds the lines that begin in bytes [k, k + 1) x split_bytes. (Compressed files
       cannot be entered in the middle.)
"""

from __future__ import annotations

import glob
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.document import DataError, RawFile
from data_pipeline.readers import opener, tables
from data_pipeline.readers.opener import SUFFIXES, container_of
from data_pipeline.readers.records import parse_object
from data_pipeline.readers.storage import (
    filesystem,
    is_url,
    local_version,
    named_errors,
    open_binary,
    remote_version,
)

UNREADABLE_SUFFIXES = (
    *(".arrow", ".gz", ".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4", ".7z", ".zip", ".tar", ".tgz"),
    *(".part", ".partial", ".incomplete", ".crdownload", ".aria2", ".tmp"),
)
"""Data in other containers and unfinished downloads."""

_LONGEST_FIRST_LINE = 1 << 24
_KNOWN = ", ".join((*SUFFIXES, tables.SUFFIX))


@dataclass(frozen=True, slots=True)
class Listing:
    """The data files at a location."""

    base: str
    """What the names are relative to: a folder, or the URL of one; `hub:NAME` for a dataset of the hub."""
    files: list[RawFile]
    """Sorted by name; not yet labelled (`source` is empty)."""


def data_files(location: str | Path, *, split_bytes: int) -> Listing:
    """The data files at `location`. Raises `DataError` where there is none, or one that cannot be read."""
    if split_bytes < 1:
        raise DataError(f"split_bytes is {split_bytes}; it must be at least 1 byte")
    location = _spelled_out(location)
    if location.startswith(tables.HUB):
        return Listing(location, tables.hub_files(location))
    with named_errors(location):
        base, files = _remote(location) if is_url(location) else _local(location)
    if not files:
        if glob.has_magic(location):
            raise DataError(f"the pattern {location} matches no file that ends in {_KNOWN}; check it, and quote it")
        raise DataError(f"no corpus files below {base}: none ends in {_KNOWN}; check the path")
    _refuse_unreadable(files)
    pieces = [piece for file in files for piece in _pieces(file, split_bytes)]
    return Listing(base, sorted(pieces, key=lambda file: file.name))


def local_folder(location: str | Path) -> Path | None:
    """The folder on this machine that `location` reads from; None where it is a URL or a dataset of the hub."""
    location = _spelled_out(location)
    if location.startswith(tables.HUB) or is_url(location):
        return None
    return Path(location if os.path.exists(location) else _folder_before_wildcards(location))


def corpus_around(path: str | Path, corpora: Mapping[str, str | Path]) -> tuple[str, Path] | None:
    """(corpus, folder) of the first of {corpus: location} whose folder on this machine holds `path`, links resolved."""
    inner = Path(os.path.realpath(path))
    for corpus, location in corpora.items():
        folder = local_folder(location)
        if folder and folder.is_dir() and Path(os.path.realpath(folder)) in (inner, *inner.parents):
            return corpus, folder
    return None


def refuse_changed(file: RawFile) -> None:
    """Raise `DataError` where a file on this machine is not what it was when it was listed."""
    if file.path.startswith(tables.HUB) or is_url(file.path):
        return
    with named_errors(file.path):
        version = local_version(os.stat(file.path))
    if version != file.version:
        raise DataError(
            f"{file.path} was written to while it was read; when its download is complete, run the same command again"
        )


def _spelled_out(location: str | Path) -> str:
    """`file://` and `~` name local paths, which are read without fsspec."""
    return os.path.expanduser(str(location).removeprefix("file://"))


# --- on this machine ---


def _local(location: str) -> tuple[str, list[RawFile]]:
    if os.path.isdir(location):
        base = os.path.abspath(location)
        names = _walk(base, "", (os.path.realpath(base),))
    elif os.path.isfile(location):
        base, name = os.path.split(os.path.abspath(location))
        if not _is_data(name):
            raise DataError(f"{location} has none of the known suffixes {_KNOWN}; rename or convert it")
        names = [name]
    elif glob.has_magic(location):
        base = _folder_before_wildcards(os.path.abspath(location))
        names = sorted(_matching(base, os.path.abspath(location)))
    else:
        raise DataError(f"{location} does not exist; check the path")
    _refuse_doubled(base, names)
    return base, [_local_file(base, name) for name in names]


def _local_file(base: str, name: str) -> RawFile:
    path = os.path.join(base, name)
    status = os.stat(path)
    return RawFile(path, name, source="", size=status.st_size, version=local_version(status))


def _matching(base: str, pattern: str) -> set[str]:
    """Names of the data files that match `pattern`, and of those below folders that match it."""
    names: set[str] = set()
    for path in glob.glob(pattern, recursive=True):
        name = os.path.relpath(path, base)
        if os.path.isdir(path):
            names.update(_walk(path, "" if name == "." else name + "/", (os.path.realpath(path),)))
        elif _is_wanted(name, path):
            names.add(_checked_name(name, path))
    return names


def _walk(folder: str, prefix: str, ancestors: tuple[str, ...]) -> list[str]:
    """Names of the files that hold data or look like it; `ancestors`: real paths of `folder` and above."""
    names = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        name = prefix + entry.name
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real in ancestors:
                raise DataError(f"{entry.path} is a link to a folder it lies in ({real}); remove the link")
            names += _walk(entry.path, name + "/", (*ancestors, real))
        elif _is_wanted(name, entry.path):
            names.append(_checked_name(name, entry.path))
    return names


def _checked_name(name: str, path: str) -> str:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the file name {name!r} in {os.path.dirname(path)} is not valid UTF-8; rename the file"
        ) from error
    if not os.path.isfile(path):
        raise DataError(f"{path} is a broken link or no regular file; mend or remove it")
    return name


def _refuse_doubled(base: str, names: list[str]) -> None:
    """Refuse a file that two names lead to (a folder linked beside itself): its tokens would count twice."""
    first: dict[str, str] = {}
    for name in sorted(names):
        path = os.path.join(base, name)
        other = first.setdefault(os.path.realpath(path), path)
        if other != path:
            raise DataError(f"{other} and {path} are links to one file, which would be read twice; remove one")


# --- behind a URL ---


def _remote(location: str) -> tuple[str, list[RawFile]]:
    file_system, inner = filesystem(location)
    if glob.has_magic(inner):
        base = _folder_before_wildcards(inner)
        found: dict[str, Any] = {}
        for path, info in file_system.glob(inner, detail=True).items():
            below = info["type"] == "directory"
            found.update(file_system.find(path, detail=True) if below else {path: info})
    elif _is_data(inner) and file_system.isfile(inner):
        base, found = posixpath.dirname(inner), {inner: file_system.info(inner)}
    elif file_system.isdir(inner):  # asked second, since web servers answer for a file too
        base, found = inner, file_system.find(inner, detail=True)
    elif file_system.exists(inner):
        raise DataError(f"{location} has none of the known suffixes {_KNOWN}; rename or convert it")
    else:
        raise DataError(f"{location} does not exist, or may not be read; check the URL")
    files = []
    for path, info in found.items():
        name, url = posixpath.relpath(path, base), file_system.unstrip_protocol(path)
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not hidden and _is_wanted(name, url):
            files.append(_remote_file(file_system, path, name, url, info))
    return file_system.unstrip_protocol(base), files


def _remote_file(file_system: Any, path: str, name: str, url: str, info: dict[str, Any]) -> RawFile:
    if info.get("size") is None:  # web servers list names alone
        info = file_system.info(path)
    if info.get("size") is None:
        raise DataError(f"{url}: the server does not tell its size, so it cannot be read safely; download it")
    version = remote_version(file_system, path, info)
    return RawFile(url, name, source="", size=info["size"], version=version)


# --- both ---


def _folder_before_wildcards(pattern: str) -> str:
    parts = pattern.split("/")
    wild = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:wild]) or "/"


def _is_data(name: str) -> bool:
    return container_of(name) is not None or name.lower().endswith(tables.SUFFIX)


def _is_wanted(name: str, path: str) -> bool:
    """Whether a file is data, or looks as if it were; a plain `.json` that holds JSON lines is refused."""
    lowered = name.lower()
    if _is_data(name) or lowered.endswith(UNREADABLE_SUFFIXES):
        return True
    if lowered.endswith(".json") and _holds_json_lines(path):
        raise DataError(
            f"{path} holds JSON lines with a text, but is named .json, under which nothing is read; rename it"
            " to .jsonl, or move it away"
        )
    return False


def _holds_json_lines(path: str) -> bool:
    """Whether the first line is a whole object with a text; `dataset_infos.json` and the like hold none."""
    with named_errors(path), open_binary(path) as file:
        first = file.readline(_LONGEST_FIRST_LINE)
    try:
        return "text" in parse_object(first)
    except DataError:
        return len(first) == _LONGEST_FIRST_LINE and first.startswith(b"{") and b'"text"' in first


def _refuse_unreadable(files: list[RawFile]) -> None:
    unreadable = sorted(file.path for file in files if not _is_data(file.name))
    if unreadable:
        raise DataError(
            f"{unreadable[0]} ({len(unreadable)} such files) would not be read: corpus files end in "
            f"{_KNOWN} (data_pipeline.readers); convert it, finish its download, or move it away"
        )


def _pieces(file: RawFile, split_bytes: int) -> Iterator[RawFile]:
    """The file itself, or the pieces of a large plain one; a piece in which no line begins is left out."""
    if file.size <= split_bytes or container_of(file.name) != "plain":
        yield file
        return
    with named_errors(file.path), open_binary(file.path) as content:
        start, number = 0, 0
        while start < file.size:
            number = start // split_bytes
            stop = opener.line_start(content, (number + 1) * split_bytes, file)
            yield replace(file, name=f"{file.name}@{number:04}", size=stop - start, span=(start, stop))
            start = stop
