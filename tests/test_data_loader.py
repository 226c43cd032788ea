"""The loader: every world, every resume point, the end of a stream, every refusal."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from shard_sets import counting_documents, write_set
from small_set import HELD_OUT, SEQ_LEN, TRAIN, config

from data_pipeline.document import DataError
from data_pipeline.loader import Batch, Loader, check_position
from data_pipeline.stream import RowStream, open_stream


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), TRAIN, HELD_OUT)


class IndexRows:
    """A stream whose rows hold their own index: what is left is which rows the loader asks for."""

    seq_len = 2
    fingerprint = "index"
    order: dict[str, Any] = {}
    drawn_by: dict[str, Any] = {}

    def __init__(self, rows_total: int | None = None, rows_ahead: int | None = None) -> None:
        self.rows_total, self.rows_ahead = rows_total, rows_ahead
        self.asked: list[tuple[Any, ...]] = []
        self.released = 0
        self.furthest = 0

    def rows(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        assert out is not None
        self.furthest = max(self.furthest, int(indices[-1]) + 1 - self.released)
        out[:] = indices[:, None]
        return out

    def sources(self, indices: np.ndarray) -> np.ndarray:
        return indices % 2

    def seek(self, row: int, position: Mapping[str, Any]) -> None:
        self.asked.append(("seek", row, dict(position)))

    def release(self, row: int) -> None:
        self.asked.append(("release", row))
        self.released = row

    def position(self, row: int) -> dict[str, Any]:
        return {"at": row}


WORLDS = range(1, 9)


EPOCH_ROWS = 45


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of one source whose 275 tokens, document ends apart, all differ; an epoch is a little over 45 rows."""
    lengths = ([31, 7, 62], [90], [1, 1, 25, 50])
    starts = itertools.accumulate([100, *map(sum, lengths)])
    files = {f"f{i}": counting_documents(each, first) for i, (each, first) in enumerate(zip(lengths, starts))}
    return write_set(tmp_path_factory.mktemp("numbered"), {"pile": files})


Read = tuple[list[int], np.ndarray, list[dict[str, Any]]]


def read_world(stream: RowStream, world: int, until: int, state: dict[str, Any] | None) -> Read:
    """What all ranks of a world read from `state` to row `until` or a little further, in steps of a row a rank.

    Row indices in ascending order, their tokens, and the state after every step, the same on all ranks.
    """
    steps = -(-(until - (state["rows"] if state else 0)) // world)
    batches: list[Batch] = []
    states: list[list[dict[str, Any]]] = []
    for rank in range(world):
        with Loader(stream, rank=rank, world=world, batch_rows=world, micro_batch_size=1, state=state) as loader:
            states.append([])
            for _ in range(steps):
                batches += next(loader)
                states[-1].append(loader.state())
    assert all(of_rank == states[0] for of_rank in states)
    batches.sort(key=lambda batch: batch.row_start)
    return [batch.row_start for batch in batches], np.concatenate([b.tokens_BS1 for b in batches]), states[0]


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_goes_on_from_every_row_where_another_stopped(numbered: Path, world: int) -> None:
    """Stop `world` ranks after each step of an epoch, go on with 1 to 8: no row is read twice, none is lost."""
    stream = open_stream(config(numbered, mixture={"pile": 1}, shuffle_window=16))
    assert stream.source_tokens[0] // SEQ_LEN == EPOCH_ROWS
    expected = stream.rows(np.arange(EPOCH_ROWS + 2 * max(WORLDS)))
    indices, tokens, states = read_world(stream, world, EPOCH_ROWS, None)
    assert indices == list(range(len(indices))) and np.array_equal(tokens, expected[: len(indices)])
    for state in states:
        stopped = state["rows"]
        for other in WORLDS:
            until = max(EPOCH_ROWS, stopped + 1)  # from the end of the epoch, one step into the next
            after, tokens, _ = read_world(stream, other, until, state)
            assert indices[:stopped] + after == list(range(stopped + len(after)))
            assert np.array_equal(tokens, expected[stopped : stopped + len(after)])


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_goes_on_with_micro_batches_and_accumulation(world: int) -> None:
    # 840 rows divide by every world of 1..8; micro batches are the same groups of rows whoever computes them.
    state = None
    for step, micro in enumerate((1, 3, 5, 7)):
        micro = micro if 840 % (world * micro) == 0 else 1
        starts, rows = [], []
        for rank in range(world):
            with Loader(
                IndexRows(), rank=rank, world=world, batch_rows=840, micro_batch_size=micro, state=state
            ) as loader:
                for batch in next(loader):
                    starts.append(batch.row_start)
                    rows += batch.tokens_BS1[:, 0].tolist()
                end = loader.state()
        assert sorted(starts) == list(range(840 * step, 840 * (step + 1), micro))
        assert sorted(rows) == list(range(840 * step, 840 * (step + 1)))
        assert (end["step"], end["rows"]) == (step + 1, 840 * (step + 1))
        state = end


def test_a_stream_is_told_where_to_begin_and_what_is_not_needed_any_more() -> None:
    stream = IndexRows()
    with Loader(stream, rank=0, world=1, batch_rows=4, micro_batch_size=2) as loader:
        assert stream.asked == [], "a run that begins at row 0 seeks nothing"
        for _ in range(4):
            next(loader)
        state = loader.state()
    assert stream.asked == [("release", 0), ("release", 0), ("release", 4), ("release", 8)]
    assert state["position"] == {"at": 16}
    resumed = IndexRows()
    with Loader(resumed, rank=0, world=1, batch_rows=4, micro_batch_size=2, state=state) as loader:
        assert resumed.asked == [("seek", 16, {"at": 16})]
        assert next(loader)[0].row_start == 16
    del state["position"]  # a checkpoint from before there was any
    older = IndexRows()
    with Loader(older, rank=0, world=1, batch_rows=4, micro_batch_size=2, state=state):
        assert older.asked == [("seek", 16, {})]


def test_the_end_of_the_stream_ends_iteration_with_the_last_whole_step() -> None:
    with Loader(IndexRows(rows_total=14), rank=0, world=1, batch_rows=4, micro_batch_size=2) as loader:
        assert [step[0].row_start for step in loader] == [0, 4, 8]
        assert next(loader, None) is None
        assert loader.state()["rows"] == 12


@pytest.mark.parametrize(("rows_ahead", "together"), [(None, 64), (1032, 64), (1031, 63), (71, 3), (24, 1), (3, 1)])
def test_no_more_is_fetched_together_than_the_stream_has_room_for(rows_ahead: int | None, together: int) -> None:
    """By hand: of 71 rows 17 are whole steps of 4, less 2 that are kept; a quarter of these 15 is 3."""
    stream = IndexRows(rows_ahead=rows_ahead)
    with Loader(stream, rank=0, world=1, batch_rows=4, micro_batch_size=4) as loader:
        assert [next(loader)[0].row_start for _ in range(600)] == list(range(0, 2400, 4))
    assert stream.furthest <= 4 * (2 + 4 * together)


def test_tokens_are_handed_on_in_the_type_asked_for(made: Path) -> None:
    stream = open_stream(config(made))
    with Loader(stream, rank=0, world=1, batch_rows=4, micro_batch_size=4, dtype="int32") as loader:
        (batch,) = next(loader)
    assert batch.tokens_BS1.dtype == np.int32
    assert np.array_equal(batch.tokens_BS1, stream.rows(np.arange(4)))


def test_what_is_kept_of_a_batch_is_not_written_over() -> None:
    """Memory is used again when nobody holds it: neither a view nor a tensor on one."""
    kept: list[tuple[int, np.ndarray | torch.Tensor]] = []
    with Loader(IndexRows(), rank=0, world=1, batch_rows=4, micro_batch_size=2) as loader:
        for step in range(60):
            for batch in next(loader):
                if step % 3 == 0:
                    tokens = batch.tokens_BS1
                    kept.append((batch.row_start, tokens[:, 1:] if step % 2 else torch.from_numpy(tokens)[:, :-1]))
    del batch, tokens
    for row_start, view in kept:
        assert np.asarray(view).tolist() == [[row_start] * 2, [row_start + 1] * 2]


def test_micro_batches_are_fixed_groups_of_consecutive_rows(made: Path) -> None:
    # Step 2 of 8 rows begins at row 16; of micro batches of 2, rank 1 of 2 owns the second and the fourth.
    stream = open_stream(config(made))
    with Loader(stream, rank=1, world=2, batch_rows=8, micro_batch_size=2, start_step=2) as loader:
        batches = next(loader)
    assert [batch.row_start for batch in batches] == [18, 22]
    for batch in batches:
        indices = np.arange(batch.row_start, batch.row_start + 2)
        assert np.array_equal(batch.tokens_BS1, stream.rows(indices))
        assert np.array_equal(batch.source_B, stream.sources(indices))
        assert batch.tokens_BS1.dtype == np.int64 and batch.tokens_BS1.flags.writeable


def test_state_counts_what_was_consumed_not_what_was_fetched(made: Path) -> None:
    with Loader(open_stream(config(made)), rank=0, world=1, batch_rows=4, micro_batch_size=4) as loader:
        before = loader.state()
        assert (before["step"], before["rows"]) == (0, 0)
        next(loader)
        assert (loader.state()["step"], loader.state()["rows"]) == (1, 4)
        assert loader.state(steps_back=1) == before


def test_a_second_resume_goes_on_from_the_first(made: Path) -> None:
    stream = open_stream(config(made))
    state: dict[str, Any] | None = None
    starts = []
    for _ in range(3):
        with Loader(stream, rank=0, world=1, batch_rows=4, micro_batch_size=4, state=state) as loader:
            starts.append(next(loader)[0].row_start)
            state = loader.state()
    assert starts == [0, 4, 8]


def test_another_batch_size_continues_at_the_same_row(made: Path) -> None:
    stream = open_stream(config(made))
    with Loader(stream, rank=0, world=1, batch_rows=6, micro_batch_size=2) as loader:
        next(loader)
        state = loader.state()
    with Loader(stream, rank=0, world=1, batch_rows=4, micro_batch_size=4, state=state) as loader:
        assert next(loader)[0].row_start == 6
        assert (loader.state()["step"], loader.state()["rows"]) == (2, 10)


def test_another_order_of_rows_is_refused_by_name(made: Path) -> None:
    with Loader(open_stream(config(made)), rank=0, world=1, batch_rows=4, micro_batch_size=4) as loader:
        state = loader.state()
    message = (
        "the checkpoint was trained on another order of rows: interleave was 2 and is 3; seed was 5 and is 6."
        " Resume with the data and settings it was trained on, or start a new run in another folder (--run-dir)"
    )
    other = open_stream(config(made, seed=6, interleave=3))
    with pytest.raises(DataError, match=re.escape(message)):
        Loader(other, rank=0, world=1, batch_rows=4, micro_batch_size=4, state=state)
    with pytest.raises(DataError, match="the saved data position is none that Loader.state"):
        Loader(other, rank=0, world=1, batch_rows=4, micro_batch_size=4, state={})


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"world": 4, "batch_rows": 24, "micro_batch_size": 4},
            (
                "batch of 24 rows is not divisible by micro_batch_size 4 x world 4 = 16; use 16 or 32 rows "
                "(train.batch_tokens = rows x data.seq_len)"
            ),
        ),
        ({"world": 4, "batch_rows": 3}, "micro_batch_size 1 x world 4 = 4; use 4 rows"),
        ({"rank": 2, "world": 2}, "rank 2 is not in a world of 2; ranks are 0 to 1"),
        ({"micro_batch_size": 0}, "micro_batch_size 0 must all be at least 1"),
    ],
)
def test_layouts_that_do_not_fit(made: Path, layout: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        Loader(
            open_stream(config(made)),
            **{"rank": 0, "world": 1, "batch_rows": 4, "micro_batch_size": 1, **layout},
        )


def test_an_error_in_the_thread_reaches_the_consumer(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    stream = open_stream(config(copy))
    for path in (copy / "shards").rglob("*.train"):
        path.unlink()
    with Loader(stream, rank=0, world=1, batch_rows=4, micro_batch_size=4) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match="is missing; run `moepp-data build` again"):
                next(loader)


def test_close_ends_thread_and_iteration(made: Path) -> None:
    before = threading.active_count()
    loader = Loader(open_stream(config(made)), rank=0, world=1, batch_rows=4, micro_batch_size=4)
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    assert list(loader) == []


STAGES = [{"mixture": {"dolma": 1, "pile": 1}, "tokens": 60}, {"mixture": {"pile": 1}}]


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"max_epochs": 2}, {"max_epochs": 3}, "data.max_epochs was 2.0 and is 3.0."),
        ({}, {"max_epochs": {"pile": 3}}, 'data.max_epochs was null and is {"pile": 3.0}.'),
        (
            {"max_epochs": 2},
            {"max_epochs": 2, "on_max_epochs": "reweight", "seed": 6},
            'data.on_max_epochs was "stop" and is "reweight"; seed was 5 and is 6.',
        ),
        (
            {"mixture": {"dolma": 7, "pile": 3}},
            {"mixture": None, "stages": STAGES},
            'data.mixture was {"dolma": 7, "pile": 3} and is null; data.stages was null and is [{"mixture": {"dolma":'
            ' 1, "pile": 1}, "tokens": 60}, {"mixture": {"pile": 1}, "tokens": null}].',
        ),
    ],
)
def test_other_stages_and_limits_are_refused_in_the_words_of_the_recipe(
    made: Path, before: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    with Loader(open_stream(config(made, **before)), rank=0, world=1, batch_rows=4, micro_batch_size=4) as loader:
        state = orjson.loads(orjson.dumps(loader.state()))
    with pytest.raises(DataError, match=re.escape(f"another order of rows: {said} Resume with")):
        check_position(state, open_stream(config(made, **now)))


def test_a_checkpoint_that_does_not_say_its_recipe_tells_limits_in_rows(made: Path) -> None:
    one, other = (open_stream(config(made, max_epochs=epochs)) for epochs in (2, 3))
    state = {"step": 1, "rows": 4, "fingerprint": one.fingerprint, "order": one.order}
    said = 'data.max_epochs, in rows, was {"dolma": 28, "pile": 6} and is {"dolma": 43, "pile": 9}; the end of the'
    with pytest.raises(DataError, match=re.escape(said)):
        check_position(state, other)
