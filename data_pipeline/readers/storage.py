"""Where raw files lie: on this machine, or behind a URL that fsspec reads (`s3://`, `gs://`, `hf://`, `https://`).

Local files never pass through fsspec, which would only slow them down. A protocol needs its package (`s3://`
needs s3fs); what is missing is said when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from data_pipeline.document import DataError

_REMOTE_BLOCK_BYTES = 8 << 20
"""Read ahead from remote storage in blocks of this size, so that a request's delay is shared by many lines."""
_CONTENT_KEYS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "content_hash", "blob_id", "lfs", "VersionId"),
    *("LastModified", "last_modified", "mtime", "updated", "created"),
)
"""What storages call the things that change with a file's content."""


def is_url(path: str) -> bool:
    """Whether `path` is for fsspec."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path it knows it by."""
    if "::" in url:
        raise DataError(f"{url} is a chain of file systems, which is not read; give the URL of the data itself")
    try:
        from fsspec.core import url_to_fs

        file_system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # the protocol's package is missing; nobody knows the protocol
        raise DataError(f"cannot read {url}: {error}") from error
    return file_system, path


def open_binary(path: str) -> BinaryIO:
    """Open a local path or URL for reading bytes."""
    if not is_url(path):
        return open(path, "rb")
    file_system, inner = filesystem(path)
    return file_system.open(inner, "rb", block_size=_REMOTE_BLOCK_BYTES)


@contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Turn what goes wrong in reading `path` into a `DataError` that names it."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check that it is there") from error
    except Exception as error:  # storage libraries have errors of many kinds of their own
        if not is_url(path):
            raise
        raise DataError(f"cannot read {path}: {type(error).__name__}: {error}") from error


def local_version(status: os.stat_result) -> str:
    """`RawFile.version` of a local file."""
    return f"{status.st_mtime_ns}-{status.st_size}"


def remote_version(file_system: Any, path: str, info: Mapping[str, Any]) -> str:
    """`RawFile.version` of a remote file: from what its storage says of its content, else fsspec's own key."""
    told = {key: str(info[key]) for key in _CONTENT_KEYS if info.get(key)}
    content = str(sorted(told.items())) if told else file_system.ukey(path)
    return f"{hashlib.blake2b(content.encode(), digest_size=12).hexdigest()}-{info['size']}"
