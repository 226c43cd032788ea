"""What every program that starts a run from a model folder asks of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from moepp_ds.hf_folder.reading import HFFolder

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Old versions of transformers stored the rotary frequencies; they follow from rope_theta."""

Shapes = Mapping[str, Sequence[int]]


def tensor_problems(folder: HFFolder, needed: Shapes, unused: Shapes | None = None) -> Iterator[str]:
    """Every tensor that is missing, left over, of another shape or no plain number, a line each.

    needed: the tensors that there must be. unused: those that there may be beside them.
    """
    known = {**needed, **(unused or {})}
    found = {name: list(shape) for name, shape in folder.shapes.items() if not IGNORED.fullmatch(name)}
    yield from (f"missing: {name} {list(shape)}" for name, shape in needed.items() if name not in found)
    yield from (f"extra: {name} {shape}" for name, shape in found.items() if name not in known)
    for name, shape in found.items():
        if name in known and shape != list(known[name]):
            yield f"of another shape: {name} is {shape}, the model's is {list(known[name])}"
    for name in found:
        if name in known and folder.dtypes[name] not in FLOATS:
            kind = str(folder.dtypes[name]).removeprefix("torch.")
            yield f"of another kind: {name} is {kind}, and weights must be plain floating point numbers"


def identity(folder: HFFolder) -> dict[str, str]:
    """Which folder it was, for the record of a run that starts from it."""
    digest = hashlib.sha256((folder.path / "config.json").read_bytes()).hexdigest()
    return {"folder": str(folder.path), "model_type": folder.config["model_type"], "config_sha256": digest}
