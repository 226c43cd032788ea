"""What differs between two checkpoints: their recipes, their parameters' shapes, their weights and moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moepp_ds.checkpoint.files import KINDS, MOMENTS, read_index, stored_kinds
from moepp_ds.checkpoint.tensors import StoredTensors, Wanted
from moepp_ds.config.stored import dotted


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints, A and B, do not have in common.

    recipe: (key, of A, of B) of each setting that differs, None where one lacks it. shapes: of each parameter that
    only one has, or has in another shape. weights: of each other parameter the largest absolute difference, if its
    bits differ at all. moments: parameters whose AdamW moments differ, among those that both have them of.
    """

    steps: tuple[int, int]
    kinds: tuple[tuple[str, ...], tuple[str, ...]]
    recipe: list[tuple[str, Any, Any]]
    shapes: list[tuple[str, Any, Any]]
    weights: dict[str, float]
    moments: list[str]

    @property
    def identical(self) -> bool:
        """Whether both are the same point of the same training: every stored number and setting."""
        same_numbers = not (self.shapes or self.weights or self.moments)
        return same_numbers and not self.recipe and self.steps[0] == self.steps[1] and self.kinds[0] == self.kinds[1]


def compare(first: Path, second: Path) -> Comparison:
    """Compare two checkpoint folders, saved on whatever layouts. Raises DamagedCheckpoint."""
    indexes = [read_index(folder) for folder in (first, second)]
    kinds = [stored_kinds(index) for index in indexes]
    stored = [StoredTensors(folder, index["files"]) for folder, index in zip((first, second), indexes)]
    for tensors, index, own in zip(stored, indexes, kinds):
        tensors.check_whole(index["parameters"], own)
    shapes = _differences(indexes[0]["parameters"], indexes[1]["parameters"])
    apart = {name for name, *_ in shapes}
    common = [kind for kind in KINDS if all(kind in own for own in kinds)]
    found = _largest(common, *stored, leave_out=apart)
    moments = {name for kind, name in found if kind in MOMENTS}
    return Comparison(
        steps=(indexes[0]["step"], indexes[1]["step"]),
        kinds=(kinds[0], kinds[1]),
        recipe=_differences(*(_settings(index.get("recipe")) for index in indexes)),
        shapes=shapes,
        weights={name: largest for (kind, name), largest in found.items() if kind == "weight"},
        moments=[name for name in indexes[0]["parameters"] if name in moments],
    )


def _largest(
    kinds: Sequence[str], first: StoredTensors, second: StoredTensors, *, leave_out: set[str]
) -> dict[tuple[str, str], float]:
    """By (kind, parameter) the largest difference where bits differ; NaN where one of the two is no number."""
    found: dict[tuple[str, str], float] = {}
    for kind, name, start, values in first.stream(*kinds):
        if name in leave_out:
            continue
        others = torch.empty_like(values)
        second.read([Wanted(kind, name, start, others)])
        if not torch.equal(values.view(torch.int32), others.view(torch.int32)):
            largest = torch.tensor([found.get((kind, name), 0.0), (values - others).abs().max()])
            found[kind, name] = float(largest.max())  # which NaN wins
    return found


def _settings(recipe: Any) -> dict[str, Any]:
    """By dotted key; what is no recipe, as one setting."""
    return dotted(recipe) if isinstance(recipe, Mapping) else {"recipe": recipe}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (key, first.get(key), second.get(key))
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]
