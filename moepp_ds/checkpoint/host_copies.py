"""What a save in the background writes while training changes the originals."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

Tensors = dict[tuple[str, str, int], Tensor]
"""Fragments by (kind, parameter, start)."""


class HostCopies:
    """Host memory for one copy of this rank's fragments, page-locked where they come from a GPU."""

    def __init__(self, tensors: Tensors) -> None:
        self._flat = torch.empty(sum(tensor.numel() for tensor in tensors.values()))
        self._flat.fill_(0.0)  # the system gives memory when it is written to: now, rather than during the first save
        self._locked = any(tensor.is_cuda for tensor in tensors.values()) and self._lock()

    def _lock(self) -> bool:
        """Page-lock the memory as it is: PyTorch's own pinned memory comes in powers of two."""
        problem = torch.cuda.cudart().cudaHostRegister(self._flat.data_ptr(), self._flat.nbytes, 0)
        if int(problem):
            warnings.warn("host memory for background saves cannot be page-locked: copies take longer", stacklevel=2)
        return not int(problem)

    def take(self, tensors: Tensors) -> Tensors:
        """Copy the tensors; what is returned is overwritten by the next call."""
        sizes = [tensor.numel() for tensor in tensors.values()]
        copies = dict(zip(tensors, self._flat.split(sizes)))
        for key, tensor in tensors.items():
            copies[key].copy_(tensor, non_blocking=self._locked)
        if self._locked:
            torch.cuda.synchronize()
        return copies

    def close(self) -> None:
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._flat.data_ptr())
            self._locked = False
        self._flat = torch.empty(0)
