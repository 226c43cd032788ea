"""The fingerprint of every parameter's weight, and of every FFN expert's own share of it.

Ranks add up what they hold, whatever ranges that is. An expert's elements are counted from its own first one, and so
two experts that were exchanged are seen as two that changed, and named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from torch import Tensor

from moepp_ds.checkpoint.errors import DamagedCheckpoint
from moepp_ds.fingerprint import add_fingerprints, partial_fingerprint

LINES = 10
"""Differences that an error names one by one."""


def is_stacked(name: str) -> bool:
    """Whether a parameter is a stack of FFN experts, as `model.expert_offsets` finds them, by its name alone."""
    return ".experts." in name


class Fingerprints:
    """Of every parameter a list: one number, or one for each FFN expert of a stacked one. Ranges are added to them."""

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        """shapes: of every parameter by global name, FFN experts stacked, all of them."""
        self.sums = {name: [0] * (shape[0] if is_stacked(name) else 1) for name, shape in shapes.items()}
        self._sizes = {name: prod(shapes[name]) // len(sums) for name, sums in self.sums.items()}

    def add(self, name: str, start: int, values_N: Tensor) -> None:
        """Count in the elements of a parameter from `start` on; values_N: 1-D, fp32, on any device."""
        size, sums = self._sizes[name], self.sums[name]
        while len(values_N):
            part, place = divmod(start, size)
            mine_N, values_N = values_N[: size - place], values_N[size - place :]
            sums[part] = add_fingerprints(sums[part], partial_fingerprint(mine_N, place))
            start += len(mine_N)

    def add_sums(self, others: Iterable[Mapping[str, list[int]]]) -> None:
        """Count in what others have added to theirs."""
        for sums in others:
            for name, parts in sums.items():
                self.sums[name] = [add_fingerprints(*pair) for pair in zip(self.sums[name], parts)]

    def facts(self) -> dict[str, list[str]]:
        """For the index: 16 hex digits each."""
        return {name: [f"{number:016x}" for number in sums] for name, sums in self.sums.items()}

    def check(self, stored: Mapping[str, list[str]]) -> None:
        """Raise DamagedCheckpoint, naming parameters and experts, unless `stored` says the same."""
        lines = differences(stored, self.facts())
        if lines:
            more = [f"  and {len(lines) - LINES} more"] if len(lines) > LINES else []
            said = "the weights are not the ones that were saved; use another checkpoint:"
            raise DamagedCheckpoint("\n".join([said, *lines[:LINES], *more]))


def differences(stored: Mapping[str, list[str]], found: Mapping[str, list[str]]) -> list[str]:
    """A line for each fingerprint of `found` that `stored` does not have."""
    lines = []
    for name, prints in found.items():
        expected = stored.get(name, [])
        if len(expected) != len(prints):
            lines.append(f"  {name}: {len(expected)} fingerprints instead of {len(prints)}")
            continue
        for part, (then, now) in enumerate(zip(expected, prints)):
            if then != now:
                place = f"{name}, expert {part}" if is_stacked(name) else name
                lines.append(f"  {place}: fingerprint {now} instead of {then}")
    return lines
