"""Which expert index is which kind of expert.

One order everywhere, that of the released model so weights map one to one:
FFN 0..num_ffn-1, then constant, then copy, then zero (PAPERS: the zero expert is the last index).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertKinds:
    """How many experts of each kind a layer has.

    FFN experts are spread over the ranks of an expert-parallel group; the other three, the zero-computation experts,
    live on every rank.
    """

    num_ffn: int
    num_constant: int
    num_copy: int
    num_zero: int

    @property
    def total(self) -> int:
        """Experts of all kinds, E."""
        return self.num_ffn + self.num_zero_computation

    @property
    def num_zero_computation(self) -> int:
        """Zero, copy and constant experts together."""
        return self.num_constant + self.num_copy + self.num_zero

    def slices(self) -> dict[str, slice]:
        """The range of expert indices of each kind, in index order; kinds with no expert have an empty range."""
        ranges, start = {}, 0
        for kind, count in (
            ("ffn", self.num_ffn),
            ("constant", self.num_constant),
            ("copy", self.num_copy),
            ("zero", self.num_zero),
        ):
            ranges[kind] = slice(start, start + count)
            start += count
        return ranges
