"""Deduplication against sets built from raw files whose duplicates were taken out by hand."""

from __future__ import annotations

import os
import random
import resource
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import pytest
from killed_builds import contents, moepp_data, run, run_killed
from raw_corpora import lines_of, text_of, write_raw, write_tokenizer

from data_pipeline import dedup, text_hashes
from data_pipeline.build import BuildReport, build_set, finish_set
from data_pipeline.census import census
from data_pipeline.count import Tally, count_set
from data_pipeline.document import DataError
from data_pipeline.file_job import read_dropped
from data_pipeline.manifest import SPLITS, shard_path
from data_pipeline.tasks import Task
from data_pipeline.verify import verify_set

Files = Mapping[str, list[str]]
"""{corpus/name: texts}."""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer.json")


@pytest.fixture(params=["small", "large"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with runs, buckets and copies so small that all have several, once with those of real use."""
    if request.param == "small":
        monkeypatch.setattr(text_hashes, "RUN_DOCUMENTS", 7)
        monkeypatch.setattr(dedup, "BUCKET_BYTES", 10 * text_hashes.DOCUMENT.itemsize)
        monkeypatch.setattr(dedup, "COPIED_TOKENS", 9)


def write_files(root: Path, files: Files) -> dict[str, Path]:
    for name, texts in files.items():
        write_raw(root / name, lines_of(texts))
    return {corpus: root / corpus for corpus in sorted({name.split("/")[0] for name in files})}


def build(out: Path, tokenizer: Path, corpora: dict[str, Path], **changes: object) -> BuildReport:
    settings = {"tokenizer_file": tokenizer, "corpora": corpora, "held_out": 0.2, "part_tokens": 16, **changes}
    return build_set(out, **settings)  # type: ignore[arg-type]


FILES = {
    "pile/train/00.jsonl": ["w1", "w2 w3", "w1", "w4 w4 w4"],
    "pile/train/01.jsonl": ["w2 w3", "w5"],
    "dolma/wiki/a.jsonl": ["w9", "w5", "w5"],
    "redpajama/book/b.jsonl": ["w9", "w1", "w7"],
}
KEPT = {
    "dolma/wiki/a.jsonl": ["w9", "w5"],
    "pile/train/00.jsonl": ["w1", "w2 w3", "w4 w4 w4"],
    "pile/train/01.jsonl": [],
    "redpajama/book/b.jsonl": ["w7"],
}
"""Files in the order of their labels: dolma/wiki, pile, redpajama/book."""


def shards_of(root: Path, files: Files) -> dict[str, bytes | None]:
    paths = {f"{name}.{split}": shard_path(root, name, split) for name in files for split in SPLITS}
    return {name: path.read_bytes() if path.exists() else None for name, path in paths.items()}


def test_the_first_of_equal_texts_stays(tmp_path: Path, tokenizer: Path) -> None:
    corpora = write_files(tmp_path / "raw", FILES)
    report = build(tmp_path / "out", tokenizer, corpora, dedup=True)
    not_empty = {name: texts for name, texts in KEPT.items() if texts}
    build(tmp_path / "by hand", tokenizer, write_files(tmp_path / "kept", not_empty))
    assert shards_of(tmp_path / "out", FILES) == shards_of(tmp_path / "by hand", FILES)
    records = {file.key: file for file in report.manifest.files}
    for name, texts in KEPT.items():
        file = records[name]
        assert file.train.documents + file.held_out.documents == len(texts)
        assert file.train.text_bytes + file.held_out.text_bytes == sum(map(len, texts))
        assert file.duplicates == len(FILES[name]) - len(texts)
    assert read_dropped(tmp_path / "out", "redpajama/book/b.jsonl").tolist() == [0, 1]
    assert verify_set(tmp_path / "out").problems == []
    (dolma, pile, _) = census(report.manifest)
    assert (dolma.source, dolma.documents, dolma.duplicates, dolma.text_bytes) == ("dolma/wiki", 2, 1, 4)
    assert (pile.files, pile.documents, pile.duplicates, pile.tokens_per_byte) == (2, 3, 3, 9 / 15)


def without_duplicates(files: Files) -> dict[str, list[str]]:
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name in sorted(files):  # one label a corpus here, so labels, names and keys have one order
        kept[name] = [text for text in dict.fromkeys(files[name]) if text not in seen]
        seen.update(kept[name])
    return kept


def drawn_files(rng: random.Random) -> dict[str, list[str]]:
    names = ["dolma/wiki/a.jsonl", "dolma/wiki/b.jsonl", "pile/c.jsonl", "pile/d.jsonl", "redpajama/book/e.jsonl"]
    return {name: [text_of(rng.randrange(60)) for _ in range(rng.randint(1, 40))] for name in names}


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("seed", range(3))
def test_files_come_change_and_go(tmp_path: Path, tokenizer: Path, seed: int) -> None:
    rng = random.Random(seed)
    everything = drawn_files(rng)
    out = tmp_path / "out"
    for step in range(5):
        present = {name: texts for name, texts in everything.items() if rng.random() < 0.7 or name.endswith("a.jsonl")}
        for name in everything:
            (tmp_path / "raw" / name).unlink(missing_ok=True)
        corpora = {**write_files(tmp_path / "raw", present)}
        for corpus in ("dolma", "pile", "redpajama"):
            if corpus not in corpora:  # a corpus of a deduplicated set cannot be left out
                extra = {f"{corpus}/{'book/' * (corpus == 'redpajama')}z.jsonl": ["w1"]}
                present |= extra
                corpora |= write_files(tmp_path / "raw", extra)
        report = build(out, tokenizer, corpora, dedup=True)
        kept = without_duplicates(present)
        nonempty = {name: texts for name, texts in kept.items() if texts}
        build(tmp_path / f"by hand {step}", tokenizer, write_files(tmp_path / f"kept {step}", nonempty))
        assert shards_of(out, present) == shards_of(tmp_path / f"by hand {step}", present)
        duplicates = {file.key: file.duplicates for file in report.manifest.files}
        assert duplicates == {name: len(present[name]) - len(kept[name]) for name in present}
        for name in present:
            if name.endswith("z.jsonl"):
                (tmp_path / "raw" / name).unlink()
        if rng.random() < 0.5:
            everything[rng.choice(sorted(everything))] = [text_of(rng.randrange(60)) for _ in range(20)]


def many_files(documents: int) -> dict[str, list[str]]:
    """About a third of the texts occur before."""
    rng = random.Random(documents)
    names = ["dolma/wiki/a.json.gz", "dolma/wiki/b.json.gz", "pile/train/0.jsonl.zst", "pile/train/1.jsonl.zst"]
    names += ["redpajama/book/b.jsonl", "redpajama/c4/c.jsonl"]
    return {name: [text_of(rng.randrange(6 * documents)) for _ in range(documents)] for name in names}


def test_workers_and_tasks_end_with_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    corpora = write_files(tmp_path / "raw", many_files(100))
    build(tmp_path / "one", tokenizer, corpora, dedup=True)
    build(tmp_path / "two", tokenizer, corpora, dedup=True, workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    for number in (3, 1, 2):
        build(tmp_path / "tasks", tokenizer, corpora, dedup=True, task=Task(number, 3))
    assert not (tmp_path / "tasks/manifest.json").exists()
    report = finish_set(tmp_path / "tasks", corpora=corpora)
    assert contents(tmp_path / "tasks") == contents(tmp_path / "one")
    assert sum(file.duplicates for file in report.manifest.files) > 100
    assert not (tmp_path / "one/dedup/.merged").exists()


def test_count_agrees(tmp_path: Path, tokenizer: Path) -> None:
    files = many_files(60)
    corpora = write_files(tmp_path / "raw", files)
    book = corpora["redpajama"] / "book/b.jsonl"
    book.write_bytes(b"bad\n" + book.read_bytes())
    build(tmp_path / "out", tokenizer, corpora, dedup=True)
    counted = count_set(tmp_path / "out", corpora)
    assert counted.problems == [] and counted.raw == counted.shards
    total = sum(counted.raw.values(), Tally())
    distinct = {text for texts in files.values() for text in texts}
    assert (total.documents, total.duplicates, total.bad_lines) == (len(distinct), 360 - len(distinct), 1)


def test_a_corpus_of_the_set_has_to_be_named(tmp_path: Path, tokenizer: Path) -> None:
    corpora = write_files(tmp_path / "raw", FILES)
    build(tmp_path / "out", tokenizer, corpora, dedup=True)
    del corpora["dolma"], corpora["pile"]
    with pytest.raises(DataError, match="is deduplicated, .* in all its corpora together; name --dolma, --pile too"):
        build(tmp_path / "out", tokenizer, corpora, dedup=True)
    with pytest.raises(DataError, match="other settings: deduplication True then and False now"):
        build(tmp_path / "out", tokenizer, corpora)


def test_a_task_whose_share_lacks_a_corpus(tmp_path: Path, tokenizer: Path) -> None:
    corpora = write_files(tmp_path / "raw", FILES)
    before = build(tmp_path / "out", tokenizer, corpora, dedup=True).manifest
    for number in range(1, 5):
        assert len(build(tmp_path / "out", tokenizer, corpora, dedup=True, task=Task(number, 4)).manifest.files) == 1
    assert finish_set(tmp_path / "out", corpora=corpora).manifest == before


def test_more_files_than_may_be_open(tmp_path: Path, tokenizer: Path) -> None:
    files = {f"pile/{number:02}.jsonl": ["w1", f"w{number}"] for number in range(2, 42)}
    corpora = write_files(tmp_path / "raw", files)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 25, hard))
    try:
        report = build(tmp_path / "out", tokenizer, corpora, dedup=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(file.duplicates for file in report.manifest.files) == 39


def test_what_is_damaged_is_built_again(tmp_path: Path, tokenizer: Path) -> None:
    corpora = write_files(tmp_path / "raw", FILES)
    out = tmp_path / "out"
    build(out, tokenizer, corpora, dedup=True)
    before = contents(out)
    (out / "dedup/pile/train/00.jsonl.dropped").unlink()
    hashes = out / "dedup/dolma/wiki/a.jsonl.hashes"
    hashes.write_bytes(hashes.read_bytes()[:-1])
    (out / "dedup/.merged").mkdir()
    (out / "dedup/.merged/0").write_bytes(b"left by a kill")
    assert build(out, tokenizer, corpora, dedup=True).built == 2
    assert contents(out) == before


def build_that_ends_at(change: int, *, after: bool, out: Path, tokenizer: Path, corpora: dict[str, Path]) -> bool:
    """Build in a process that ends, as if killed, before or after one rename or deletion; whether it came to it."""
    child = os.fork()
    if child == 0:
        changes = count(1)

        def ending(call: Callable[..., None]) -> Callable[..., None]:
            def called(*args: object, **options: object) -> None:
                number = next(changes)
                if number < change or after:
                    call(*args, **options)
                if number == change:
                    os._exit(9)

            return called

        os.replace, Path.unlink = ending(os.replace), ending(Path.unlink)  # type: ignore[method-assign]
        try:
            build(out, tokenizer, corpora, dedup=True)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_between_any_two_changes_it_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer: Path, every: int
) -> None:
    """The set has to lose a file whose texts were duplicates elsewhere, and to gain another."""
    raw = tmp_path / "raw"
    corpora = write_files(raw, {**FILES, "dolma/wiki/z.jsonl": ["w8"]})
    build(tmp_path / "before", tokenizer, corpora, dedup=True)
    (raw / "dolma/wiki/a.jsonl").unlink()
    write_raw(raw / "pile/train/02.jsonl", lines_of(["w5", "w8", "w6"]))

    def bytes_of(out: Path) -> dict[str, bytes]:
        return {name: data for name, data in contents(out).items() if "wiki/a.jsonl" not in name}

    shutil.copytree(tmp_path / "before", tmp_path / "undisturbed")
    build(tmp_path / "undisturbed", tokenizer, corpora, dedup=True)
    killed = 0
    for after in (False, True):
        for change in count(1, every):
            out = tmp_path / f"{change} {after}"
            shutil.copytree(tmp_path / "before", out)
            came = build_that_ends_at(change, after=after, out=out, tokenizer=tokenizer, corpora=corpora)
            build(out, tokenizer, corpora, dedup=True)
            assert bytes_of(out) == bytes_of(tmp_path / "undisturbed"), (change, after)
            if not came:
                break
            killed += 1
    assert killed >= 30 // every


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, tokenizer: Path, kills: int) -> None:
    corpora = write_files(tmp_path / "raw", many_files(4000 if kills > 1 else 500))
    words = [word for name, path in corpora.items() for word in (f"--{name}", path)]
    options = ("--tokenizer", tokenizer, *words, "--dedup", "--workers", 2)
    seconds = run([moepp_data("build", tmp_path / "undisturbed", *options)])
    out = tmp_path / "out"
    run_killed(
        [moepp_data("build", out, *options)],
        out,
        expected=tmp_path / "undisturbed",
        seconds=seconds,
        kills=kills,
        seed=kills,
    )
