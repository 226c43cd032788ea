"""One source's endless token stream, produced from its raw files; it can stop anywhere and go on from there.

The order is that of `packing`: epochs of files by key, groups of `interleave`, parts round-robin. `packing`
finds a position by arithmetic over shards; here the same tokens come one after another, and nothing about the
files need be known beforehand.

1. The files of a group are open side by side, each an iterator of its training documents.
2. The file whose turn it is gives documents until one ends a part: until its tokens pass a multiple of
   `part_tokens`, or the file ends. Then it is the next file's turn; files that have ended are passed over.
3. When all files of the group have ended the next group is opened, and after the last the next epoch.

What is needed to go on is small: epoch, group, whose turn it is, how much of the document in hand has been
given, and for each file of the group where reading has come to. A document given in part is read and encoded
again; nothing of it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.document import DataError
from data_pipeline.order import file_order, name_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlace:
    """How far one raw file has been read: past its first `line` lines, which end at byte `end`."""

    line: int = 0
    end: int = 0
    """Offset in the file's decompressed content."""
    lines: int = 0
    """Of them documents, bad lines and lines passed over; the rest are blank."""
    bad: int = 0
    tokens: int = 0
    """Training tokens they hold, end-of-document ids included."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One training document, and how far its file has been read after it; without ids: the end of the file."""

    ids: np.ndarray
    """1-D, its end-of-document id included."""
    line: int
    end: int
    lines: int
    bad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the files of an epoch that have ended hold together."""

    tokens: int = 0
    lines: int = 0
    bad: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceState:
    """Where a source's stream has come to; the default is its beginning."""

    epoch: int = 0
    group: int = 0
    turn: int = 0
    """Which file of the group is giving its part, or the next to be asked."""
    lead: int = 0
    """Tokens that its next document has given already."""
    places: Sequence[FilePlace | None] = ()
    """Of each file of the group; None for one that has ended. Empty: the group is not begun."""
    ended: Totals = Totals()
    """Of this epoch's files that have ended."""
    epoch_tokens: int | None = None
    """Length of an epoch, once one is over."""


OpenFile = Callable[[int, FilePlace], Generator[Taken, None, None]]


class LinearStream:
    """The stream of one source from `state` on.

    names: the files' stable keys. open_file: `open_file(i, place)` yields the training documents of file i from
    `place` on, and the end of the file last. end_epoch: told the totals of every epoch; it may refuse them.
    """

    def __init__(
        self,
        source: str,
        *,
        names: Sequence[str],
        open_file: OpenFile,
        seed: int,
        interleave: int,
        part_tokens: int,
        end_epoch: Callable[[Totals], None],
        state: SourceState = SourceState(),
    ) -> None:
        self.source = source
        self._names, self._keys = names, name_keys(names)
        self._open_file, self._end_epoch = open_file, end_epoch
        self._seed, self._interleave, self._part_tokens = seed, interleave, part_tokens
        self._ended, self._epoch_tokens = state.ended, state.epoch_tokens
        self._taken: Taken | None = None
        self._lead = state.lead
        self._epoch = state.epoch
        self._order = file_order(seed, source, state.epoch, self._keys)
        self._begin_group(state.group, state.places)
        self._turn = state.turn
        if not (0 <= state.turn < len(self._places) and any(self._places)):
            raise self._other_files()

    def state(self) -> SourceState:
        """Where the stream is now: a stream begun with it goes on with what `read` would give next."""
        return SourceState(
            epoch=self._epoch,
            group=self._group,
            turn=self._turn,
            lead=self._lead,
            places=tuple(self._places),
            ended=self._ended,
            epoch_tokens=self._epoch_tokens,
        )

    def read(self, out: np.ndarray) -> None:
        """Fill `out`, 1-D, with the next tokens."""
        filled = 0
        while filled < len(out):
            taken = self._taken or self._next_document()
            piece = taken.ids[self._lead : self._lead + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._lead += len(piece)
            self._taken = taken
            if self._lead == len(taken.ids):
                self._end_document(taken)

    def close(self) -> None:
        """Close the files that are open."""
        for reader in self._readers.values():
            reader.close()

    def _next_document(self) -> Taken:
        while True:
            place = self._places[self._turn]
            if place is None:
                self._next_turn()
                continue
            file = self._file(self._turn)
            if self._turn not in self._readers:
                self._readers[self._turn] = self._open_file(file, place)
            taken = next(self._readers[self._turn])
            if self._lead and self._lead >= len(taken.ids):
                raise DataError(
                    f"{self._names[file]} is not what it was when the spool was written: after line {place.line} there"
                    f" is no document of more than {self._lead} tokens; restore the file, or start a new run"
                )
            if len(taken.ids):
                return taken
            self._end_file(taken, tokens=place.tokens)

    def _end_document(self, taken: Taken) -> None:
        place = self._places[self._turn]
        assert place is not None
        tokens = place.tokens + len(taken.ids)
        self._places[self._turn] = FilePlace(
            line=taken.line, end=taken.end, lines=taken.lines, bad=taken.bad, tokens=tokens
        )
        self._taken, self._lead = None, 0
        if tokens // self._part_tokens > place.tokens // self._part_tokens:
            self._next_turn()

    def _end_file(self, taken: Taken, *, tokens: int) -> None:
        self._places[self._turn] = None
        self._readers.pop(self._turn).close()
        self._ended = Totals(
            tokens=self._ended.tokens + tokens,
            lines=self._ended.lines + taken.lines,
            bad=self._ended.bad + taken.bad,
        )
        if any(self._places):
            self._next_turn()
        elif (self._group + 1) * self._interleave < len(self._names):
            self._begin_group(self._group + 1)
        else:
            self._begin_epoch()

    def _next_turn(self) -> None:
        self._turn = (self._turn + 1) % len(self._places)

    def _begin_epoch(self) -> None:
        self._end_epoch(self._ended)
        self._epoch_tokens, self._ended = self._ended.tokens, Totals()
        self._epoch += 1
        self._order = file_order(self._seed, self.source, self._epoch, self._keys)
        self._begin_group(0)

    def _begin_group(self, group: int, places: Sequence[FilePlace | None] = ()) -> None:
        self._group, self._turn = group, 0
        files = self._order[group * self._interleave : (group + 1) * self._interleave]
        if len(files) == 0 or places and len(places) != len(files):
            raise self._other_files()
        self._places = list(places) or [FilePlace() for _ in files]
        self._readers: dict[int, Generator[Taken, None, None]] = {}

    def _file(self, turn: int) -> int:
        return int(self._order[self._group * self._interleave + turn])

    def _other_files(self) -> DataError:
        return DataError(
            f"the saved position of source {self.source!r} is of other files than the {len(self._names)} there are;"
            " restore them, or start a new run"
        )
