"""Training's door to raw files: the rows of prepared shards byte for byte, in any world, resumed, killed, refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from streamed_corpora import StreamedCorpora, write_streamed

from data_pipeline.config import DataConfig
from data_pipeline.document import DataError
from data_pipeline.feed import find_tokenizer, open_held_out, open_rows
from data_pipeline.loader import Loader
from data_pipeline.row_source import RowSource
from data_pipeline.spool.chunks import chunk_numbers

ROWS, BATCH_ROWS, MICRO = 10_000, 40, 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StreamedCorpora:
    return write_streamed(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def prepared_rows(made: StreamedCorpora) -> np.ndarray:
    """The first ROWS rows of the prepared set, which cross at least three epochs of every source."""
    rows = open_rows(made.prepared())
    assert min(epochs for epochs in rows.epochs(ROWS).values() if epochs is not None) > 3
    return rows.rows(np.arange(ROWS))


@dataclass
class Rank:
    """A process that takes the steps of one rank."""

    process: subprocess.Popen[str]
    rank: int
    out: Path

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def rows(self) -> tuple[list[int], np.ndarray, dict[str, Any]]:
        """(first rows of its micro batches, their tokens, the loader's state)."""
        state = json.loads((self.out / f"{self.rank}.json").read_text())
        return state.pop("row_starts"), np.load(self.out / f"{self.rank}.npy"), state


class Ranks:
    """Starts ranks, and kills those that are left."""

    def __init__(self) -> None:
        self.all: list[Rank] = []

    def start(
        self, config: DataConfig, out: Path, *, world: int, steps: int, state: dict[str, Any] | None = None
    ) -> list[Rank]:
        """A world of processes that have opened the data; no row is asked for before all of them are told to go."""
        out.mkdir(exist_ok=True)
        started = []
        for rank in range(world):
            command = [sys.executable, str(ROOT / "tests/programs/feed_rank.py")]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)
            asked = {"data": config.model_dump(), "rank": rank, "world": world, "batch_rows": BATCH_ROWS}
            asked |= {"micro": MICRO, "steps": steps, "state": state, "out": str(out)}
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            started.append(Rank(process, rank, out))
        self.all += started
        assert [rank.line() for rank in started] == ["open"] * world
        for one in started:
            one.go()
        return started

    def finish(self, started: list[Rank]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """(their rows together in the order of the stream, the loaders' states)."""
        assert [rank.line() for rank in started] == ["done"] * len(started)
        found = [rank.rows() for rank in started]
        starts = np.concatenate([starts for starts, _, _ in found])
        micro_batches = np.concatenate([rows.reshape(len(starts), MICRO, -1) for starts, rows, _ in found])
        order = np.argsort(starts)
        assert np.array_equal(starts[order], starts.min() + np.arange(len(starts)) * MICRO)
        return np.concatenate(micro_batches[order]), [state for _, _, state in found]


@pytest.fixture
def ranks() -> Any:
    running = Ranks()
    yield running
    for rank in running.all:
        rank.process.kill()
        rank.process.communicate()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "rows"), [(2, 2000), *(pytest.param(world, ROWS, marks=SLOW) for world in (1, 2, 4))]
)
def test_rows_are_those_of_prepared_shards(
    made: StreamedCorpora, prepared_rows: np.ndarray, ranks: Ranks, tmp_path: Path, world: int, rows: int
) -> None:
    """In any world, and resumed half way in another one, with the spool kept and with it gone."""
    config = made.streamed(tmp_path / "spool", {"builders": world, "disk_bytes": 400_000})
    half = rows // BATCH_ROWS // 2
    first, states = ranks.finish(ranks.start(config, tmp_path / "first", world=world, steps=half))
    assert np.array_equal(first, prepared_rows[: rows // 2])
    assert all(state == states[0] for state in states)
    assert len(json.dumps(states[0]["position"])) < 2000
    other = {1: 4, 2: 1, 4: 2}[world]
    for number, spool in enumerate([tmp_path / "spool", tmp_path / "another"]):
        config = made.streamed(spool)
        resumed = ranks.start(config, tmp_path / f"{number}", world=other, steps=half, state=states[0])
        assert np.array_equal(ranks.finish(resumed)[0], prepared_rows[rows // 2 : rows])


def builders(pid: int) -> list[int]:
    """The builders that a process has started and that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            command = status.with_name("cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if int(parent) == pid and state != "Z" and b"data_pipeline.spool.builder" in command:
            found.append(int(status.parent.name))
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
    return found


def load(rows: RowSource, state: dict[str, Any] | None = None) -> Loader:
    return Loader(rows, rank=0, world=1, batch_rows=BATCH_ROWS, micro_batch_size=BATCH_ROWS, state=state)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=SLOW)])
def test_killed_builders_are_an_error_and_leave_nothing_wrong(
    made: StreamedCorpora, prepared_rows: np.ndarray, tmp_path: Path, kills: int
) -> None:
    """At random moments; every run goes on from the last one's position, or from row 0 with its spool."""
    config, rng, done, state = made.streamed(tmp_path / "spool"), random.Random(kills), 0, None
    for kill in range(kills):
        with closing(open_rows(config)) as rows, load(rows, state) as loader:
            first = next(loader)
            (builder,) = builders(os.getpid())
            threading.Timer(rng.uniform(0, 0.3), os.kill, (builder, signal.SIGKILL)).start()
            batches, failed = [*first], None
            while failed is None and done + len(batches) * BATCH_ROWS < ROWS:
                try:
                    batches += next(loader)
                except DataError as error:
                    failed = str(error)
                    assert isinstance(error.__cause__, ChildProcessError)  # a start again may help
            assert failed is None or "ended with code -9 and no word" in failed
            found = np.concatenate([batch.tokens_BS1 for batch in batches])
            assert np.array_equal(found, prepared_rows[done : done + len(found)])
            if kill % 2 and done + len(found) < ROWS // 2:
                state, done = loader.state(), done + len(found)
        wait_for(lambda: not builders(os.getpid()))


def test_another_reader_takes_over(
    made: StreamedCorpora, prepared_rows: np.ndarray, ranks: Ranks, tmp_path: Path
) -> None:
    """The rank that started the builder is killed: its builder ends, and the other rank's rows come all the same."""
    started = ranks.start(made.streamed(tmp_path / "spool"), tmp_path / "out", world=2, steps=50)
    owner = wait_for(lambda: next((rank for rank in started if builders(rank.process.pid)), None))
    (builder,) = builders(owner.process.pid)
    owner.process.kill()
    wait_for(lambda: not Path(f"/proc/{builder}").exists())
    (other,) = (rank for rank in started if rank is not owner)
    assert other.line() == "done"
    starts, rows, _ = other.rows()
    indices = np.add.outer(starts, np.arange(MICRO)).ravel()
    assert np.array_equal(rows, prepared_rows[indices])


def test_an_error_reaches_every_rank(made: StreamedCorpora, ranks: Ranks, tmp_path: Path) -> None:
    """A truncated file stops all ranks with a message that names it."""
    path = tmp_path / "pile/train/00.jsonl.zst"
    shutil.copytree(made.corpora["pile"], tmp_path / "pile")
    path.write_bytes(path.read_bytes()[:-10])
    config = made.streamed(tmp_path / "spool", {"pile": str(tmp_path / "pile")})
    started = ranks.start(config, tmp_path / "out", world=2, steps=50)
    for rank in started:
        assert f"error: {path} is truncated" in rank.line()


def test_too_many_bad_lines_reach_training(made: StreamedCorpora, tmp_path: Path) -> None:
    with closing(open_rows(made.streamed(tmp_path / "spool", {"max_bad_share": 0.01}))) as rows:
        for _ in range(2):
            with pytest.raises(DataError, match=r"source dolma: 18 of \d+ lines are no documents"):
                rows.rows([0, 1, 2])
    quarantine = list((tmp_path / "spool/quarantine/dolma/wiki").glob("*.jsonl"))
    assert len(quarantine) == 9 and json.loads(quarantine[0].read_bytes().split(b"\n")[0])["raw"] == "bm8ganNvbg=="


def test_what_python_prints_at_its_start_is_no_answer(
    made: StreamedCorpora, prepared_rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text('print("modules loaded")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with closing(open_rows(made.streamed(tmp_path / "spool"))) as rows:
        assert np.array_equal(rows.rows([0]), prepared_rows[:1])
    with closing(open_rows(made.streamed(tmp_path / "other", {"max_bad_share": 0.0}))) as rows:
        with pytest.raises(DataError, match="lines are no documents"):
            rows.rows([ROWS // 20])


def test_rows_are_released_and_the_disk_is_bounded(
    made: StreamedCorpora, prepared_rows: np.ndarray, tmp_path: Path
) -> None:
    spool, disk = tmp_path / "spool", made.streamed(tmp_path).raw.disk_bytes
    with closing(open_rows(made.streamed(spool))) as rows:
        assert rows.epochs(0) == dict.fromkeys(rows.source_names)
        with pytest.raises(DataError, match=r"the spool holds 2 of this source; raise data.raw.disk_bytes, or lower"):
            rows.rows([ROWS])
        largest = 0
        for start in range(0, ROWS, 400):
            rows.release(start)
            assert np.array_equal(rows.rows(np.arange(start, start + 400)), prepared_rows[start : start + 400])
            chunks = [path.stat().st_size for path in spool.rglob("*0000*") if path.exists()]
            largest = max(largest, sum(chunks))
        assert largest <= disk
        with pytest.raises(DataError, match="was asked for that had been released"):
            rows.rows([0])
        assert rows.epochs(ROWS) == open_rows(made.prepared()).epochs(ROWS)
        assert rows.rows_total is None
    assert not list((spool / "readers").iterdir())


def test_the_loader_does_not_ask_for_more_than_the_disk_holds(made: StreamedCorpora, tmp_path: Path) -> None:
    """It would fetch 256 rows at a time; of this spool's two chunks, or eight windows, surely 225 can be asked for."""
    changes: dict[str, Any] = {"mixture": {"pile": 1.0}, "seq_len": 64}
    expected = open_rows(made.prepared(**changes)).rows(np.arange(1200))
    rows = open_rows(made.streamed(tmp_path / "spool", {"disk_bytes": 110_000}, **changes))
    assert rows.rows_ahead == 1 + 7 * 32
    with Loader(rows, rank=0, world=1, batch_rows=4, micro_batch_size=4) as loader, closing(rows):
        for start in range(0, 1200, 4):
            assert np.array_equal(next(loader)[0].tokens_BS1, expected[start : start + 4])


def test_a_spool_serves_one_run(made: StreamedCorpora, prepared_rows: np.ndarray, tmp_path: Path) -> None:
    """A second run that begins behind the first is told so, one with other settings too, and one beside it goes on."""
    config = made.streamed(tmp_path / "spool")
    with closing(open_rows(config)) as ahead:
        with load(ahead) as loader:
            for _ in range(200):
                next(loader)
            state = loader.state()
        wait_for(lambda: min(chunk_numbers(tmp_path / "spool/sources/dolma")) > 0)
        with closing(open_rows(config)) as beside, load(beside, state) as loader:
            assert np.array_equal(next(loader)[0].tokens_BS1, prepared_rows[8000:8040])
        with closing(open_rows(config)) as behind, pytest.raises(DataError, match="serves another run that is further"):
            behind.rows([0])
        with pytest.raises(DataError, match=r"in use by a run with other data or settings \(.*seed"):
            open_rows(made.streamed(tmp_path / "spool", seed=4))
    with closing(open_rows(config)) as rows:
        assert np.array_equal(rows.rows([0, 1]), prepared_rows[:2]), "alone, it begins anew"


def test_closing_ends_a_wait_and_the_builder(made: StreamedCorpora, tmp_path: Path) -> None:
    rows = open_rows(made.streamed(tmp_path / "spool", {"disk_bytes": 10**9}, shuffle_window=2**15))
    failure: list[str] = []

    def ask() -> None:
        try:
            rows.rows(np.arange(2**17))
        except DataError as error:
            failure.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: builders(os.getpid()))
    rows.close()
    asking.join(20)
    assert "was closed while a row was waited for" in failure[0]
    assert not builders(os.getpid())


def test_held_out_text_is_that_of_the_set(made: StreamedCorpora, tmp_path: Path) -> None:
    prepared = open_held_out(made.prepared(), rows=8)
    for _ in range(2):  # the second time from the spool
        streamed = open_held_out(made.streamed(tmp_path / "spool"), rows=8)
        assert streamed.keys() == prepared.keys() == {"dolma", "pile", "redpajama/book"}
        for name, text in prepared.items():
            for mine, theirs in zip(streamed[name].rows(16, 8), text.rows(16, 8)):
                assert np.array_equal(mine, theirs)
    assert open_held_out(made.streamed(tmp_path / "spool", {"held_out": 0.0}), rows=8) == {}
    few = {"held_out": 1e-9}
    for _ in range(2):
        assert open_held_out(made.streamed(tmp_path / "spool", few), rows=8) == {}


def test_the_tokenizer_is_found_in_both_modes(made: StreamedCorpora, tmp_path: Path) -> None:
    path, known = find_tokenizer(made.prepared())
    assert path == made.set / "tokenizer/tokenizer.json" and path.read_bytes() == made.tokenizer.read_bytes()
    assert find_tokenizer(made.streamed(tmp_path)) == (made.tokenizer, replace(known, file=str(made.tokenizer)))


def test_positions_that_are_none_are_refused(made: StreamedCorpora, tmp_path: Path) -> None:
    with closing(open_rows(made.streamed(tmp_path / "spool"))) as rows:
        unknown = {"chunk_tokens": 1 << 14, "sources": {"dolma": {"number": "x"}}}
        for position in ({"chunk_tokens": 3}, unknown, {"x": 1}):
            with pytest.raises(DataError, match="position in the raw files is not one of this program"):
                rows.seek(100, position)


def test_what_streaming_cannot_do_is_refused(made: StreamedCorpora, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with pytest.raises(DataError, match="raw.disk_bytes 100,000 is too little for two shuffle windows of every source"):
        open_rows(made.streamed(spool, {"disk_bytes": 100_000}))
    with pytest.raises(ValueError, match="max_epochs needs the length of every source"):
        made.streamed(spool, max_epochs=2.0)
    with pytest.raises(DataError, match="is no spool: it holds"):
        open_rows(made.streamed(made.set))
    with pytest.raises(DataError, match="lies in the folder of data.raw.pile"):
        open_rows(made.streamed(made.corpora["pile"] / "spool"))
    with pytest.raises(DataError, match="the Pile has no set 'Freelaw'"):
        open_rows(made.streamed(spool, {"pile_exclude": ["Freelaw"]}))
    with pytest.raises(DataError, match="mixture source 'dolma/books' is not among"):
        open_rows(made.streamed(spool, mixture={"dolma/books": 1.0}))
