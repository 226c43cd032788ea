"""Reading a model folder: config.json, weights in one file or several, tokenizer files.

1. config.json must be a JSON object.
2. Find the weights, in the order in which transformers looks: model.safetensors, model.safetensors.index.json,
   pytorch_model.bin, pytorch_model.bin.index.json.
3. An index and its files must agree: every file there, every tensor in the file that the index names, and no others.
   File names of an index are plain names; nothing outside the folder is opened on its word.
4. Only headers are read at first. `read` maps one tensor, or some rows of it, into memory.

A .bin file is a pickle. It is read by torch's restricted unpickler alone, which makes tensors and containers and calls
nothing that the file names; a file that wants more is refused.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moepp_ds.config.errors import RecipeError

CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class FolderError(RecipeError):
    """A model folder that cannot be read, written or used; the message says what to do."""


class HFFolder:
    """The weights, config and tokenizer files of a model folder. Raises FolderError for what is wrong with them.

    config: content of config.json. shapes, dtypes: of every tensor, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = _read_config(path)
        index = _find_weights(path)
        if index.suffix == ".json":
            weight_map = _read_index(index)
            files = sorted(set(weight_map.values()))
            _check_files(index, files)
        else:
            weight_map, files = None, [index.name]
        self.shapes: dict[str, list[int]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._readers: dict[str, _WeightFile] = {}
        problems: list[str] = []
        for name in files:
            stored = _open_weights(path / name)
            for tensor_name, (shape, dtype) in stored.headers.items():
                if tensor_name in self.shapes:
                    problems.append(f"{tensor_name} is in {name} and in another file too")
                if weight_map is not None and weight_map.get(tensor_name, name) != name:
                    problems.append(f"{tensor_name} is in {name}, the index says {weight_map[tensor_name]}")
                if weight_map is not None and tensor_name not in weight_map:
                    problems.append(f"{tensor_name} is in {name}, the index does not know it")
                self.shapes[tensor_name], self.dtypes[tensor_name] = shape, dtype
                self._readers[tensor_name] = stored
        missing = [name for name in weight_map or {} if name not in self.shapes]
        problems += [f"{name} is not in {(weight_map or {})[name]}, where the index has it" for name in missing]
        if problems:
            raise FolderError(listing(f"{index} and its files disagree; fetch the folder again:", problems))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """One tensor in the dtype it is stored in, or its rows start..stop along the first axis; not to be changed.

        Memory-mapped: pages are read when they are used.
        """
        if name not in self.shapes:
            raise FolderError(f"{self.path} holds no tensor {name}")
        try:
            return self._readers[name].read(name, start, stop)
        except (SafetensorError, OSError) as error:
            raise FolderError(f"{self.path}: {name} cannot be read: {error}") from error

    def files_to_copy(self) -> dict[str, bytes]:
        """The tokenizer files that are there, by name, for `write_folder`."""
        found = [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]
        return {file.name: file.read_bytes() for file in found}


class _WeightFile:
    """One opened file: what it holds, and how a tensor of it is read."""

    def __init__(
        self,
        headers: dict[str, tuple[list[int], torch.dtype]],
        read: Callable[[str, int, int | None], Tensor],
    ) -> None:
        self.headers = headers
        self.read = read


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not path.is_dir():
        raise FolderError(f"{path} is no folder; name the one that holds {CONFIG} and the weights")
    if not file.is_file():
        inner = sorted(found.parent for found in path.glob(f"snapshots/*/{CONFIG}"))
        hint = f"did you mean {inner[-1]}?" if inner else "name the folder of a Hugging Face model"
        raise FolderError(f"{path} holds no {CONFIG}; {hint}")
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{file} is damaged ({error}); fetch it again{_pointer_hint(file)}") from error
    if not isinstance(content, dict):
        raise FolderError(f"{file} is damaged (it is a {type(content).__name__}, not an object); fetch it again")
    return content


def _find_weights(path: Path) -> Path:
    """The file to start from: the weights themselves, or an index of their files."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in names:
        if (path / name).is_file():
            return path / name
    shards = sorted(file.name for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern))
    there = f"; it holds {', '.join(shards[:4])}, which need their index" if shards else ""
    raise FolderError(f"{path} holds no weights: none of {', '.join(names)}{there}; fetch the folder again")


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index whose file names stay in its folder."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FolderError(f"{index} is damaged (it has no weight_map); fetch it again")
    bad = [name for name in weight_map.values() if not is_plain(name)]
    if bad:
        raise FolderError(
            f"{index} names {bad[0]!r}; a file of an index must be a plain name in the folder, ending in .safetensors"
            " or .bin: do not use this folder"
        )
    ending = ".bin" if index.name.startswith("pytorch_model") else ".safetensors"
    other = sorted({name for name in weight_map.values() if not name.endswith(ending)})
    if other:
        raise FolderError(f"{index} names {', '.join(other)}, which do not end in {ending}; fetch the folder again")
    return weight_map


def is_plain(name: Any) -> bool:
    """Whether a name, joined to a folder, stays in it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")


def _check_files(index: Path, files: list[str]) -> None:
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        heading = f"{index.parent} lacks {len(missing)} of {len(files)} files that {index.name} names; fetch them:"
        raise FolderError(listing(heading, missing))


def _open_weights(file: Path) -> _WeightFile:
    try:
        return _open_bin(file) if file.suffix == ".bin" else _open_safetensors(file)
    except pickle.UnpicklingError as error:
        raise FolderError(
            f"{file} was refused: it is a pickle that asks for more than tensors ({_first_line(error)});"
            " use a folder with .safetensors"
        ) from error
    except FolderError:
        raise
    except Exception as error:  # damaged bytes make the readers fail in many ways
        hint = "" if file.suffix != ".bin" else "; if it is of torch before 1.6, convert it to .safetensors"
        raise FolderError(
            f"{file} is damaged ({_first_line(error)}); fetch it again{_pointer_hint(file)}{hint}"
        ) from error


def _open_safetensors(file: Path) -> _WeightFile:
    stored = safe_open(file, framework="pt")
    headers = {}
    for name in stored.keys():
        header = stored.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(header.get_dtype())
        if dtype is None:
            raise FolderError(f"{file}: {name} is of dtype {header.get_dtype()}, which is not read; use bf16 or fp32")
        headers[name] = (list(header.get_shape()), dtype)

    def read(name: str, start: int, stop: int | None) -> Tensor:
        return stored.get_tensor(name) if (start, stop) == (0, None) else stored.get_slice(name)[start:stop]

    return _WeightFile(headers, read)


def _open_bin(file: Path) -> _WeightFile:
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, dict):
        raise FolderError(f"{file} holds a {type(tensors).__name__}, not tensors by name; use another folder")
    for name, tensor in tensors.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not plain or tensor.device.type != "cpu":
            raise FolderError(f"{file}: {name!r} is no plain tensor with a name; use another folder")
    headers = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(name: str, start: int, stop: int | None) -> Tensor:
        tensor = tensors[name].detach()
        return tensor if (start, stop) == (0, None) else tensor[start:stop]

    return _WeightFile(headers, read)


def _pointer_hint(file: Path) -> str:
    """Git leaves a note of three lines where a large file was not fetched."""
    try:
        with file.open("rb") as opened:
            return ": it is a Git LFS pointer (git lfs pull)" if opened.read(23) == b"version https://git-lfs" else ""
    except OSError:
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .")


def listing(heading: str, items: Iterable[str]) -> str:
    """A message of one line for the whole and one for each item."""
    return "\n  ".join([heading, *items])
