"""Writing a model folder: safetensors of bounded size with an index, config.json, and what goes with them.

All is written to a hidden folder beside the target, synced, and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.atomic import TEMPORARY
from moepp_ds.hf_folder.reading import CONFIG, FolderError, is_plain

INDEX = ".safetensors.index.json"


def write_folder(
    path: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 5 * 10**9,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model folder; it appears when it is complete, and an error leaves nothing.

    tensors: by name, each once, in the dtype they shall have; taken one by one, at most one shard is held.
    max_shard_bytes: a larger single tensor gets a shard of its own. extra_files: content by plain file name.
    """
    extra_files = extra_files or {}
    for name in extra_files:
        if not is_plain(name) or name == CONFIG or name.endswith((".safetensors", INDEX)):
            raise FolderError(f"{name!r} cannot be written beside {CONFIG} and the weights; use another name")
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FolderError(f"{path} exists and is not empty; name a new folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        _write_shards(partial, tensors, max_shard_bytes)
        files = {**extra_files, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
        for name, content in files.items():
            (partial / name).write_bytes(content)
        for file in partial.iterdir():
            file.chmod(0o644)
            _fsync(file)
        partial.chmod(0o755)
        _fsync(partial)
        partial.rename(path)
        _fsync(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise _unwritable(path, error) from error
        raise


def _unwritable(path: Path, error: Exception) -> FolderError:
    return FolderError(f"{path} cannot be written: {error}; free its disk or name another folder")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Fill shards one after another; how many there are, and so their names, is known at the end."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    seen: set[str] = set()
    pending_bytes = total_bytes = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if name in seen:
            raise FolderError(f"{name} was given twice")
        seen.add(name)
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            pending_bytes = 0
        # A copy: the format refuses two names for one memory, and a view would keep all of its base alive.
        pending[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if not seen:
        raise FolderError(f"{folder}: there are no tensors to write")
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    weight_map = {tensor_name: name for name, shard in zip(names, shards) for tensor_name in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"model{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
