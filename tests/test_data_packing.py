"""Packing: a source's endless stream and its rows against a slow oracle in plain Python lists.

The oracle shares no code with its subject but the keyed order of files and of rows (tested in
test_data_order).
"""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from data_pipeline.document import DataError
from data_pipeline.order import file_order, name_keys, window_permutation
from data_pipeline.packing import STRADDLES, SourceRows, TokenStream

File = list[list[int]]
"""A file as its parts, each a list of token ids."""


def make_files(rng: random.Random, count: int, most_parts: int = 5, longest: int = 7) -> dict[str, File]:
    """Files with unequal parts; every token of the source has an id of its own. The first file is empty."""
    ids = iter(range(10**6))
    files: dict[str, File] = {"empty": []}
    for number in range(count):
        parts = rng.randint(1, most_parts)
        files[f"f{number}"] = [[next(ids) for _ in range(rng.randint(1, longest))] for _ in range(parts)]
    return files


def oracle_epoch(files: dict[str, File], *, source: str, seed: int, epoch: int, interleave: int) -> list[int]:
    names = list(files)
    ordered = [names[i] for i in file_order(seed, source, epoch, name_keys(names))]
    stream: list[int] = []
    while ordered:
        group, ordered = ordered[:interleave], ordered[interleave:]
        queues = [list(files[name]) for name in group]
        while any(queues):
            for queue in queues:
                if queue:
                    stream += queue.pop(0)
    return stream


def oracle_stream(files: dict[str, File], length: int, **order: object) -> list[int]:
    stream: list[int] = []
    epoch = 0
    while len(stream) < length:
        stream += oracle_epoch(files, epoch=epoch, **order)  # type: ignore[arg-type]
        epoch += 1
    return stream


def open_files(files: dict[str, File], *, seed: int, interleave: int, first_file: int = 0) -> TokenStream:
    parts = list(files.values())
    return TokenStream(
        "made",
        names=list(files),
        tokens=np.array([sum(map(len, file)) for file in parts]),
        read_cuts=lambda file: np.cumsum([len(part) for part in parts[file - first_file]], dtype=np.uint64),
        seed=seed,
        interleave=interleave,
        first_file=first_file,
    )


def read(
    files: dict[str, File], stream: TokenStream, start: int, stop: int, first_file: int = 0
) -> list[int]:
    """Tokens of a stretch of the stream, through its segments."""
    flat = [[token for part in file for token in part] for file in files.values()]
    runs = stream.segments(start, stop)
    ends = [*runs.start[1:].tolist(), runs.stop]
    tokens: list[int] = []
    for begin, end, file, offset in zip(runs.start.tolist(), ends, runs.file.tolist(), runs.offset.tolist()):
        assert begin < stop and end > start, "only runs that touch the stretch"
        tokens += flat[file - first_file][offset : offset + end - begin]
    return tokens[start - int(runs.start[0]) :][: stop - start]


@pytest.mark.parametrize("interleave", [1, 2, 3, 64])
def test_any_stretch_of_the_stream_is_the_oracle_s(interleave: int) -> None:
    files = make_files(random.Random(interleave), 6)
    stream = open_files(files, seed=4, interleave=interleave, first_file=100)
    length = 7 * stream.tokens
    expected = oracle_stream(files, length, source="made", seed=4, interleave=interleave)
    for start in range(0, length - 1):
        for size in (1, 2, 13, stream.tokens, 2 * stream.tokens + 3, 4 * stream.tokens):  # more than a few epochs too
            stop = min(start + size, length)
            assert read(files, stream, start, stop, first_file=100) == expected[start:stop]


def test_an_epoch_holds_every_token_once_and_epochs_differ() -> None:
    files = make_files(random.Random(0), 9)
    stream = open_files(files, seed=0, interleave=4)
    epochs = [read(files, stream, e * stream.tokens, (e + 1) * stream.tokens) for e in range(6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(stream.tokens))
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_parts_go_round_robin_by_hand() -> None:
    # One group: first parts of all, then second parts, then the third of the one file that has it.
    files = {"a": [[1, 2], [3]], "b": [[4], [5, 6], [7]], "c": [[8]]}
    order = [list(files)[i] for i in file_order(0, "made", 0, name_keys(list(files)))]
    expected = [
        token for turn in range(3) for name in order if turn < len(files[name]) for token in files[name][turn]
    ]
    stream = open_files(files, seed=0, interleave=3)
    assert read(files, stream, 0, 8) == expected


@pytest.mark.parametrize(("seq_len", "window"), [(1, 1), (3, 4), (5, 16), (2, 100), (11, 7)])
def test_rows_and_their_order_are_the_oracle_s(seq_len: int, window: int) -> None:
    files = make_files(random.Random(seq_len), 5)
    flat = [[token for part in file for token in part] for file in files.values()]
    stream = open_files(files, seed=2, interleave=2)
    rows = SourceRows(stream, seq_len=seq_len, window=window, seed=2)
    count = max(3 * window, 40)
    expected = oracle_stream(files, (count + window) * seq_len + 1, source="made", seed=2, interleave=2)
    numbers, file, offset = rows.locate(np.arange(count))
    straddled = 0
    for drawn in range(count):
        row = (
            drawn
            - drawn % window
            + int(window_permutation(2, "made", drawn // window, window)[drawn % window])
        )
        assert numbers[drawn] == row
        tokens = [token for f, o, n in rows.pieces(row) for token in flat[f][o : o + n]]
        assert tokens == expected[row * seq_len : (row + 1) * seq_len + 1]
        if offset[drawn] == STRADDLES:
            straddled += 1
            assert len(rows.pieces(row)) > 1
        else:
            at = int(offset[drawn])
            assert tokens == flat[int(file[drawn])][at : at + seq_len + 1]
    assert straddled


def test_every_token_but_the_first_is_a_target_exactly_once() -> None:
    # Positions of the stream stand for its tokens; three windows cover several epochs.
    files = make_files(random.Random(7), 3)
    stream = open_files(files, seed=0, interleave=2)
    seq_len, window = 4, 8
    rows = SourceRows(stream, seq_len=seq_len, window=window, seed=0)
    numbers, _, _ = rows.locate(np.arange(3 * window))
    targets = sorted(row * seq_len + 1 + t for row in numbers.tolist() for t in range(seq_len))
    assert targets == list(range(1, 3 * window * seq_len + 1))
    assert 3 * window * seq_len > 2 * stream.tokens


def test_locating_is_a_function_of_the_number() -> None:
    files = make_files(random.Random(3), 5)

    def fresh() -> SourceRows:
        return SourceRows(open_files(files, seed=1, interleave=2), seq_len=3, window=5, seed=1)

    together = np.stack(fresh().locate(np.arange(60)))
    one_by_one = fresh()
    for drawn in random.Random(0).sample(range(60), 60):
        assert np.array_equal(np.stack(one_by_one.locate(np.array([drawn])))[:, 0], together[:, drawn])


def test_far_rows_need_no_walk() -> None:
    # Row 10^15 of a source of a few tokens: epochs are divided out, not stepped through.
    files = make_files(random.Random(3), 5)
    stream = open_files(files, seed=1, interleave=2)
    rows = SourceRows(stream, seq_len=3, window=5, seed=1)
    far = 10**15
    number, _, _ = rows.locate(np.array([far]))
    assert abs(int(number[0]) - far) < 5
    flat = [[token for part in file for token in part] for file in files.values()]
    tokens = [token for f, o, n in rows.pieces(int(number[0])) for token in flat[f][o : o + n]]
    epoch, at = divmod(int(number[0]) * 3, stream.tokens)
    both: list[int] = []
    for number_of_epoch in (epoch, epoch + 1):
        both += oracle_epoch(files, source="made", seed=1, epoch=number_of_epoch, interleave=2)
    assert tokens == both[at : at + 4]


def test_a_source_without_tokens_is_refused() -> None:
    message = "source 'made' has no tokens; leave it out of data.mixture or build more of it"
    with pytest.raises(DataError, match=re.escape(message)):
        open_files({"a": [], "b": []}, seed=0, interleave=1)


def test_a_source_shorter_than_a_row_is_refused_and_one_just_long_enough_is_not() -> None:
    stream = open_files({"a": [[1, 2, 3]], "b": [[4]]}, seed=0, interleave=1)
    message = (
        "source 'made' has 4 tokens, fewer than one row of 4 + 1; build more of it, shorten data.seq_len, or"
        " leave it out of data.mixture"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        SourceRows(stream, seq_len=4, window=2, seed=0)
    SourceRows(stream, seq_len=3, window=2, seed=0).locate(np.arange(10))


def test_cuts_that_do_not_add_up_are_found() -> None:
    stream = TokenStream(
        "made",
        names=["a"],
        tokens=np.array([5]),
        read_cuts=lambda file: np.array([4], dtype=np.uint64),
        seed=0,
        interleave=1,
    )
    with pytest.raises(DataError, match="the part cuts of its shards do not add up to their tokens"):
        stream.segments(0, 1)


def test_a_limited_source_gives_its_first_rows_and_no_other() -> None:
    # 13 rows in windows of 5: two whole windows, and one of 3 in which rows 10, 11 and 12 are permuted.
    files = make_files(random.Random(3), 5)
    stream = open_files(files, seed=1, interleave=2)
    free = SourceRows(stream, seq_len=3, window=5, seed=1)
    limited = SourceRows(stream, seq_len=3, window=5, seed=1, limit=13)
    assert all(np.array_equal(*both) for both in zip(free.locate(np.arange(10)), limited.locate(np.arange(10))))
    row, _, _ = limited.locate(np.arange(13))
    assert sorted(row.tolist()) == list(range(13))
    assert (row[10:] - 10).tolist() == window_permutation(1, "made", 2, 3).tolist()


@pytest.mark.parametrize("parts", [4, 400])
def test_locating_far_away_is_as_much_work_as_at_the_start(parts: int) -> None:
    """Cuts read and runs laid out for one window, of a source longer and of one much shorter than the window."""
    files = {f"f{number}": [[0] * 50] * parts for number in range(12)}

    def work(first: int) -> tuple[int, int]:
        read: list[int] = []

        def cuts(file: int) -> np.ndarray:
            read.append(file)
            return np.arange(50, 50 * parts + 1, 50, dtype=np.uint64)

        tokens = np.full(12, 50 * parts)
        stream = TokenStream("made", names=list(files), tokens=tokens, read_cuts=cuts, seed=0, interleave=12)
        rows = SourceRows(stream, seq_len=16, window=1024, seed=0)
        rows.locate(np.arange(first, first + 8))
        return len(read), len(rows._window(first // 1024).runs.start)

    start, far = work(0), work(10**9 // 1024 * 1024)
    assert far[0] <= 2 * start[0] <= 24
    assert abs(far[1] - start[1]) <= 2
