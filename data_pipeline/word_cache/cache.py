"""The word cache: texts in, ids out, with SentencePiece asked only for units it was not asked for before.

Ids of all known units lie in one array, the pool. What the table (or, for units too long for it, a dictionary) holds
for a unit is `first place in the pool * 2**32 + number of ids`.

Memory is bounded: when the table, the dictionary or the pool is full, all are emptied and filled anew. That costs
some speed and never an id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import sentencepiece

from data_pipeline.word_cache.borders import (
    DOCUMENT_MARK,
    SPACE,
    WORD_MARK,
    ModelProto,
    border_table,
    piece_widths,
)
from data_pipeline.word_cache.table import PADDING_BYTES, TOO_LONG, UnitTable, unit_keys
from data_pipeline.word_cache.unbroken import encode_unbroken

WINDOW_BYTES = 1 << 16
"""Text looked at in one go: its arrays stay in the processor's own caches."""
SHORT_UNITS = 1 << 19
"""Units that fit the table."""
LONG_UNITS = 1 << 17
"""Units too long for the table that are remembered."""
LONG_UNIT_BYTES = 64
"""Longer units are not remembered: they hardly ever come again."""
POOL_IDS = 1 << 22
UNITS_PER_CALL = 100
"""New units in one call of SentencePiece: fewer cost calls, more leave the processor's caches."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What a cache has done since it was made."""

    units: int
    """Units that the texts fell into, one for each document's end included."""
    text_bytes: int
    """UTF-8 bytes of the texts."""
    encoded_units: int
    """Units that SentencePiece encoded: all others were hits."""
    encoded_bytes: int
    """UTF-8 bytes of those."""
    entries: int
    """Units remembered now."""
    cleared: int
    """Times that the cache was full and emptied."""

    @property
    def hit_rate(self) -> float:
        """Share of units that were known."""
        return 1 - self.encoded_units / max(self.units, 1)


class WordCache:
    """Encodes as the model does; only for models without `objections`. One thread at a time is let in."""

    def __init__(
        self,
        model: ModelProto,
        *,
        short_units: int = SHORT_UNITS,
        long_units: int = LONG_UNITS,
        pool_ids: int = POOL_IDS,
    ) -> None:
        """The limits are looked at between windows, so they are passed by what is new in one."""
        self._prefix = " " if model.normalizer_spec.add_dummy_prefix else ""
        unprefixed = ModelProto()
        unprefixed.CopyFrom(model)
        unprefixed.normalizer_spec.add_dummy_prefix = False
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=unprefixed.SerializeToString())
        self._borders = border_table(model)
        self._width_V = piece_widths(model)
        self._newline = int(self._plain(b"\n")[0])
        self._most_short, self._most_long, self._most_ids = short_units, long_units, pool_ids
        self._table = UnitTable(short_units + 2 * WINDOW_BYTES)
        self._long: dict[bytes, int] = {}
        self._pool = np.empty(0, dtype=np.int32)
        self._used = 0
        self._lock = Lock()
        self._units = self._text_bytes = self._encoded_units = self._encoded_bytes = 0
        self._cleared = -1
        self._clear()

    def statistics(self) -> CacheStatistics:
        """What was done so far."""
        return CacheStatistics(
            units=self._units,
            text_bytes=self._text_bytes,
            encoded_units=self._encoded_units,
            encoded_bytes=self._encoded_bytes,
            entries=self._table.entries + len(self._long),
            cleared=self._cleared,
        )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n]: views of one array, in which they lie end to end."""
        if not texts:
            return []
        # An empty text gets no prefix: it has no ids.
        parts = [(self._prefix + text).encode() if text else b"" for text in texts]
        data = bytes([DOCUMENT_MARK]).join([*parts, b""])
        if WORD_MARK.encode() in data:
            data = data.replace(WORD_MARK.encode(), b" ")
        size = len(data)
        data += bytes(PADDING_BYTES + -size % 8)
        with self._lock:
            self._text_bytes += size
            ids_N, ends = self._encode_data(data, size)
        return [ids_N[start:end] for start, end in zip([0, *ends], ends)]

    def _encode_data(self, data: bytes, size: int) -> tuple[np.ndarray, list[int]]:
        """Ids of the first `size` bytes, and where in them each document ends."""
        windows: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        start = done = 0
        while start < size:
            cuts = self._cuts(data, start, size)
            ids_N, document_ends = self._encode_window(data, np.concatenate(([start], cuts)))
            windows.append(ids_N)
            ends.append(document_ends + done)
            done += len(ids_N)
            start = int(cuts[-1])
        return np.concatenate(windows), np.concatenate(ends).tolist()

    def _cuts(self, data: bytes, start: int, size: int) -> np.ndarray:
        """The borders in the window that begins at `start`, or else the first one behind it; int64, never empty."""
        while start < size:
            length = min(WINDOW_BYTES, size - start)
            border_N = np.empty(length, dtype=bool)  # before the bytes start + 1, start + 2, ...
            for odd in (0, 1):
                pairs = np.frombuffer(data, "<u2", count=(length + 1 - odd) // 2, offset=start + odd)
                border_N[odd::2] = self._borders[pairs]
            cuts = np.flatnonzero(border_N) + (start + 1)
            if cuts.size:
                return cuts
            start += length
        raise AssertionError("the text's last byte is a document mark, and there is a border behind it")

    def _encode_window(self, data: bytes, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the units between `cuts`, and where in these ids documents end."""
        if self._is_full():
            self._clear()
        starts, ends = cuts[:-1], cuts[1:]
        window = np.frombuffer(data, np.uint8, count=int(cuts[-1] - cuts[0]) + 1, offset=int(cuts[0]))
        heads = window[starts - starts[0]]
        # Each run of spaces is the head of one unit, so runs and units that begin with a space pair up in order.
        space = window == SPACE
        words = starts.copy()
        words[heads == SPACE] = np.flatnonzero(space[:-1] > space[1:]) + (starts[0] + 1)
        low, high = unit_keys(data, words, ends, words - starts)
        values, missing = self._table.find(low, high)
        if missing.size:
            units = [data[start:end] for start, end in zip(starts[missing].tolist(), ends[missing].tolist())]
            values[missing] = self._learn(units, low[missing], high[missing])
        self._units += len(values)
        count = values & 0xFFFFFFFF
        stop = np.cumsum(count)
        places = np.repeat((values >> 32) - (stop - count), count)
        places += np.arange(len(places))
        return self._pool[places], stop[heads == DOCUMENT_MARK]

    def _learn(self, units: list[bytes], low: np.ndarray, high: np.ndarray) -> list[int]:
        """Values of units that the table lacks; those that are new get remembered."""
        place = {unit: at for at, unit in enumerate(units)}
        new = [unit for unit in place if unit not in self._long]
        if new:
            values = self._encode_units(new)
            at = np.array([place[unit] for unit in new])
            fits = (high[at] >> np.uint64(48) & np.uint64(15)) != TOO_LONG
            self._table.insert(low[at[fits]], high[at[fits]], values[fits])
            learnt = dict(zip(new, values.tolist()))
            for unit, short in zip(new, fits.tolist()):
                if not short and len(unit) <= LONG_UNIT_BYTES:
                    self._long[unit] = learnt[unit]
            return [learnt.get(unit) or self._long[unit] for unit in units]
        return [self._long[unit] for unit in units]

    def _encode_units(self, units: list[bytes]) -> np.ndarray:
        """Have SentencePiece encode units, put their ids into the pool, and return their values, int64.

        Units lie in one call between newlines: those are units themselves, and tell the ids of others apart.
        """
        self._encoded_units += len(units)
        self._encoded_bytes += sum(map(len, units))
        calls = [units[at : at + UNITS_PER_CALL] for at in range(0, len(units), UNITS_PER_CALL)]
        ids_N = np.concatenate([self._encode_long(b"\n".join([*call, b""])) for call in calls])
        ends = np.flatnonzero(ids_N == self._newline)
        starts = np.concatenate(([0], ends[:-1] + 1))
        values = (self._used + starts) << 32 | (ends - starts)
        self._extend_pool(ids_N)
        return values

    def _encode_long(self, data: bytes) -> np.ndarray:
        """Units and newlines, in spans if need be: a unit may be as long as a text."""
        if len(data) <= 2 * WINDOW_BYTES:
            return self._plain(data)
        return encode_unbroken(data, self._plain, self._width_V)

    def _plain(self, data: bytes) -> np.ndarray:
        return self._processor.encode(
            data.decode(),
            out_type="numpy",
            add_bos=False,
            add_eos=False,
            reverse=False,
            enable_sampling=False,
            num_threads=1,
        )

    def _extend_pool(self, ids_N: np.ndarray) -> None:
        stop = self._used + len(ids_N)
        if stop > len(self._pool):
            self._pool = np.concatenate([self._pool, np.empty(max(stop, len(self._pool)), dtype=np.int32)])
        self._pool[self._used : stop] = ids_N
        self._used = stop

    def _is_full(self) -> bool:
        return (
            self._table.entries > self._most_short
            or len(self._long) > self._most_long
            or self._used > self._most_ids
        )

    def _clear(self) -> None:
        """Forget all units, but for the newline and the document mark, which SentencePiece is never given."""
        self._cleared += 1
        self._table.clear()
        self._long = {}
        self._pool = np.full(1 << 16, self._newline, dtype=np.int32)
        self._used = 1
        marks = bytes([0x0A, DOCUMENT_MARK]).ljust(PADDING_BYTES + 8, b"\0")
        low, high = unit_keys(marks, np.array([0, 1]), np.array([1, 2]), np.array([0, 0]))
        self._table.insert(low, high, np.array([1, 0]))  # one id, at place 0 of the pool; none
