"""The weights of a checkpoint for one process: no engine, no DeepSpeed, and never more of them than is asked for."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from moepp_ds.checkpoint.errors import CheckpointError
from moepp_ds.checkpoint.files import read_index
from moepp_ds.checkpoint.fingerprints import Fingerprints
from moepp_ds.checkpoint.tensors import StoredTensors, Wanted
from moepp_ds.config.errors import nearest


class WeightReader:
    """An open checkpoint folder.

    index: its index.json. shapes: of every parameter, by global name, FFN experts stacked.
    """

    def __init__(self, folder: Path) -> None:
        """Check the index, that every file is there in its size, and that no weight is missing.

        Raises DamagedCheckpoint.
        """
        self.folder = folder
        self.index = read_index(folder)
        self.shapes: dict[str, list[int]] = self.index["parameters"]
        self._stored = StoredTensors(folder, self.index["files"])
        self._stored.check_whole(self.shapes, ("weight",))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start..stop (all when None) of the flattened global parameter: a new 1-D fp32 tensor on the CPU.

        What is read for it is checked, and a parameter that is read whole is compared with its fingerprints.
        Raises DamagedCheckpoint, or CheckpointError for what was never there.
        """
        if name not in self.shapes:
            meant = nearest(name, self.shapes)
            hint = f"; did you mean {meant}?" if meant else ""
            raise CheckpointError(f"{self.folder} holds no parameter {name}{hint}")
        size = prod(self.shapes[name])
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise CheckpointError(
                f"{name} of {self.folder} has elements 0 to {size}, and {start} to {stop} were asked for; "
                "a range must lie inside"
            )
        values = torch.empty(stop - start, dtype=torch.float32)
        self._stored.read([Wanted("weight", name, start, values)])
        if len(values) == size:
            found = Fingerprints({name: self.shapes[name]})
            found.add(name, 0, values)
            found.check(self.index["fingerprints"])
        return values
