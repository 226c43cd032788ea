"""The stream of a shard set: rows against an oracle, stages and limits, what is refused when it is opened."""

from __future__ import annotations

import itertools
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_sets import EOS, write_set, write_shard, write_sparse_set
from small_set import HELD_OUT, SEQ_LEN, TRAIN, config

from data_pipeline.config import DataConfig
from data_pipeline.document import DataError
from data_pipeline.loader import Loader
from data_pipeline.manifest import read_manifest, shard_path
from data_pipeline.order import file_order, name_keys, window_permutation
from data_pipeline.shards import Shard
from data_pipeline.stream import open_held_out, open_stream


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), TRAIN, HELD_OUT)


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


def test_epochs_are_counted_through_stages(made: Path) -> None:
    staged: list[dict[str, Any]] = [{"mixture": {"dolma": 1, "pile": 1}, "tokens": 60}, {"mixture": {"pile": 1}}]
    stream = open_stream(config(made, mixture=None, stages=staged))
    assert stream.rows_total is None and stream.position(7) == {}
    assert stream.epochs(0) == {"dolma": 0.0, "pile": 0.0}
    # Ten rows of 6 tokens by halves, of 86 and 18 tokens; then 3 rows of pile alone.
    assert stream.epochs(10) == {"dolma": 30 / 86, "pile": 30 / 18}
    assert stream.epochs(13) == {"dolma": 30 / 86, "pile": 48 / 18}
    assert stream.sources(np.arange(8, 14)).tolist()[2:] == [1] * 4
    plain = open_stream(config(made, mixture={"dolma": 1, "pile": 1}))
    assert np.array_equal(stream.rows(np.arange(10)), plain.rows(np.arange(10)))
    assert stream.fingerprint != plain.fingerprint


def test_max_epochs_ends_the_stream_with_every_target_used_at_most_so_often(made: Path) -> None:
    # dolma: floor(2.5 x 86 / 6) = 35 rows; it comes 7 times in 10 rows, so pile's 3 do not end before.
    stream = open_stream(config(made, max_epochs={"dolma": 2.5}))
    assert stream.rows_total is not None and stream.mixture.ended_by == "dolma"
    rows = np.arange(stream.rows_total)
    assert stream.mixture.drawn(len(rows))["dolma"] == 35
    located = stream.locate(rows)
    assert sorted(located.row[located.source == 0].tolist()) == list(range(35)), "the first of its rows, each once"
    with pytest.raises(DataError, match=re.escape(f"the stream ends after {len(rows)} rows, when 'dolma' has given")):
        stream.rows([len(rows)])
    with Loader(stream, rank=0, world=1, batch_rows=4, micro_batch_size=4) as loader:
        assert len(list(loader)) == len(rows) // 4
    # Reweighted, the same rows come first; then pile goes on alone, without end.
    longer = open_stream(config(made, max_epochs={"dolma": 2.5}, on_max_epochs="reweight"))
    assert longer.rows_total is None
    assert np.array_equal(longer.rows(rows), stream.rows(rows))
    assert set(longer.sources(np.arange(len(rows), len(rows) + 50)).tolist()) == {1}
    assert longer.epochs(10_000)["dolma"] == 35 * 6 / 86


def test_limits_of_all_sources_end_a_reweighted_stream_too(made: Path) -> None:
    stream = open_stream(config(made, max_epochs=2, on_max_epochs="reweight"))
    assert stream.rows_total == 2 * 86 // 6 + 2 * 18 // 6
    assert stream.epochs(stream.rows_total) == {"dolma": 28 * 6 / 86, "pile": 2.0}
    located = stream.locate(np.arange(stream.rows_total))
    for source, rows in enumerate((28, 6)):
        assert sorted(located.row[located.source == source].tolist()) == list(range(rows))
    with pytest.raises(DataError, match="max_epochs of 'pile' is 0.25, which is less than one row of 6 of its 18"):
        open_stream(config(made, max_epochs={"pile": 0.25}))
    endless = open_stream(config(made, max_epochs=1e17))  # no row index has room for so many rows
    assert endless.rows_total is not None and endless.rows_total > 2**48
    assert endless.rows([endless.rows_total - 1]).shape == (1, 7)


@pytest.mark.parametrize("shards", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_what_is_held_of_a_set_grows_with_files_and_not_with_tokens(tmp_path: Path, shards: int) -> None:
    # 10,000 shards of 100 million tokens, most of each a hole in its file: 1e12 tokens.
    root = write_sparse_set(tmp_path / "sparse", sources=8, shards=shards, tokens=100_000_000)
    settings = config(root, mixture={f"source_{n}": n + 1 for n in range(8)}, seq_len=2048, shuffle_window=16_384)
    tracemalloc.start()
    stream = open_stream(settings)
    held = tracemalloc.get_traced_memory()[0]
    assert sum(stream.source_tokens) == shards * 10**8
    stream.locate(np.arange(4))
    stream.locate(np.arange(10**9, 10**9 + 4))
    with_index = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 2e6 + 1_000 * shards and with_index < 50e6
    assert not stream.rows([0, 10**9]).any()


def test_the_manifest_survives_a_round_trip(made: Path) -> None:
    manifest = read_manifest(made)
    assert manifest.labels() == ["dolma/books", "dolma/wiki", "pile", "unused"]
    assert [file.key for file in manifest.files] == sorted(file.key for file in manifest.files)
    assert sum(file.train.tokens for file in manifest.files) == 43 + 43 + 18 + 6
