"""The parts of the spool: a source's stream from raw files against packing over shards, chunks, plan, folder."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import ROOT
from pydantic import TypeAdapter
from raw_corpora import lines_of, text_of, write_raw
from streamed_corpora import (
    BAD,
    EXCLUDED,
    HELD_OUT,
    MAX_BAD_SHARE,
    PART_TOKENS,
    SPLIT_BYTES,
    StreamedCorpora,
    write_streamed,
)

from data_pipeline.config import RawInputs
from data_pipeline.document import BadLine, DataError
from data_pipeline.held_out import HeldOutRule
from data_pipeline.manifest import FileRecord, read_manifest, shard_path
from data_pipeline.packing import TokenStream
from data_pipeline.readers import raw_files
from data_pipeline.shards import Shard
from data_pipeline.spool.bad_lines import BadLines
from data_pipeline.spool.builder import SourceBuilder, describe_failure
from data_pipeline.spool.chunks import (
    States,
    chunk_numbers,
    chunk_path,
    open_chunk,
    read_states,
    state_bytes,
    write_chunk,
)
from data_pipeline.spool.documents import CorpusFile, Encoding, training_documents
from data_pipeline.spool.folder import enter, lock_source, needed_by_readers, source_folder
from data_pipeline.spool.linear import FilePlace, LinearStream, SourceState, Totals
from data_pipeline.spool.plan import Known, SourcePlan, SpoolPlan, plan_spool, share_disk
from data_pipeline.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StreamedCorpora:
    return write_streamed(tmp_path_factory.mktemp("raw"))


class Prepared:
    """A source as its shards have it."""

    def __init__(self, root: Path, source: str, *, seed: int, interleave: int) -> None:
        files = [file for file in read_manifest(root).files if file.source.startswith(source)]
        shards = [self._open(root, file) for file in files]
        self.tokens = [np.empty(0, np.uint16) if shard is None else shard.tokens for shard in shards]
        self.cuts = [np.empty(0, np.uint64) if shard is None else shard.cuts for shard in shards]
        self.stream = TokenStream(
            source,
            names=[file.key for file in files],
            tokens=np.array([file.train.tokens for file in files]),
            read_cuts=lambda file: self.cuts[file],
            seed=seed,
            interleave=interleave,
        )

    @staticmethod
    def _open(root: Path, file: FileRecord) -> Shard | None:
        return Shard(shard_path(root, file.key, "train")) if file.train.tokens else None

    def read(self, stop: int) -> list[int]:
        """The first tokens of the stream."""
        runs = self.stream.segments(0, stop)
        ends = [*runs.start[1:].tolist(), runs.stop]
        found: list[int] = []
        for begin, end, file, offset in zip(runs.start.tolist(), ends, runs.file.tolist(), runs.offset.tolist()):
            found += self.tokens[file][offset : offset + end - begin].tolist()
        return found[:stop]


def encoding(made: StreamedCorpora, quarantine: Path, max_bad_share: float = MAX_BAD_SHARE) -> Encoding:
    return Encoding(load_tokenizer(made.tokenizer), HeldOutRule(HELD_OUT), EXCLUDED, max_bad_share, quarantine)


def files_of(corpus: str, location: Path) -> list[CorpusFile]:
    return [CorpusFile(*found) for found in raw_files({corpus: location}, split_bytes=SPLIT_BYTES)]


def linear(
    encoding: Encoding,
    files: list[CorpusFile],
    *,
    seed: int = 0,
    interleave: int = 4,
    state: SourceState = SourceState(),
    epochs: list[Totals] | None = None,
) -> LinearStream:
    return LinearStream(
        files[0].corpus,
        names=[file.key for file in files],
        open_file=lambda number, place: training_documents(files[number], place, encoding, check=True),
        seed=seed,
        interleave=interleave,
        part_tokens=PART_TOKENS,
        end_epoch=(epochs if epochs is not None else []).append,
        state=state,
    )


def read(stream: LinearStream, count: int) -> list[int]:
    out = np.empty(count, dtype=np.int64)
    stream.read(out)
    return out.tolist()


@pytest.mark.parametrize("interleave", [1, 2, 4, 64])
@pytest.mark.parametrize("corpus", ["dolma", "pile"])
def test_the_stream_is_that_of_the_shards(made: StreamedCorpora, tmp_path: Path, corpus: str, interleave: int) -> None:
    """Three epochs and a half in one go, and again in pieces, each by a stream begun from the last one's state."""
    prepared = Prepared(made.set, corpus, seed=5, interleave=interleave)
    length = 7 * prepared.stream.tokens // 2
    expected = prepared.read(length)
    files, how, epochs = files_of(corpus, made.corpora[corpus]), encoding(made, tmp_path), []
    assert read(linear(how, files, seed=5, interleave=interleave, epochs=epochs), length) == expected
    assert [totals.tokens for totals in epochs] == 3 * [prepared.stream.tokens]
    assert [totals.bad for totals in epochs] == 3 * [18 if corpus == "dolma" else 0]
    rng, state, found = random.Random(interleave), SourceState(), []
    while len(found) < length:
        stream = linear(how, files, seed=5, interleave=interleave, state=state)
        found += read(stream, rng.choice([1, 2, 7, 100, 900]))
        state = TypeAdapter(SourceState).validate_json(orjson.dumps(stream.state()))
        stream.close()
    assert found[:length] == expected
    assert state.epoch_tokens == prepared.stream.tokens


def test_states_at_every_token(made: StreamedCorpora, tmp_path: Path) -> None:
    """One epoch of the book, cut after every single token: a stream begun there gives what follows."""
    files, how = files_of("redpajama", made.corpora["redpajama"]), encoding(made, tmp_path)
    whole = linear(how, files)
    tokens = read(linear(how, files), 200)
    for cut in range(150):
        assert read(linear(how, files, state=whole.state()), 50) == tokens[cut : cut + 50]
        read(whole, 1)


def test_states_are_small_and_fit_their_allowance() -> None:
    place = FilePlace(line=10**12, end=10**15, lines=10**12, bad=10**9, tokens=10**14)
    totals = Totals(tokens=10**15, lines=10**13, bad=10**10)
    state = SourceState(
        epoch=10**6, group=10**6, turn=10**4, lead=10**9, places=64 * [place], ended=totals, epoch_tokens=10**15
    )
    assert len(orjson.dumps(States(state, state))) < state_bytes(64) < 17_000


def test_a_state_of_other_files_is_refused(made: StreamedCorpora, tmp_path: Path) -> None:
    files, how = files_of("dolma", made.corpora["dolma"]), encoding(made, tmp_path)
    stream = linear(how, files)
    read(stream, 300)
    state = stream.state()
    for wrong in (
        replace(state, group=9),
        replace(state, turn=4),
        replace(state, places=[*state.places, FilePlace()]),
        replace(state, places=[None] * len(state.places)),
    ):
        with pytest.raises(DataError, match="position of source .dolma. is of other files than the 9 there are"):
            linear(how, files, state=wrong)
    with pytest.raises(DataError, match="there is no document of more than 5000 tokens; restore the file"):
        read(linear(how, files, state=replace(state, lead=5000)), 1)


def test_bad_lines_are_kept_once(made: StreamedCorpora, tmp_path: Path) -> None:
    """Read twice and by two streams, and after an entry that a killed process left unfinished."""
    files, how = files_of("dolma", made.corpora["dolma"]), encoding(made, tmp_path)
    read(linear(how, files), 5000)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    assert len(kept) == 9 and all(content.count(b"\n") == 2 for content in kept.values())
    first = min(kept)
    first.write_bytes(kept[first][:-5])
    read(linear(how, files), 5000)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == kept
    lines = BadLines(tmp_path / "made.jsonl")
    lines.add(BadLine("made", 3, "no JSON", b"\xff", 10))
    lines.add(BadLine("made", 3, "no JSON", b"\xff", 10))
    assert json.loads((tmp_path / "made.jsonl").read_text()) == {
        "file": "made",
        "line": 3,
        "reason": "no JSON",
        "raw": "/w==",
    }


def test_too_many_bad_lines_stop_at_the_file_s_end(made: StreamedCorpora, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "dolma/wiki/w.jsonl", lines_of([text_of(n) for n in range(9)]) + 11 * BAD)
    how = encoding(made, tmp_path / "quarantine", max_bad_share=0.01)
    with pytest.raises(DataError, match=f"{path}: 11 of 20 lines are no documents, more than 10 and more than"):
        read(linear(how, files_of("dolma", tmp_path / "dolma")), 1000)


STATES = States(SourceState(), SourceState(epoch=1, places=[None, FilePlace(line=3)], epoch_tokens=7))
IDENTITY = bytes(range(16))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_chunks_come_back(tmp_path: Path, dtype: str) -> None:
    tokens = np.arange(1000, dtype=dtype)
    path = chunk_path(tmp_path, 12)
    assert path.name == "0000000012.tokens"
    assert open_chunk(path, number=12, identity=IDENTITY) is None
    assert read_states(path, identity=IDENTITY) is None
    write_chunk(path, tokens, STATES, number=12, identity=IDENTITY)
    chunk = open_chunk(path, number=12, identity=IDENTITY)
    assert chunk is not None and np.array_equal(chunk.tokens, tokens) and chunk.tokens.dtype == tokens.dtype
    assert read_states(path, identity=IDENTITY) == chunk.states
    assert chunk.states.after == replace(STATES.after, places=list(STATES.after.places))
    assert open_chunk(path, number=12, identity=bytes(16)) is None
    assert read_states(path, identity=bytes(16)) is None
    assert chunk_numbers(tmp_path) == [12]


def test_any_changed_byte_of_a_chunk_is_seen(tmp_path: Path) -> None:
    path = chunk_path(tmp_path, 0)
    write_chunk(path, np.arange(20, dtype="<u2"), STATES, number=0, identity=IDENTITY)
    whole = path.read_bytes()
    checked = [place for place in range(len(whole)) if not 40 <= place < 56 and not 72 <= place < 128]
    for place in checked:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match="is damaged"):
            open_chunk(path, number=0, identity=IDENTITY)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="is damaged"):
            open_chunk(path, number=0, identity=IDENTITY)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="its number or size is not what its header says"):
        open_chunk(path, number=1, identity=IDENTITY)


def test_a_chunk_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = chunk_path(tmp_path, 0)
    write_chunk(path, np.arange(20, dtype="<u2"), STATES, number=0, identity=IDENTITY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(DataError, match=f"^cannot read {path}: Too many open files; .* raise ulimit -n"):
            open_chunk(path, number=0, identity=IDENTITY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_chunk(path, number=0, identity=IDENTITY) is not None


def test_disk_is_shared_by_hand() -> None:
    """Two windows of 100 tokens and one more token touch at most 8 chunks of 30; one chunk is being written."""
    weights = {"a": 0.75, "b": 0.25}

    def shared(disk_bytes: int) -> dict[str, int]:
        raw = RawInputs(dolma="d", tokenizer="t", disk_bytes=disk_bytes)
        return share_disk(raw, weights, window_tokens=100, chunk_tokens=30, chunk_bytes=1000)

    assert shared(17_000) == {"a": 8, "b": 8}
    assert shared(25_999) == {"a": 8 + 6, "b": 8 + 2}
    with pytest.raises(DataError, match=r"2 sources x 8 chunks, and 1 being written.*take 17,000 .*set .* to 17000"):
        shared(16_999)


def plan_of(made: StreamedCorpora, spool: Path, raw: dict[str, Any] | None = None, **changes: Any) -> SpoolPlan:
    config = made.streamed(spool, raw, **changes)
    files = {name: files_of(name, made.corpora[name]) for name in ("dolma", "pile")}
    return plan_spool(config, load_tokenizer(made.tokenizer), files)


def test_a_plan_survives_the_pipe_and_tells_windows(made: StreamedCorpora, tmp_path: Path) -> None:
    plan = plan_of(made, tmp_path, {"disk_bytes": 3_000_000}, shuffle_window=4096, seq_len=64)
    sent = orjson.dumps(plan, default=lambda model: model.model_dump())
    assert orjson.dumps(TypeAdapter(SpoolPlan).validate_json(sent), default=lambda model: model.model_dump()) == sent
    assert plan.chunk_tokens == 4096 * 64 // 8
    assert [plan.first_chunk(drawn) for drawn in (0, 4095, 4096, 8191, 8192)] == [0, 0, 8, 8, 16]


@pytest.mark.parametrize("chunk_tokens", [3, 5, 6, 12])
@pytest.mark.parametrize(("window", "seq_len"), [(1, 4), (2, 3), (3, 4), (6, 1)])
def test_rows_ahead_are_what_chunks_have_room_for(
    made: StreamedCorpora, tmp_path: Path, chunk_tokens: int, window: int, seq_len: int
) -> None:
    plan = replace(plan_of(made, tmp_path), chunk_tokens=chunk_tokens, window=window, seq_len=seq_len)
    least = (2 * window * seq_len - 1) // chunk_tokens + 2
    for capacity in range(least, least + 9):
        capacities = {"a": capacity + 3, "b": capacity}
        plan = replace(
            plan,
            sources=[SourcePlan(name=name, weight=1.0, capacity=own, files=[]) for name, own in capacities.items()],
        )

        def fits(ahead: int) -> bool:
            """Whether from any first row on the window of the last, and the token after it, are in the chunks."""
            ends = [((row + ahead - 1) // window + 1) * window * seq_len // chunk_tokens for row in range(200)]
            return all(end - plan.first_chunk(row) < capacity for row, end in enumerate(ends))

        assert plan.rows_ahead > window and fits(plan.rows_ahead) and not fits(plan.rows_ahead + 1)


def test_sources_are_dealt_by_weight(made: StreamedCorpora, tmp_path: Path) -> None:
    plan = plan_of(made, tmp_path, {"builders": 3})
    weights = {"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1}
    sources = [SourcePlan(name=name, weight=weight, capacity=1, files=[]) for name, weight in weights.items()]
    assert replace(plan, sources=sources).builders() == [["a"], ["b", "d"], ["c"]]
    assert replace(plan, sources=sources[:2]).builders() == [["a"], ["b"]]


def test_who_may_enter(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    first, second = enter(root, {"seed": 1}), enter(root, {"seed": 1})
    chunk = chunk_path(source_folder(root, "dolma"), 0)
    write_chunk(chunk, np.zeros(1, "<u2"), STATES, number=0, identity=IDENTITY)
    with pytest.raises(DataError, match=r"in use by a run with other data or settings \(seed differ\)"):
        enter(root, {"seed": 2})
    assert needed_by_readers(root) == [None, None]
    first.need({"dolma": 3})
    second.close()
    assert needed_by_readers(root) == [{"dolma": 3}]
    first.close()
    assert needed_by_readers(root) == []
    enter(root, {"seed": 1}).close()
    assert chunk.exists()
    enter(root, {"seed": 2}).close()
    assert not chunk.exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is no spool: it holds manifest.json and no spool.json"):
        enter(tmp_path / "other", {})
    (root / "spool.json").write_text("[")
    with pytest.raises(DataError, match="spool.json is damaged"):
        enter(root, {})


def test_one_process_builds_a_source(tmp_path: Path) -> None:
    held = lock_source(tmp_path, "dolma")
    assert held is not None and lock_source(tmp_path, "dolma") is None
    held.close()
    again = lock_source(tmp_path, "dolma")
    assert again is not None
    again.close()


class Source:
    """One source of a plan, built in this process."""

    def __init__(self, made: StreamedCorpora, spool: Path) -> None:
        self.plan = plan_of(made, spool, mixture={"dolma": 0.5, "pile": 0.5})
        self.folder = source_folder(spool, "dolma")
        self.folder.mkdir(parents=True)
        self.encoding = self.plan.encoding()

    def builder(self, needed: int, known: Known | None = None) -> SourceBuilder:
        return SourceBuilder(self.plan, self.plan.sources[0], self.encoding, needed=needed, known=known)

    def contents(self) -> dict[int, bytes]:
        return {number: chunk_path(self.folder, number).read_bytes() for number in chunk_numbers(self.folder)}


def test_a_builder_goes_on_where_another_ended(made: StreamedCorpora, tmp_path: Path) -> None:
    source = Source(made, tmp_path)
    first = source.builder(0)
    for _ in range(6):
        first.make_chunk()
    whole = source.contents()
    assert list(whole) == [0, 1, 2, 3, 4, 5]
    first.needed = 4
    first.delete_released()
    assert list(source.contents()) == [4, 5]
    first.needed = 9
    first.delete_released()
    assert list(source.contents()) == [5], "the newest stays: its end is where the stream goes on"
    second = source.builder(6)
    assert (second.first, second.next) == (5, 6)
    known = Known(2, TypeAdapter(States).validate_json(whole[2][128 + 2 * source.plan.chunk_tokens :]).before)
    third = source.builder(2, known)
    assert (third.first, third.next) == (2, 2) and not source.contents()
    for _ in range(4):
        third.make_chunk()
    assert source.contents() == {number: whole[number] for number in (2, 3, 4, 5)}
    chunk_path(source.folder, 3).unlink()
    fourth = source.builder(2)
    assert (fourth.first, fourth.next) == (2, 3) and list(source.contents()) == [2]
    fifth = source.builder(1)
    assert (fifth.first, fifth.next) == (0, 0), "nothing is known of chunk 1 but what leads up to it"
    fifth.make_chunk()
    assert source.contents() == {0: whole[0]}


def test_what_is_wanted_soonest_is_made_first(made: StreamedCorpora, tmp_path: Path) -> None:
    """Chunks of 16,384 tokens, windows of 65,536: all chunks of the window in use first, then by share."""
    source = Source(made, tmp_path)
    source.plan = replace(source.plan, window=4096, seq_len=16)
    builders = {}
    for name, weight in (("large", 0.75), ("small", 0.25)):
        (tmp_path / "sources" / name).mkdir()
        own = replace(source.plan.sources[0], name=name, weight=weight, capacity=9)
        builders[name] = SourceBuilder(source.plan, own, source.encoding, needed=0, known=None)
    made_first = []
    for _ in range(18):
        name = min((name for name in builders if not builders[name].is_full), key=lambda name: builders[name].deadline)
        builders[name].next += 1
        made_first.append(name[0])
    assert "".join(made_first) == "lslslsls" + "lllll" + "sssss"


def test_a_source_smaller_than_a_row_is_refused(made: StreamedCorpora, tmp_path: Path) -> None:
    source = Source(made, tmp_path)
    source.plan = replace(source.plan, seq_len=10_000)
    with pytest.raises(DataError, match=r"source 'dolma' has 1,\d\d\d tokens, fewer than one row of 10000 \+ 1"):
        source.builder(0).make_chunk()


def test_failures_are_told_in_words() -> None:
    full = describe_failure(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "DIR")
    assert full.startswith("no space is left for the spool DIR, which takes up to data.raw.disk_bytes")
    gone = describe_failure(FileNotFoundError(errno.ENOENT, "No such file", "a.jsonl"), "DIR")
    assert "No such file: 'a.jsonl'" in gone
    assert describe_failure(DataError("said"), "DIR") == "said"
    try:
        [][0]
    except IndexError as error:
        assert "list index out of range" in describe_failure(error, "DIR")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_asked_of_the_whole_group_does_not_end_a_builder(signum: signal.Signals) -> None:
    """The update that the ranks are in needs its rows; the builder ends with who started it."""
    command = [sys.executable, "-m", "data_pipeline.spool.builder"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as builder:
        assert builder.stdin is not None
        status = Path(f"/proc/{builder.pid}/status")
        end = time.monotonic() + 60
        while not int(re.findall(r"SigIgn:\s*(\w+)", status.read_text())[0], 16) & 1 << (signum - 1):
            assert time.monotonic() < end
            time.sleep(0.05)
        builder.send_signal(signum)
        time.sleep(0.2)
        assert builder.poll() is None
        builder.stdin.close()  # no job
        assert builder.wait(60) == 1
