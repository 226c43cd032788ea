"""Where a parameter's elements are in the partitions of ZeRO 1 and 2: pure functions of names and sizes.

    flat array of a group    parameter, padding, parameter, padding ...       most have no padding between them
    partition p of P         elements p S ... (p+1) S - 1, on the p-th of the ranks that share the array

The last partitions may end short: what pads the array to P S elements is not saved.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]

_EXPERT = re.compile(r"^(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..+)$")
"""The name of a parameter of an expert: its layer, its number, and the rest."""


@dataclass(frozen=True)
class Range:
    """Consecutive elements of a parameter: `length` from `start` on in a group's partition on `rank`."""

    group: int
    rank: int
    start: int
    length: int


def cut(
    shapes: Mapping[str, Shape], paddings: Sequence[int], *, group: int, size: int, ranks: Sequence[int]
) -> dict[str, list[Range]]:
    """The ranges of each parameter of a group, in the order of its elements.

    shapes: in the order of the flat array. paddings: elements behind each. size: elements of a partition. ranks: who
    share the array, in its order. Raises ValueError where they cannot hold all of it.
    """
    found: dict[str, list[Range]] = {}
    at = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        end, found[name] = at + prod(shape), []
        if end > size * len(ranks):
            raise ValueError(f"{len(ranks)} partitions of {size} elements end before {name} does")
        while at < end:
            number, start = divmod(at, size)
            length = min(end - at, size - start)
            found[name].append(Range(group, ranks[number], start, length))
            at += length
        at += padding
    return found


def with_global_experts(name: str, first: Mapping[str, int]) -> str:
    """A parameter's name with its expert's number among all of the layer, where a rank's own numbers begin at 0.

    first: number of the rank's first expert, by layer. A name of no expert stays.
    """
    found = _EXPERT.match(name)
    return name if found is None else f"{found[1]}{first.get(found[1], 0) + int(found[2])}{found[3]}"


def count_experts(names: Iterable[str]) -> dict[str, int]:
    """How many experts of each layer there are in names."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if found := _EXPERT.match(name):
            numbers.setdefault(found[1], set()).add(int(found[2]))
    return {layer: len(held) for layer, held in numbers.items()}
