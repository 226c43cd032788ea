"""Stream and loader on small shard sets: rows against an oracle, every world, every resume point, every
refusal."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_sets import EOS, counting_documents, write_set, write_shard

from data_pipeline.config import DataConfig
from data_pipeline.document import DataError
from data_pipeline.loader import Batch, Loader
from data_pipeline.manifest import read_manifest, shard_path
from data_pipeline.order import file_order, name_keys, window_permutation
from data_pipeline.shards import Shard
from data_pipeline.stream import open_held_out, open_stream

SEQ_LEN = 6
TRAIN = {
    "dolma/wiki": {
        "w0": counting_documents([3, 0, 9, 2], 100),
        "w1": counting_documents([20], 150),
        "w2": counting_documents([1, 1], 180),
    },
    "dolma/books": {"b0": counting_documents([30, 11], 200)},
    "pile": {"p0": counting_documents([4, 4, 4], 300), "p1": counting_documents([2], 350), "p2": []},
    "unused": {"u0": counting_documents([5], 400)},
}
HELD_OUT = {"dolma/wiki": {"w0": [[500, 501]], "w1": [[502, 503, 504]]}, "unused": {"u0": [[505]]}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), TRAIN, HELD_OUT)


def config(root: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"mixture": {"dolma": 0.7, "pile": 0.3}, "seq_len": SEQ_LEN, "seed": 5}
    return DataConfig(path=str(root), **{**values, "shuffle_window": 8, "interleave": 2, **changes})


def oracle_rows(root: Path, settings: DataConfig, names: dict[str, list[str]], count: int) -> list[list[int]]:
    """The first `count` rows in plain lists: sources by the fractional rule's counts, streams by
    concatenation."""
    streams: dict[str, list[int]] = {}
    for source, keys in names.items():
        flat: list[int] = []
        epoch = 0
        while len(flat) < (count + settings.shuffle_window + 1) * settings.seq_len + 1:
            ordered = [keys[i] for i in file_order(settings.seed, source, epoch, name_keys(keys))]
            for start in range(0, len(ordered), settings.interleave):
                queues = [parts_of(root, key) for key in ordered[start : start + settings.interleave]]
                for turn in itertools.zip_longest(*queues, fillvalue=[]):
                    flat += [token for part in turn for token in part]
            epoch += 1
        streams[source] = flat
    rows, drawn = [], dict.fromkeys(names, 0)
    order = open_stream(settings)
    for index in range(count):
        source = order.source_names[int(order.sources([index])[0])]
        window, place = divmod(drawn[source], settings.shuffle_window)
        permutation = window_permutation(settings.seed, source, window, settings.shuffle_window)
        begin = (window * settings.shuffle_window + int(permutation[place])) * settings.seq_len
        rows.append(streams[source][begin : begin + settings.seq_len + 1])
        drawn[source] += 1
    return rows


def parts_of(root: Path, key: str) -> list[list[int]]:
    path = shard_path(root, key, "train")
    if not path.exists():
        return []
    shard = Shard(path)
    starts = [0, *shard.cuts.tolist()]
    return [shard.tokens[a:b].tolist() for a, b in zip(starts, starts[1:])]


CLAIMED = {"dolma": ["made/b0", "made/w0", "made/w1", "made/w2"], "pile": ["made/p0", "made/p1", "made/p2"]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interleave": 64},
        {"shuffle_window": 1},
        {"seq_len": 1},
        {"seq_len": 17},
        {"sampling": "random"},
        {"seed": 0},
    ],
)
def test_rows_are_the_oracle_s(made: Path, changes: dict[str, Any]) -> None:
    settings = config(made, **changes)
    stream = open_stream(settings)
    rows = stream.rows(np.arange(150))
    assert rows.dtype == np.int64 and rows.shape == (150, settings.seq_len + 1)
    assert rows.tolist() == oracle_rows(made, settings, CLAIMED, 150)


def test_rows_in_any_order_and_across_blocks(made: Path) -> None:
    stream = open_stream(config(made))
    indices = np.array([5000, 3, 2047, 2048, 3, 10_000, 0])
    together = stream.rows(indices)
    for place, index in enumerate(indices.tolist()):
        assert np.array_equal(open_stream(config(made)).rows([index])[0], together[place])
    assert stream.rows([]).shape == (0, SEQ_LEN + 1)
    with pytest.raises(DataError, match="row indices must be a flat list of numbers >= 0"):
        stream.rows([-1])


def test_two_runs_over_the_same_shards_agree_and_a_seed_changes_rows_alone(made: Path) -> None:
    one, same, other = (open_stream(config(made, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(one.rows(np.arange(100)), same.rows(np.arange(100)))
    assert not np.array_equal(one.rows(np.arange(100)), other.rows(np.arange(100)))
    assert np.array_equal(one.sources(np.arange(100)), other.sources(np.arange(100)))


def test_stream_tells_about_its_sources(made: Path) -> None:
    stream = open_stream(config(made))
    assert stream.source_names == ["dolma", "pile"]
    assert stream.source_tokens == [(14 + 4) + 21 + 4 + (41 + 2), 15 + 3]
    assert (stream.tokenizer.vocab_size, stream.tokenizer.eos_id) == (1000, EOS)


def test_fingerprint_depends_on_what_the_order_depends_on(made: Path) -> None:
    base = open_stream(config(made)).fingerprint
    assert base == open_stream(config(made)).fingerprint
    assert base == open_stream(config(made, mixture={"pile": 3, "dolma": 7})).fingerprint
    for change in (
        {"seed": 6},
        {"seq_len": 5},
        {"shuffle_window": 9},
        {"interleave": 3},
        {"sampling": "random"},
        {"mixture": {"dolma": 0.6, "pile": 0.4}},
    ):
        assert open_stream(config(made, **change)).fingerprint != base  # type: ignore[arg-type]


def step_rows(batches: list[Batch]) -> dict[int, list[int]]:
    """Row index -> tokens of everything in one step of one rank."""
    return {
        batch.row_start + place: row
        for batch in batches
        for place, row in enumerate(batch.tokens_BS1.tolist())
    }


class IndexRows:
    """A stream whose rows hold their own index: what is left is which rows the loader asks for."""

    fingerprint = "index"
    order: dict[str, Any] = {}

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return np.repeat(indices[:, None], 3, axis=1)

    def sources(self, indices: np.ndarray) -> np.ndarray:
        return indices % 2


def one_step(world: int, micro: int, state: dict[str, Any] | None) -> tuple[list[int], dict[str, Any]]:
    """Indices that all ranks of a world read in one step of 840 rows, sorted, and the state they all end
    with."""
    indices: list[int] = []
    states = []
    for rank in range(world):
        with Loader(
            IndexRows(), rank=rank, world=world, batch_rows=840, micro_batch_size=micro, state=state
        ) as loader:
            for batch in next(loader):
                assert batch.tokens_BS1[:, 0].tolist() == list(range(batch.row_start, batch.row_start + micro))
                indices += batch.tokens_BS1[:, 0].tolist()
            states.append(loader.state())
    assert all(state == states[0] for state in states)
    return sorted(indices), states[0]


def test_every_world_continues_every_other() -> None:
    # 840 rows divide by every world of 1..8: no row is read twice and none is left out, whoever goes on.
    for first in range(1, 9):
        indices, state = one_step(first, 5 if first in (1, 2, 4, 6) else 1, None)
        assert indices == list(range(840))
        for second in range(1, 9):
            indices, end = one_step(second, 3 if second in (4, 5, 8) else 1, state)
            assert indices == list(range(840, 1680))
            assert (end["step"], end["rows"]) == (2, 1680)


def test_every_resume_point_of_a_small_epoch(made: Path) -> None:
    # 12 rows a step; more steps than an epoch of the larger source has. Stop after any of them, go on in
    # another world.
    stream = open_stream(config(made))
    steps = 20
    assert steps * 12 * SEQ_LEN > sum(stream.source_tokens)
    expected = dict(enumerate(stream.rows(np.arange((steps + 1) * 12)).tolist()))

    def run(
        world: int, count: int, state: dict[str, Any] | None
    ) -> tuple[dict[int, list[int]], dict[str, Any]]:
        rows: dict[int, list[int]] = {}
        for rank in range(world):
            with Loader(
                stream, rank=rank, world=world, batch_rows=12, micro_batch_size=2, state=state
            ) as loader:
                for _ in range(count):
                    rows |= step_rows(next(loader))
                end = loader.state()
        return rows, end

    for stop in range(1, steps):
        before, state = run(1 + stop % 3, stop, None)
        after, _ = run((1, 2, 3, 6)[stop % 4], steps - stop, state)
        assert len(before) + len(after) == steps * 12
        assert before | after == {row: expected[row] for row in range(steps * 12)}


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
        assert (loader.state()["step"], loader.state()["rows"]) == (0, 0)
        next(loader)
        assert (loader.state()["step"], loader.state()["rows"]) == (1, 4)


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


def test_bad_sets_are_refused_when_opened(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no shard set: manifest.json is missing"):
        open_stream(config(tmp_path))
    copy = shutil.copytree(made, tmp_path / "copy")
    shard = shard_path(copy, "made/w1", "train")
    original = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match="w1.train is missing"):
        open_stream(config(copy))
    shard.write_bytes(original[:-8])
    with pytest.raises(DataError, match="w1.train has .* bytes and should have .*: it was cut short or grew"):
        open_stream(config(copy))
    write_shard(shard, TRAIN["dolma/wiki"]["w0"])
    with pytest.raises(DataError, match="w1.train is not the one its record lists"):
        open_stream(config(copy))
    write_shard(shard, TRAIN["dolma/wiki"]["w1"], vocab_size=70_000)
    with pytest.raises(DataError, match=re.escape("was made by tokenizer abababababab... (70,000 ids)")):
        open_stream(config(copy))
    shard.write_bytes(original)
    open_stream(config(copy))


def test_bad_manifests_are_refused(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(DataError, match="has version 2; this program reads version 1: update the program"):
        open_stream(config(copy))
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match="is damaged: it is no JSON object with a version"):
        open_stream(config(copy))
    manifest.write_text(text.replace('"name": "b0"', '"name": 3'))
    with pytest.raises(DataError, match="is damaged at files.0.name: Input should be a valid string"):
        open_stream(config(copy))


def test_a_mixture_the_set_cannot_serve_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=re.escape("'redpajama/arxiv' is not among the shards; they hold dolma/books")
    ):
        open_stream(config(made, mixture="strategy_1"))
    with pytest.raises(DataError, match="source 'unused' has 6 tokens, fewer than one row of 6"):
        open_stream(config(made, mixture={"unused": 1}))
    empty = write_set(tmp_path / "empty", {"pile": {"p": []}})
    with pytest.raises(DataError, match="source 'pile' has no tokens"):
        open_stream(config(empty, mixture={"pile": 1}))


def test_held_out_rows_by_hand(made: Path) -> None:
    split = open_held_out(config(made))
    assert list(split) == ["dolma"], "no document of pile was held out, and nothing weighs 'unused'"
    dolma = split["dolma"]
    assert (dolma.tokens, dolma.text_bytes, dolma.documents) == (7, 14, 2)
    assert dolma.bytes_per_token == 2.0
    # Tokens in file-name order: 500 501 . 502 503 504 .  Six targets in rows of 4: the second row has two.
    tokens, valid = dolma.rows(4)
    assert tokens.tolist() == [[500, 501, EOS, 502, 503], [503, 504, EOS, EOS, EOS]]
    assert valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert tokens.dtype == np.int64 and valid.dtype == bool
    tokens, valid = dolma.rows(4, 1)
    assert tokens.tolist() == [[500, 501, EOS, 502, 503]] and valid.all()
    tokens, valid = dolma.rows(6)
    assert tokens.tolist() == [[500, 501, EOS, 502, 503, 504, EOS]] and valid.all()
    tokens, valid = dolma.rows(100, 5)
    assert tokens.shape == (1, 101) and valid.sum() == 6
    assert dolma.rows(4, 0)[0].shape == (0, 5)


def test_the_manifest_survives_a_round_trip(made: Path) -> None:
    manifest = read_manifest(made)
    assert manifest.labels() == ["dolma/books", "dolma/wiki", "pile", "unused"]
    assert [file.key for file in manifest.files] == sorted(file.key for file in manifest.files)
    assert sum(file.train.tokens for file in manifest.files) == 43 + 43 + 18 + 6
