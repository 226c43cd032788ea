"""Tables: `.parquet` files, and datasets of the Hugging Face hub, both through `datasets` streaming.

A location `hub:NAME[:CONFIG[:SPLIT]]` is a dataset of the hub (`NAME@REVISION` for another than the newest
revision), or a folder that is laid out as one. Each of its shards is one raw file, so that shards are built in
parallel, ordered and resumed like files; they are read at the revision that was newest when they were listed.

A record of a table is what a line is elsewhere: reading goes on behind a number of records, and a bad one is
kept as JSON. `datasets` is imported when a table is read and not before, since that takes seconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import closing
from typing import Any

from data_pipeline.document import DataError, RawFile
from data_pipeline.readers.storage import filesystem, is_url, local_version, remote_version

HUB = "hub:"
SUFFIX = ".parquet"

_SHARD = re.compile(r"hub:(?P<name>.+):(?P<config>[^:]*):(?P<split>[^:]+)#(?P<index>\d+)/(?P<count>\d+)")
_REVISION_IN_URL = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")
_MAX_MESSAGE = 300


def is_table(path: str) -> bool:
    """Whether a raw file's path is that of a table."""
    return path.startswith(HUB) or path.lower().endswith(SUFFIX)


def read_rows(path: str, after: int) -> Generator[dict[str, Any], None, None]:
    """Yield the records of a table behind the first `after`. Raises `DataError` where it cannot be read.

    A file without records is an error, as an empty file of lines is.
    """
    try:
        dataset = _open(path)
        rows = iter(dataset.skip(after) if after else dataset)
        none = True
        with closing(rows):
            for row in rows:
                none = False
                yield row
    except DataError:
        raise
    except Exception as error:  # whatever arrow, the file systems and the hub raise
        raise _unreadable(path, error) from error
    if none and not after:
        raise DataError(f"{path} is empty: it holds no records; download it again or remove it")


def hub_files(location: str) -> list[RawFile]:
    """The shards of the dataset at `location`, not yet labelled."""
    name, config, split = _parsed(location)
    try:
        builder = _builder(name, config)
        splits = builder.as_streaming_dataset()
        split = _chosen_split(location, split, list(splits))
        shards = splits[split].num_shards
        urls = list((builder.config.data_files or {}).get(split, []))
        sizes, versions = _stored(urls) if len(urls) == shards else ([1] * shards, [builder.hash] * shards)
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(location, error) from error
    revision = next((match[1] for url in urls if (match := _REVISION_IN_URL.match(url))), None)
    pinned = f"{name.partition('@')[0]}@{revision}" if revision else name
    folder = f"{config}/" if config else ""
    return [
        RawFile(
            path=f"{HUB}{pinned}:{config}:{split}#{index}/{shards}",
            name=f"{folder}{split}-{index:05}-of-{shards:05}",
            source="",
            size=sizes[index],
            version=f"{versions[index]}-{index}/{shards}",
        )
        for index in range(shards)
    ]


def _parsed(location: str) -> tuple[str, str, str]:
    name, config, split = (*location.removeprefix(HUB).split(":"), "", "")[:3]
    if not name or location.count(":") > 3:
        raise DataError(f"{location!r} names no dataset; write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    return name, config, split


def _chosen_split(location: str, wanted: str, there: list[str]) -> str:
    if wanted in there:
        return wanted
    if not wanted and ("train" in there or len(there) == 1):
        return "train" if "train" in there else there[0]
    what = f"has no split {wanted!r}" if wanted else "has several splits and none is named"
    raise DataError(f"{location} {what}; its splits are {', '.join(there)} (hub:NAME:CONFIG:SPLIT)")


def _stored(urls: list[str]) -> tuple[list[int], list[str]]:
    """Bytes and version of each file of a dataset."""
    sizes, versions = [], []
    for url in urls:
        if is_url(url):
            file_system, path = filesystem(url)
            info = file_system.info(path)
            sizes.append(info["size"])
            versions.append(remote_version(file_system, path, info))
        else:
            status = os.stat(url)
            sizes.append(status.st_size)
            versions.append(local_version(status))
    return sizes, versions


def _builder(name: str, config: str) -> Any:
    from datasets import load_dataset_builder

    name, _, revision = name.partition("@")
    return load_dataset_builder(name, config or None, revision=revision or None)


def _open(path: str) -> Any:
    shard = _SHARD.fullmatch(path)
    if shard:
        dataset = _builder(shard["name"], shard["config"]).as_streaming_dataset(shard["split"])
        return dataset.shard(num_shards=int(shard["count"]), index=int(shard["index"]))
    from datasets import load_dataset

    return load_dataset("parquet", data_files=[path], split="train", streaming=True)


def _unreadable(path: str, error: Exception) -> DataError:
    said = " ".join(str(error).split())[:_MAX_MESSAGE]
    return DataError(f"cannot read {path}: {type(error).__name__}: {said}")
