"""The weights of a checkpoint for one process: no engine, no DeepSpeed, and never more of them than is asked for."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from moepp_ds.checkpoint.errors import CheckpointError
from moepp_ds.checkpoint.files import check_whole, find_pieces, read_index, read_range, verify_files
from moepp_ds.config.errors import nearest


class WeightReader:
    """An open checkpoint folder.

    index: its index.json. shapes: of every parameter, by global name, FFN experts stacked.
    """

    def __init__(self, folder: Path) -> None:
        """Check all of it: the index, the size and the checksums of every file, and that no weight is missing.

        Raises CheckpointError. Reading for the checksums is the one time that all files are read whole.
        """
        self.folder = folder
        self.index = read_index(folder)
        self.shapes: dict[str, list[int]] = self.index["parameters"]
        verify_files(folder, self.index["files"], rank=0, world=1)
        self._pieces = find_pieces(folder, self.index["files"])
        check_whole(self._pieces, self.shapes, ("weight",))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start..stop (all when None) of the flattened global parameter: a new 1-D fp32 tensor on the CPU."""
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
        read_range(values, start, self._pieces["weight", name])
        return values
