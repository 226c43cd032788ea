"""Reading a file of DeepSpeed's saver, which is a pickle, without running anything that it names.

torch's restricted reader makes tensors and plain containers, and calls nothing but what it was told to allow. Allowed
are three records of numbers that DeepSpeed keeps beside its tensors, under DeepSpeed's names but as classes of this
module, which do nothing. DeepSpeed itself is not imported. torch does not compare the checksums that its files hold
(they are zip archives), so that is done here: moments are written down once, and nothing else would tell.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from moepp_ds.checkpoint import CheckpointError


@dataclass
class Address:
    """Where a parameter's piece lies in a rank's partition: `deepspeed.utils.tensor_fragment.fragment_address`."""

    numel: int
    start: int


class Stage(int):
    """ZeRO's stage: `deepspeed.runtime.zero.config.ZeroStageEnum`."""


class Scaler:
    """The state of a loss scaler, as attributes: `deepspeed.runtime.fp16.loss_scaler.LossScaler` and its kind."""


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Address, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Scaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Scaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def read_file(file: Path) -> Any:
    """The content of a file, its tensors mapped into memory and read when they are used.

    Raises CheckpointError for one that is damaged, and for one that asks for more than tensors, containers and those
    records, naming all it asks for.
    """
    try:
        with safe_globals(_STAND_INS):
            unknown = get_unsafe_globals_in_checkpoint(file)
            if unknown:
                raise pickle.UnpicklingError(", ".join(sorted(unknown)))
            _compare_checksums(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} was refused: it is a pickle that asks for more than tensors ({_first_line(error)}); nothing of it "
            "was run. If it is your own, save it again without these objects in client_state"
        ) from error
    except Exception as error:  # damaged bytes make the readers fail in many ways
        raise CheckpointError(
            f"{file} is damaged, or not of torch's zip form ({_first_line(error)}); copy it again, or save it again "
            "with DeepSpeed's checkpoint.checkpoint_serialization: true"
        ) from error


def _compare_checksums(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is another")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .")
