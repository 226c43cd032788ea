"""One source's endless token stream, and the rows cut from it.

1. An epoch of a source is all its files in the order of a key of (seed, source, epoch, file name).
2. The files are taken in groups of `interleave`. Inside a group their parts (whole documents, about 262,144
   tokens) go round-robin: the first part of each file, then the second of each file that has one, and so on;
   so no single file fills hundreds of steps, and no more than a group of files is open at a time.
3. The stream is the endless concatenation of epochs 0, 1, 2, ...
4. Row j is stream[jS : jS + S + 1]: S inputs and S targets that overlap by one token, so every token of the
   stream but the first is a target exactly once. Rows run across parts, files and epochs; nothing is padded
   or left over.
5. Rows are permuted inside windows of W: the k-th row to be drawn, k = wW + i, is row wW + permutation_w[i].
   Of a source that may give only so many rows the last window is as much shorter, so that the rows drawn are
   the first ones of its stream, none of them left out for a later one.

A position is found by division (epoch), bisection over groups, and bisection over the parts of one group,
which are read when that group is reached. What is held in memory grows with files, and with the parts of the
groups in use: 24 bytes for each 262,144 tokens. A source of which a window takes many epochs has all of them laid
out at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipeline.document import DataError
from data_pipeline.order import file_order, file_orders, name_keys, window_permutation

FEW_EPOCHS = 2
"""Up to so many are laid out group by group, which are then kept; more in one go."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive runs of the stream, each a run of one file's tokens; three int64 arrays of equal length."""

    start: np.ndarray
    """Position in the stream where the run begins, ascending without gaps."""
    file: np.ndarray
    """Index of the file, counted from `first_file`."""
    offset: np.ndarray
    """Position in the file where the run begins."""
    stop: int
    """Position in the stream where the last run ends."""


class TokenStream:
    """The endless stream of one source, as positions in files.

    `names` are the files' stable keys, `tokens` their lengths (int64; zero is allowed: an empty file keeps
    its place in its group, whichever way the shards were made). `read_cuts(i)` gives the part cuts of file i.
    Files are numbered from `first_file` in the segments, so that several sources can share one numbering.
    """

    def __init__(
        self,
        source: str,
        *,
        names: Sequence[str],
        tokens: np.ndarray,
        read_cuts: Callable[[int], np.ndarray],
        seed: int,
        interleave: int,
        first_file: int = 0,
    ) -> None:
        self.source = source
        self.tokens = int(tokens.sum())
        """Length of one epoch."""
        if self.tokens == 0:
            raise DataError(
                f"source {source!r} has no tokens; leave it out of data.mixture or build more of it"
            )
        self._file_tokens, self._read_cuts = tokens, read_cuts
        self._seed, self._interleave, self._first_file = seed, interleave, first_file
        self._keys = name_keys(names)
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        self._group = lru_cache(maxsize=2)(self._build_group)

    def _build_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(files in order, where in the epoch each group begins with the epoch's length after the last)."""
        order = file_order(self._seed, self.source, epoch, self._keys)
        ends = np.cumsum(self._file_tokens[order])
        return order, np.concatenate([[0], ends[self._interleave - 1 : -1 : self._interleave], ends[-1:]])

    def _build_group(self, epoch: int, group: int) -> Segments:
        order, starts = self._epoch(epoch)
        files = order[group * self._interleave : (group + 1) * self._interleave]
        begin = int(starts[group]) + epoch * self.tokens
        return self._lay_out(files, np.zeros(len(files), dtype=np.int64), begin)

    def _build_epochs(self, epochs: range) -> Segments:
        orders = file_orders(self._seed, self.source, epochs, self._keys)
        group = np.arange(orders.shape[1]) // self._interleave
        groups = np.arange(len(epochs))[:, None] * (group[-1] + 1) + group
        return self._lay_out(orders.ravel(), groups.ravel(), epochs[0] * self.tokens)

    def _lay_out(self, files: np.ndarray, group: np.ndarray, begin: int) -> Segments:
        """The parts of `files`, round-robin among those of equal `group`, from stream position `begin` on.

        files: int64 [n], in order, a file may come up again in another group; group: int64 [n], ascending.
        """
        distinct, which = np.unique(files, return_inverse=True)
        cuts = [self._read_cuts(file + self._first_file).astype(np.int64) for file in distinct.tolist()]
        for file, cut in zip(distinct.tolist(), cuts):
            if (int(cut[-1]) if len(cut) else 0) != self._file_tokens[file]:
                raise DataError(
                    f"source {self.source!r}: the part cuts of its shards do not add up to their tokens; run"
                    " `moepp-data verify` on the set"
                )
        part_end = np.concatenate(cuts)
        part_begin = np.concatenate([np.concatenate([[0], cut[:-1]]) if len(cut) else cut for cut in cuts])
        parts = np.array([len(cut) for cut in cuts])
        first_part = np.cumsum(parts) - parts
        owner = np.repeat(np.arange(len(files)), parts[which])
        turn = np.arange(len(owner)) - np.repeat(np.cumsum(parts[which]) - parts[which], parts[which])
        robin = np.lexsort((owner, turn, group[owner]))
        owner, part = owner[robin], (first_part[which[owner]] + turn)[robin]
        stop = begin + np.cumsum(part_end[part] - part_begin[part])
        return Segments(
            np.concatenate([[begin], stop[:-1]]), files[owner] + self._first_file, part_begin[part], int(stop[-1])
        )

    def segments(self, start: int, stop: int) -> Segments:
        """The runs that cover stream positions `start` to `stop` (exclusive, > start), in order."""
        epochs = range(start // self.tokens, (stop - 1) // self.tokens + 1)
        if len(epochs) > FEW_EPOCHS:
            return _clip(self._build_epochs(epochs), start, stop)
        found: list[Segments] = []
        for epoch in epochs:
            begins = self._epoch(epoch)[1] + epoch * self.tokens
            first = max(int(np.searchsorted(begins, start, side="right")) - 1, 0)
            last = int(np.searchsorted(begins[:-1], stop, side="left"))
            for group in range(first, last):
                if begins[group] < begins[group + 1]:
                    found.append(_clip(self._group(epoch, group), start, stop))
        return Segments(
            np.concatenate([run.start for run in found]),
            np.concatenate([run.file for run in found]),
            np.concatenate([run.offset for run in found]),
            found[-1].stop,
        )


def _clip(runs: Segments, start: int, stop: int) -> Segments:
    """The runs that touch [start, stop)."""
    first = max(int(np.searchsorted(runs.start, start, side="right")) - 1, 0)
    last = int(np.searchsorted(runs.start, stop, side="left"))
    end = runs.stop if last == len(runs.start) else int(runs.start[last])
    return Segments(runs.start[first:last], runs.file[first:last], runs.offset[first:last], end)


STRADDLES = -1
"""In place of an offset: the row runs across several segments."""


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of one window in the order they are drawn; arrays of the window's length."""

    row: np.ndarray
    """Row number within the source's stream, int64."""
    file: np.ndarray
    """File in which the row begins, int64."""
    offset: np.ndarray
    """Where in that file it begins, int64; STRADDLES when it does not lie in one run."""
    runs: Segments
    """What the window covers, for the rows that straddle."""


class SourceRows:
    """Rows of one source in the order they are drawn; of `limit` rows, where there is one."""

    def __init__(
        self, stream: TokenStream, *, seq_len: int, window: int, seed: int, limit: int | None = None
    ) -> None:
        if stream.tokens < seq_len + 1:
            raise DataError(
                f"source {stream.source!r} has {stream.tokens:,} tokens, fewer than one row of {seq_len} + 1;"
                " build more of it, shorten data.seq_len, or leave it out of data.mixture"
            )
        self.stream = stream
        self._seq_len, self._window_rows, self._seed, self._limit = seq_len, window, seed, limit
        self._window = lru_cache(maxsize=2)(self._build_window)

    def _build_window(self, window: int) -> Window:
        seq_len, first = self._seq_len, window * self._window_rows
        size = self._window_rows if self._limit is None else min(self._window_rows, self._limit - first)
        runs = self.stream.segments(first * seq_len, (first + size) * seq_len + 1)
        row = first + window_permutation(self._seed, self.stream.source, window, size)
        begin = row * seq_len
        run = np.searchsorted(runs.start, begin, side="right") - 1
        run_stop = np.append(runs.start[1:], runs.stop)[run]
        offset = runs.offset[run] + begin - runs.start[run]
        return Window(row, runs.file[run], np.where(begin + seq_len + 1 <= run_stop, offset, STRADDLES), runs)

    def locate(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, file, offset) of the rows drawn at numbers `drawn`, int64 [n]; see `Window` for the three."""
        row, file, offset = np.empty_like(drawn), np.empty_like(drawn), np.empty_like(drawn)
        number, place = np.divmod(drawn, self._window_rows)
        for window_number in np.unique(number).tolist():
            here = number == window_number
            window = self._window(window_number)
            row[here], file[here], offset[here] = (
                window.row[place[here]],
                window.file[place[here]],
                window.offset[place[here]],
            )
        return row, file, offset

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """Row number `row` as (file, offset, length) pieces, in order; for the rows that straddle."""
        runs = self._window(row // self._window_rows).runs
        begin, end = row * self._seq_len, (row + 1) * self._seq_len + 1
        run = int(np.searchsorted(runs.start, begin, side="right")) - 1
        found = []
        while begin < end:  # mostly twice; plain numbers, as arrays of two cost more than the copy of a row
            start = int(runs.start[run])
            stop = min(end, int(runs.start[run + 1]) if run + 1 < len(runs.start) else runs.stop)
            found.append((int(runs.file[run]), int(runs.offset[run]) + begin - start, stop - begin))
            begin, run = stop, run + 1
        return found
