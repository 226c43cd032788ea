"""Which source a row comes from: exact shares at every prefix, O(1) at any index.

1. Weights become quotas q_i of a table of 10,000 slots, by largest remainder.
2. The slots are dealt out by Tijdeman's chairman assignment rule (R. Tijdeman, "The chairman assignment
   problem", Discrete Mathematics 32, 1980). With k sources, c_i slots dealt to source i so far, and N =
   10,000, slot n goes, of the sources whose deficit q_i n / N - c_i is at least 1 / (2k - 2), to the one
   whose deficit would be the first to pass 1 - 1 / (2k - 2) if it were left waiting. Then |c_i - q_i n / N|
   <= 1 - 1 / (2k - 2) < 1 for every i and n.
3. Row i of the stream falls on slot i mod N of block i div N. A source's rows before it are the q of every
   full block plus those before it in the table, so both numbers are read off, at any index, with nothing to
   count.

`random` sampling permutes the table anew for every block of 10,000 rows, by a key; shares are then exact at
the end of each block only.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np

from data_pipeline.document import DataError
from data_pipeline.order import derive_key, permutation
from data_pipeline.weights import SLOTS, nearest, slot_quotas


def chairman_sequence(quotas: Sequence[int]) -> np.ndarray:
    """Deal sum(quotas) slots out to the sources by Tijdeman's rule: int64 [slots], indices into `quotas`.

    The deficit of a source that has j slots grows evenly, so both the slot at which it may take the next one and
    the slot by which it must are known beforehand: the rule is to serve, of those that may, the most urgent; of
    equally urgent ones the first. All arithmetic is in integers: with k sources shares are scaled by 2k - 2.
    """
    total, scale = sum(quotas), max(2 * len(quotas) - 2, 1)
    source = np.repeat(np.arange(len(quotas)), quotas)
    quota = np.repeat(np.array(quotas, dtype=np.int64), quotas) * scale
    dealt = _places(source, len(quotas)) * total * scale
    may = -(-(dealt + total) // quota)
    must = -((-dealt - total * (scale - 1)) // quota)
    order = np.argsort(may, kind="stable")
    coming = list(zip(may[order].tolist(), must[order].tolist(), source[order].tolist()))[::-1]
    waiting: list[tuple[int, int]] = []
    sequence = np.empty(total, dtype=np.int64)
    for slot in range(1, total + 1):
        while coming and coming[-1][0] <= slot:
            heapq.heappush(waiting, coming.pop()[1:])
        sequence[slot - 1] = heapq.heappop(waiting)[1]
    return sequence


def _places(sequence: np.ndarray, sources: int) -> np.ndarray:
    """For each slot, how many earlier slots have the same source: int64 [slots]."""
    places = np.empty(len(sequence), dtype=np.int64)
    for source in range(sources):
        slots = np.flatnonzero(sequence == source)
        places[slots] = np.arange(len(slots))
    return places


class Mixture:
    """The endless order of sources: `locate` tells a row index's source, and which of its rows it is.

    Sources are indexed in the order of their sorted names, so the order of keys in a recipe changes nothing.
    """

    def __init__(
        self,
        weights: Mapping[str, Fraction],
        *,
        sampling: Literal["exact", "random"] = "exact",
        seed: int = 0,
        stage: int = 0,
    ) -> None:
        self.names: list[str] = sorted(weights)
        self.weights = {name: weights[name] for name in self.names}
        self.quotas = slot_quotas(self.weights)
        self.sampling = sampling
        self._key = ("slots", seed, stage) if stage else ("slots", seed)
        self._quota = np.array([self.quotas[name] for name in self.names], dtype=np.int64)
        self._sequence = chairman_sequence(list(self.quotas.values()))
        self._place = _places(self._sequence, len(self.names))
        self._shuffled = lru_cache(maxsize=4)(self._shuffle)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row of that source) of each row index: two int64 arrays shaped like `indices`."""
        block, slot = np.divmod(np.asarray(indices, dtype=np.int64), SLOTS)
        if self.sampling == "exact":
            source, place = self._sequence[slot], self._place[slot]
        else:
            source, place = np.empty_like(slot), np.empty_like(slot)
            for number in np.unique(block).tolist():
                here = block == number
                sequence, places = self._shuffled(number)
                source[here], place[here] = sequence[slot[here]], places[slot[here]]
        return source, block * self._quota[source] + place

    def _shuffle(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        sequence = self._sequence[permutation(derive_key(*self._key, block), SLOTS)]
        return sequence, _places(sequence, len(self.names))

    def index_of(self, name: str, row: int) -> int:
        """The row index on which row number `row` of a source falls: what `locate` undoes."""
        number = self.names.index(name)
        block, place = divmod(row, int(self._quota[number]))
        sequence = self._sequence if self.sampling == "exact" else self._shuffled(block)[0]
        return block * SLOTS + int(np.flatnonzero(sequence == number)[place])

    def describe(self) -> str:
        """The shares as they are drawn, in one line; where slots cannot express a share, also what was asked for."""
        parts = []
        for name, weight in self.weights.items():
            exact = weight * SLOTS == self.quotas[name]
            asked = "" if exact else f" (asked for {float(weight):.4%})"
            parts.append(f"{name} {self.quotas[name] / SLOTS:.2%}{asked}")
        return ", ".join(parts)

    def drawn(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each source."""
        blocks, rest = divmod(rows, SLOTS)
        source, _ = self.locate(np.arange(blocks * SLOTS, blocks * SLOTS + rest))
        counts = blocks * self._quota + np.bincount(source, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist()))

    def largest_deviation(self, rows: int) -> dict[str, float]:
        """Per source, the largest |rows drawn - share * prefix| over all prefixes of the first `rows`
        rows."""
        largest = np.zeros(len(self.names))
        drawn = np.zeros(len(self.names), dtype=np.int64)
        for start in range(0, rows, SLOTS):
            indices = np.arange(start, min(start + SLOTS, rows), dtype=np.int64)
            source, _ = self.locate(indices)
            for number, quota in enumerate(self._quota.tolist()):
                counts = drawn[number] + np.cumsum(source == number)
                largest[number] = max(
                    largest[number], np.abs(counts * SLOTS - quota * (indices + 1)).max() / SLOTS
                )
                drawn[number] = counts[-1]
        return dict(zip(self.names, largest.tolist()))


def claim_labels(keys: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """Which mixture key claims each source label: {label: key}; labels that no key claims are left out.

    A key claims the label equal to it and every label under it (`dolma` claims `dolma/wiki`). Raises
    DataError for a key that claims nothing, with the labels there are.
    """
    present = sorted(set(labels))
    claimed: dict[str, str] = {}
    for key in keys:
        mine = [label for label in present if label == key or label.startswith(key + "/")]
        if not mine:
            parents = sorted(
                {label.rsplit("/", depth)[0] for label in present for depth in range(label.count("/") + 1)}
            )
            raise DataError(
                f"mixture source {key!r} is not among the shards{nearest(key, parents)}; they hold "
                f"{', '.join(present) or 'nothing'}: build that corpus, or change data.mixture"
            )
        for label in mine:
            if label in claimed:
                raise DataError(
                    f"mixture sources {claimed[label]!r} and {key!r} both claim {label!r}; keep one of them"
                    " (data.mixture)"
                )
            claimed[label] = key
    return claimed
