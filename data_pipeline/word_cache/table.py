"""A hash table from short units of text to numbers, searched for thousands of units in one go.

A unit is a run of spaces and what follows it, as `       return`. With up to 14 bytes behind up to 4,095 spaces it
fits into two 64-bit words, and those are its key:

    low    bytes 0..7 behind the spaces, zeros where there are fewer
    high   bytes 8..13; above them, in 4 bits, how many bytes there are; above these, in 12 bits, how many spaces

Equal keys are equal units, so a number found is the right one: the hash only says where to look first. A taken slot
sends the search to the next. `high` is 0 in a free slot alone, as no unit is empty.
"""

from __future__ import annotations

import numpy as np

UNIT_BYTES = 14
UNIT_SPACES = (1 << 12) - 1
TOO_LONG = 15
"""Stands for the number of bytes in keys of units that do not fit; such a key is found in no table."""
PADDING_BYTES = 32
"""Readable bytes that `unit_keys` needs behind the last unit."""

_LOW_MASKS = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(16)], dtype=np.uint64)
_HIGH_MASKS = np.array([(1 << 8 * max(min(size, 14) - 8, 0)) - 1 for size in range(16)], dtype=np.uint64)
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
"""Odd numbers with bits all over: 2^64 over the golden ratio, and a prime of xxHash."""


def unit_keys(data: bytes, words: np.ndarray, ends: np.ndarray, spaces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys (low, high), uint64 [U], of the units whose spaces end, and whose other bytes begin, at `words`.

    data: the text, a multiple of 8 bytes long, with `PADDING_BYTES` behind the last unit. words, ends: int64 [U],
    offsets in it. spaces: int64 [U], spaces before `words`.
    """
    eights = np.frombuffer(data, "<u8")
    size = ends - words
    size[(size > UNIT_BYTES) | (spaces > UNIT_SPACES)] = TOO_LONG
    place = words >> 3
    right = ((words & 7) << 3).astype(np.uint64)
    left = np.uint64(63) - right
    one = np.uint64(1)
    first, second, third = eights[place], eights[place + 1], eights[place + 2]
    low = (first >> right | second << one << left) & _LOW_MASKS[size]
    high = (second >> right | third << one << left) & _HIGH_MASKS[size]
    high |= (size << 48 | spaces << 52).astype(np.uint64)
    return low, high


class UnitTable:
    """Keys to positive numbers; it neither grows nor forgets, so watch `entries` and `clear` it in time."""

    def __init__(self, most_entries: int) -> None:
        """Room for `most_entries`: slots of 24 bytes, a quarter of them free. Memory is taken as they fill."""
        self._bits = (4 * most_entries // 3).bit_length()
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.entries = 0
        self._low, self._high = (np.zeros(1 << self._bits, dtype=np.uint64) for _ in range(2))
        self._values = np.zeros(1 << self._bits, dtype=np.int64)

    def find(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values int64 [U], the places in it whose keys are not in the table, where the value means nothing)."""
        slot = self._first_slots(low, high)
        values = self._values[slot]
        missing = []
        left = np.flatnonzero((self._low[slot] != low) | (self._high[slot] != high))
        while left.size:
            free = self._high[slot[left]] == 0
            missing.append(left[free])
            left = left[~free]
            slot[left] = at = self._next(slot[left])
            same = (self._low[at] == low[left]) & (self._high[at] == high[left])
            values[left[same]] = self._values[at[same]]
            left = left[~same]
        return values, np.concatenate(missing) if missing else left

    def insert(self, low: np.ndarray, high: np.ndarray, values: np.ndarray) -> None:
        """Add keys that differ from each other and from all in the table."""
        slot = self._first_slots(low, high)
        left = np.arange(len(slot))
        while left.size:
            free = left[self._high[slot[left]] == 0]
            at = slot[free]
            # Where several want one slot the last to be written has it, and all of its three numbers.
            self._low[at], self._high[at], self._values[at] = low[free], high[free], values[free]
            at = slot[left]
            left = left[(self._low[at] != low[left]) | (self._high[at] != high[left])]
            slot[left] = self._next(slot[left])
        self.entries += len(slot)

    def _first_slots(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        mixed = low * _MIX[0] ^ high
        mixed ^= mixed >> np.uint64(29)
        mixed *= _MIX[1]
        return (mixed >> np.uint64(64 - self._bits)).astype(np.int64)

    def _next(self, slot: np.ndarray) -> np.ndarray:
        return (slot + 1) & ((1 << self._bits) - 1)
