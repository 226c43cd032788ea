"""Model folders: what is written is read back, damage is named, and nothing in a folder is run or led astray."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moepp_ds.hf_folder import FolderError, HFFolder, write_folder

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(4, 3),
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "c": torch.tensor([1.5, -2.0], dtype=torch.float16),
}


def same(found: Tensor, meant: Tensor) -> bool:
    return found.dtype == meant.dtype and torch.equal(found, meant)


def safetensors_shards(folder: Path, shards: dict[str, dict[str, Tensor]], **index: str) -> Path:
    """A folder whose index says what its files hold, but for what `index` says otherwise."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def bin_folder(folder: Path, content: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_one_file_comes_back_with_config_and_tokenizer(tmp_path: Path) -> None:
    extra = {"tokenizer.json": b"{}", "modeling_moepp.py": b"pass\n", "README.md": b"# card\n"}
    write_folder(tmp_path / "m", {"model_type": "x"}, TENSORS.items(), extra_files=extra)
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert {file.name for file in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors", *extra}
    folder = HFFolder(tmp_path / "m")
    assert folder.config == {"model_type": "x"}
    assert folder.shapes == {"a": [4, 3], "b": [2, 3], "c": [2]}
    assert folder.dtypes == {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16}
    assert all(same(folder.read(name), tensor) for name, tensor in TENSORS.items())
    assert same(folder.read("a", 1, 3), TENSORS["a"][1:3])
    assert folder.files_to_copy() == {"tokenizer.json": b"{}"}


def test_shards_fill_up_to_their_bound(tmp_path: Path) -> None:
    # 48 + 12 bytes fit 60; 4 more do not, and begin the second shard.
    write_folder(tmp_path / "m", {}, TENSORS.items(), max_shard_bytes=60)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 64}, "weight_map": {"a": first, "b": first, "c": second}}
    assert list(load_file(tmp_path / "m" / second)) == ["c"]
    folder = HFFolder(tmp_path / "m")
    assert all(same(folder.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_tensor_over_the_bound_has_a_shard_of_its_own(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", {}, TENSORS.items(), max_shard_bytes=1)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3


def test_views_and_shared_memory_are_written_as_they_look(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    write_folder(tmp_path / "m", {}, [("embedding", table), ("head", table), ("turned", table.T), ("row", table[1])])
    folder = HFFolder(tmp_path / "m")
    assert torch.equal(folder.read("head"), table)
    assert torch.equal(folder.read("turned"), table.T)
    assert torch.equal(folder.read("row"), table[1])


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="a was given twice"):
        write_folder(tmp_path / "m", {}, [*TENSORS.items(), ("a", TENSORS["a"])])
    with pytest.raises(FolderError, match="no tensors"):
        write_folder(tmp_path / "m", {}, [])
    with pytest.raises(FolderError, match="'../x' cannot be written"):
        write_folder(tmp_path / "m", {}, TENSORS.items(), extra_files={"../x": b""})
    with pytest.raises(FolderError, match="'model.safetensors' cannot be written"):
        write_folder(tmp_path / "m", {}, TENSORS.items(), extra_files={"model.safetensors": b""})
    assert os.listdir(tmp_path) == []
    (tmp_path / "m").mkdir()
    (tmp_path / "m/mine").write_text("")
    with pytest.raises(FolderError, match="exists and is not empty; name a new folder"):
        write_folder(tmp_path / "m", {}, TENSORS.items())
    assert os.listdir(tmp_path / "m") == ["mine"]
    for place in (tmp_path / "m/mine/inside", tmp_path / ("n" * 300)):
        with pytest.raises(FolderError, match="cannot be written: .*; free its disk or name another folder"):
            write_folder(place, {}, TENSORS.items())


def test_bin_files_are_read(tmp_path: Path) -> None:
    folder = HFFolder(bin_folder(tmp_path / "m", TENSORS))
    assert folder.shapes == {"a": [4, 3], "b": [2, 3], "c": [2]}
    assert all(same(folder.read(name), tensor) for name, tensor in TENSORS.items())
    assert same(folder.read("a", 3), TENSORS["a"][3:])


def test_sharded_bin_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    bin_folder(folder, {}).joinpath("pytorch_model.bin").unlink()
    names = {name: f"pytorch_model-{i + 1:05}-of-00003.bin" for i, name in enumerate(TENSORS)}
    for name, file in names.items():
        torch.save({name: TENSORS[name]}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert all(same(HFFolder(folder).read(name), tensor) for name, tensor in TENSORS.items())


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path / "m", {"a": torch.zeros(1)})
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    assert HFFolder(folder).read("a").item() == 1.0


class Bomb:
    """Unpickled by an ordinary unpickler, this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_bomb_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = bin_folder(tmp_path / "zip", {"a": torch.zeros(2), "b": Bomb(marker)})
    with pytest.raises(FolderError, match=r"pytorch_model.bin was refused: it is a pickle that asks for more"):
        HFFolder(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(FolderError, match=r"pytorch_model.bin"):
        HFFolder(folder)
    torch.save({"b": Bomb(marker)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(FolderError, match=r"pytorch_model.bin"):
        HFFolder(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # the bomb works


@pytest.mark.parametrize(
    "content, said",
    [
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        ({"a": {"b": torch.zeros(1)}}, "'a' is no plain tensor"),
        ({"a": 3}, "'a' is no plain tensor"),
        ({3: torch.zeros(1)}, "3 is no plain tensor"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is no plain tensor"),
    ],
)
def test_a_bin_file_must_hold_tensors_by_name(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(FolderError, match=said):
        HFFolder(bin_folder(tmp_path / "m", content))


def test_config_must_be_there_and_be_an_object(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="none is no folder; name the one that holds config.json"):
        HFFolder(tmp_path / "none")
    with pytest.raises(FolderError, match="holds no config.json; name the folder of a Hugging Face model"):
        HFFolder(tmp_path)
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    (tmp_path / "snapshots/abc/config.json").write_text("{}")
    with pytest.raises(FolderError, match="did you mean .*snapshots/abc"):
        HFFolder(tmp_path)
    for damaged, said in (('{"a": ', "config.json is damaged"), ("[1]", "it is a list, not an object")):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(FolderError, match=f"{said}.*fetch it again"):
            HFFolder(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(FolderError, match="config.json is damaged"):
        HFFolder(tmp_path)


def test_weights_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FolderError, match="holds no weights: none of model.safetensors, .*fetch the folder again"):
        HFFolder(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(FolderError, match="it holds model-00001-of-00002.safetensors, which need their index"):
        HFFolder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n"
    for content, said in ((b"", "damaged"), (b"\0" * 100, ""), (pointer, "Git LFS pointer")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FolderError, match=f"{name}.*{said}"):
            HFFolder(tmp_path)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", {}, TENSORS.items())
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FolderError, match="model.safetensors is damaged.*fetch it again"):
        HFFolder(tmp_path / "m")
    folder = bin_folder(tmp_path / "b", TENSORS)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FolderError, match="pytorch_model.bin is damaged.*fetch it again"):
        HFFolder(folder)


def test_all_missing_files_are_listed_at_once(tmp_path: Path) -> None:
    shards = {"x.safetensors": {"a": torch.zeros(1)}}
    folder = safetensors_shards(tmp_path / "m", shards, b="y.safetensors", c="z.safetensors")
    with pytest.raises(FolderError, match=r"lacks 2 of 3 files .*\n  y.safetensors\n  z.safetensors"):
        HFFolder(folder)


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    held = {"x.safetensors": "ab", "y.safetensors": "ce"}
    shards = {file: {name: torch.zeros(1) for name in names} for file, names in held.items()}
    folder = safetensors_shards(tmp_path / "m", shards, b="y.safetensors", d="x.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["e"]
    index.write_text(json.dumps(content))
    with pytest.raises(FolderError) as error:
        HFFolder(folder)
    assert "b is in x.safetensors, the index says y.safetensors" in str(error.value)
    assert "d is not in x.safetensors, where the index has it" in str(error.value)
    assert "e is in y.safetensors, the index does not know it" in str(error.value)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    shards = {name: {"a": torch.zeros(1)} for name in ("x.safetensors", "y.safetensors")}
    folder = safetensors_shards(tmp_path / "m", shards, b="x.safetensors")
    with pytest.raises(FolderError, match="a is in y.safetensors and in another file too"):
        HFFolder(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", 3, None, "a\\b.safetensors", "\0"]
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: Any) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    folder = safetensors_shards(tmp_path / "m", {"y.safetensors": {"b": torch.zeros(1)}}, a=name)
    with pytest.raises(FolderError, match="must be a plain name in the folder"):
        HFFolder(folder)


def test_an_index_of_safetensors_cannot_bring_in_a_pickle(tmp_path: Path) -> None:
    folder = safetensors_shards(tmp_path / "m", {"y.safetensors": {"b": torch.zeros(1)}}, a="x.bin")
    with pytest.raises(FolderError, match="x.bin, which do not end in .safetensors"):
        HFFolder(folder)


def test_an_index_needs_a_weight_map(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(FolderError, match="it has no weight_map"):
            HFFolder(tmp_path)


def test_an_unknown_tensor_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", {}, TENSORS.items())
    with pytest.raises(FolderError, match="holds no tensor d"):
        HFFolder(tmp_path / "m").read("d")
