"""Batches for one rank: which rows of the global batch are its own, fetched ahead of training by one thread.

    global batch s     rows  first + sB ... first + (s+1)B - 1          B = batch_rows, whatever the world
    micro batch m      rows  first + sB + m*b ... + b - 1               b = micro_batch_size
    rank r of W        micro batches  m = a*W + r                       a = 0 ... B / (b W) - 1, accumulation

A micro batch is the same group of rows in every layout; only who computes it changes. The position is the
number of rows consumed, so a resume is an index: nothing is replayed, and the world may differ.

One thread in this process is enough (rows are slices of memory maps). It runs a little ahead; what it has
fetched and training has not taken does not count as consumed. Rows are released once every rank must have them:
ranks take their steps together, so none is more than a step behind.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np

from data_pipeline.document import DataError
from data_pipeline.row_source import Rows
from data_pipeline.weights import as_written

FETCHED_ROWS = 256
"""Rows that are fetched together, where as many or more are not one step: handing over costs as much as 50 rows.
Fewer where the stream cannot be asked so far ahead."""
AHEAD = 2
"""So many fetches are kept ready."""
RELEASED_AFTER_STEPS = 2
"""Steps that are kept behind the last one taken."""


@dataclass(frozen=True)
class Batch:
    """One micro batch."""

    tokens_BS1: np.ndarray
    """int64 or int32 [micro_batch_size, S + 1]: inputs are [:, :-1], targets [:, 1:]."""
    row_start: int
    """Index in the stream of its first row; the others follow it."""
    source_B: np.ndarray
    """int64 [micro_batch_size]: index into `RowStream.source_names`."""


class Loader:
    """Iterates over steps; a step is a list of this rank's micro batches, one per accumulation.

    Start afresh at `start_step`, or where `state` (of `state()`, from any rank of any world) says. It ends with
    the last whole step where the stream has an end. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        stream: Rows,
        *,
        rank: int,
        world: int,
        batch_rows: int,
        micro_batch_size: int,
        start_step: int = 0,
        state: Mapping[str, Any] | None = None,
        dtype: Literal["int64", "int32"] = "int64",
    ) -> None:
        self._check_layout(rank, world, batch_rows, micro_batch_size)
        self._stream = stream
        self._rank, self._world = rank, world
        self._batch_rows, self._micro = batch_rows, micro_batch_size
        self._step, self._row = start_step, start_step * batch_rows
        if state is not None:
            self._step, self._row = check_position(state, stream)
        if self._row:
            stream.seek(self._row, (state or {}).get("position", {}))
        rows = batch_rows // world
        self._together = self._steps_together(rows)
        self._memory = _Memory((self._together * rows, stream.seq_len + 1), np.dtype(dtype))
        self._ready: queue.Queue[list[list[Batch]] | BaseException] = queue.Queue(maxsize=AHEAD)
        self._at_hand: deque[list[Batch]] = deque()
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._fetch, args=(self._row,), name="data-prefetch", daemon=True
        )
        self._thread.start()

    @staticmethod
    def _check_layout(rank: int, world: int, batch_rows: int, micro_batch_size: int) -> None:
        if min(world, batch_rows, micro_batch_size) < 1:
            raise DataError(
                f"world {world}, batch of {batch_rows} rows and micro_batch_size {micro_batch_size} must all"
                " be at least 1"
            )
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} is not in a world of {world}; ranks are 0 to {world - 1}")
        unit = micro_batch_size * world
        if batch_rows % unit:
            below, above = batch_rows // unit * unit, -(-batch_rows // unit) * unit
            valid = f"{below} or {above}" if below else f"{above}"
            raise DataError(
                f"batch of {batch_rows} rows is not divisible by micro_batch_size {micro_batch_size} x world"
                f" {world} = {unit}; use {valid} rows (train.batch_tokens = rows x data.seq_len)"
            )

    def _steps_together(self, rows: int) -> int:
        """Most steps in one fetch, of each of which `rows` rows are this rank's; no more than the stream has room for.

        Between the first row that is not released and the last that is asked for lie the steps kept behind, the
        fetch that is at hand, those kept ready, and the one on its way.
        """
        together = FETCHED_ROWS // rows
        if self._stream.rows_ahead is not None:
            room = self._stream.rows_ahead // self._batch_rows - RELEASED_AFTER_STEPS
            together = min(together, room // (AHEAD + 2))
        return max(together, 1)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Batch]:
        if self._closing.is_set():
            raise StopIteration
        if not self._at_hand:
            ready = self._failure or self._ready.get()
            if isinstance(ready, BaseException):
                self._failure = ready
                raise ready
            self._at_hand.extend(ready)
        self._step += 1
        self._row += self._batch_rows
        self._stream.release(max(self._row - RELEASED_AFTER_STEPS * self._batch_rows, 0))
        return self._at_hand.popleft()

    def state(self, *, steps_back: int = 0) -> dict[str, Any]:
        """For a checkpoint, in JSON values: steps and rows consumed, and what the rows' order depends on.

        steps_back: as it was so many steps ago, of those consumed here; at most `RELEASED_AFTER_STEPS`.
        """
        row = self._row - steps_back * self._batch_rows
        return {
            "step": self._step - steps_back,
            "rows": row,
            "position": self._stream.position(row),
            "fingerprint": self._stream.fingerprint,
            "order": dict(self._stream.order),
            "drawn_by": dict(self._stream.drawn_by),
        }

    def close(self) -> None:
        """Stop fetching and wait for the thread; iteration ends."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fetch(self, first_row: int) -> None:
        """The thread: put steps into the queue until closed, one at first; an error goes the same way."""
        try:
            end, steps = self._stream.rows_total, 1
            while not self._closing.is_set():
                if end is not None:
                    steps = min(steps, (end - first_row) // self._batch_rows)
                if steps <= 0:
                    self._ready.put(StopIteration())
                    return
                self._ready.put(self._batches(first_row, steps))
                first_row += steps * self._batch_rows
                steps = min(2 * steps, self._together)
        except BaseException as error:  # handed to the consumer, who raises it
            self._ready.put(error)

    def _batches(self, first_row: int, steps: int) -> list[list[Batch]]:
        micro = self._micro
        first_of_step = first_row + np.arange(steps)[:, None] * self._batch_rows
        starts = first_of_step + np.arange(self._rank * micro, self._batch_rows, micro * self._world)
        indices = (starts[..., None] + np.arange(micro)).ravel()
        tokens = self._stream.rows(indices, out=self._memory.lend()[: len(indices)])
        sources = self._stream.sources(indices)
        cuts = range(0, len(indices), micro)
        micro_batches = [
            Batch(tokens[cut : cut + micro], start, sources[cut : cut + micro])
            for cut, start in zip(cuts, starts.ravel().tolist())
        ]
        accumulation = starts.shape[1]
        return [micro_batches[cut : cut + accumulation] for cut in range(0, len(micro_batches), accumulation)]


class _Memory:
    """Arrays for rows, lent out again when nobody holds them: to clear new pages costs as much as to fill them."""

    def __init__(self, shape: tuple[int, int], dtype: np.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self._free: list[np.ndarray] = []

    def lend(self) -> np.ndarray:
        """An array, not cleared; it, its views and the tensors on them may be kept for any time."""
        array = self._free.pop() if self._free else np.empty(self._shape, dtype=self._dtype)
        return np.asarray(_Lease(array, self._free))


class _Lease:
    """What every view of a lent array has as its base; with the last of them it goes, and gives the array back."""

    def __init__(self, array: np.ndarray, free: list[np.ndarray]) -> None:
        self.__array_interface__ = array.__array_interface__
        self._array, self._free = array, free

    def __del__(self) -> None:
        self._free.append(self._array)


def check_position(state: Mapping[str, Any], stream: Rows) -> tuple[int, int]:
    """(step, rows) of a saved state; DataError unless it is of the same order of rows."""
    try:
        step, rows, fingerprint, order, drawn_by = (
            int(state["step"]),
            int(state["rows"]),
            state["fingerprint"],
            dict(state["order"]),
            dict(state.get("drawn_by", stream.drawn_by)),  # older checkpoints do not say it
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the saved data position is none that Loader.state() made ({error!r}); resume from another checkpoint"
        ) from None
    if fingerprint != stream.fingerprint:
        changed, asked = _changes(order, stream.order), _changes(drawn_by, stream.drawn_by)
        if asked and changed.keys() & _MADE_OF_RECIPE.keys():  # the recipe's words tell more than what was made of them
            changed = asked | {name: said for name, said in changed.items() if name not in _MADE_OF_RECIPE}
        raise DataError(
            "the checkpoint was trained on another order of rows:"
            f" {'; '.join(changed.values()) or 'its fingerprint differs'}. Resume with the data and settings it was"
            " trained on, or start a new run in another folder (--run-dir)"
        )
    return step, rows


_MADE_OF_RECIPE = {
    "mixture": "data.mixture, in slots,",
    "stages": "data.stages, as first rows and slots,",
    "limits": "data.max_epochs, in rows,",
    "rows_total": "the end of the stream by data.max_epochs and data.on_max_epochs, in rows,",
}
"""Names in `Rows.order` that no recipe has, in the words of one."""


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs, by name, in words."""
    return {
        name: f"{_MADE_OF_RECIPE.get(name, name)} was {_short(before.get(name))} and is {_short(now.get(name))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }


def _short(value: object) -> str:
    text = as_written(value)
    return text if len(text) <= 240 else text[:237] + "..."
