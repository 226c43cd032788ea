"""The data files below a corpus folder, in an order that is the same on every machine."""

from __future__ import annotations

import os
from pathlib import Path

from data_pipeline.document import DataError
from data_pipeline.readers.opener import SUFFIXES, container_of

UNREADABLE_SUFFIXES = (
    *(".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".lzma", ".lz4", ".7z", ".zip", ".tar", ".tgz"),
    *(".part", ".partial", ".incomplete", ".crdownload", ".aria2", ".tmp"),
)
"""Data in other containers and unfinished downloads. Passing over them would lose data in silence."""


def data_files(root: Path) -> list[tuple[str, str]]:
    """Absolute path and name (relative to `root`, forward slashes) of every JSON lines file, sorted by name.

    Symbolic links are followed; hidden files and folders are not data. Other files (README.md, urls.txt) are
    passed over, but one that looks like data in a form not read here stops with a `DataError`, and so does
    finding none.
    """
    if not root.is_dir():
        problem = "is a file; pass its folder" if root.exists() else "does not exist; check the path"
        raise DataError(f"the corpus folder {root} {problem}")
    root = Path(os.path.abspath(root))
    names = sorted(_walk(root, "", (os.path.realpath(root),)))
    _refuse_doubled(root, names)
    unreadable = [name for name in names if container_of(name) is None]
    if unreadable:
        raise DataError(
            f"{root / unreadable[0]} ({len(unreadable)} such files) would not be read: corpus files end in "
            f"{', '.join(SUFFIXES)} (data_pipeline.readers); convert it, finish its download, or move it away"
        )
    if not names:
        raise DataError(f"no corpus files below {root}: none ends in {', '.join(SUFFIXES)}; check the path")
    return [(str(root / name), name) for name in names]


def _refuse_doubled(root: Path, names: list[str]) -> None:
    """Refuse a file that two names lead to (a folder linked beside itself): its tokens would count twice."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(os.path.realpath(root / name), name)
        if other != name:
            raise DataError(
                f"{root / other} and {root / name} are links to one file, which would be read twice; remove one"
            )


def _walk(folder: Path, prefix: str, ancestors: tuple[str, ...]) -> list[str]:
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
            names += _walk(Path(entry.path), name + "/", (*ancestors, real))
        elif container_of(name) or name.lower().endswith(UNREADABLE_SUFFIXES):
            names.append(_checked_name(name, folder))
            if not entry.is_file():
                raise DataError(f"{entry.path} is a broken link or no regular file; mend or remove it")
    return names


def _checked_name(name: str, folder: Path) -> str:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {name!r} in {folder} is not valid UTF-8; rename the file") from error
    return name
