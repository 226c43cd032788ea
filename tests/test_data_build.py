"""Build: shards against plain JSON reading, restarts and kills byte for byte, quarantine, lock, settings."""

from __future__ import annotations

import base64
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from killed_builds import contents
from raw_corpora import EOS, ids_of, lines_of, text_of, write_corpora, write_raw, write_tokenizer

from data_pipeline.build import BuildReport, Watcher, build_set
from data_pipeline.document import DataError
from data_pipeline.file_build import Advance
from data_pipeline.file_job import FileJob
from data_pipeline.held_out import HeldOutRule
from data_pipeline.manifest import FileRecord, SplitRecord, read_manifest, shard_path
from data_pipeline.shards import Shard
from data_pipeline.word_cache import WordCache


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Path]:
    return write_corpora(tmp_path / "raw")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer.json")


def build(root: Path, tokenizer: Path, raw: dict[str, Path], **changes: object) -> BuildReport:
    settings = {"tokenizer_file": tokenizer, "corpora": raw, "held_out": 0.1, "part_tokens": 32, **changes}
    return build_set(root, **settings)  # type: ignore[arg-type]


def pile_only(tmp_path: Path, data: bytes, name: str = "00.jsonl") -> dict[str, Path]:
    write_raw(tmp_path / "pile/train" / name, data)
    return {"pile": tmp_path / "pile"}


def is_held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=b"moepp held-out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def test_shards_hold_what_the_raw_files_hold(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    report = build(tmp_path / "out", tokenizer, raw)
    assert (report.built, report.kept) == (6, 0)
    texts = [json.loads(line)["text"] for line in gzip.open(raw["dolma"] / "wiki/wiki-0.json.gz")]
    for split, held in (("train", False), ("held_out", True)):
        mine = [text for text in texts if is_held_out(text, 0.1) == held]
        assert mine
        shard = Shard(tmp_path / f"out/shards/dolma/wiki/wiki-0.json.gz.{split}")
        assert shard.tokens.tolist() == [token for text in mine for token in [*ids_of(text), EOS]]
        assert shard.header.text_bytes == sum(len(text.encode()) for text in mine)
        shard.verify()
        assert getattr(report.manifest.files[0], split) == SplitRecord(
            documents=len(mine),
            text_bytes=shard.header.text_bytes,
            tokens=len(shard.tokens),
            checksum=shard.header.checksum,
        )
    assert [(file.key, file.source) for file in report.manifest.files] == [
        ("dolma/wiki/wiki-0.json.gz", "dolma/wiki"),
        ("dolma/wiki/wiki-1.json.gz", "dolma/wiki"),
        ("pile/train/00.jsonl.zst", "pile"),
        ("pile/train/01.jsonl.zst", "pile"),
        ("redpajama/book/book.jsonl", "redpajama/book"),
        ("redpajama/common_crawl/2023-06/cc.jsonl.zst", "redpajama/common_crawl"),
    ]
    assert read_manifest(tmp_path / "out") == report.manifest
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_no_machine_path_is_stored(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    build(tmp_path / "out", tokenizer, raw)
    assert not [name for name, data in contents(tmp_path / "out").items() if str(tmp_path).encode() in data]


def test_many_batches_of_documents(tmp_path: Path, tokenizer: Path) -> None:
    texts = [text_of(number) for number in range(1300)]
    report = build(tmp_path / "out", tokenizer, pile_only(tmp_path, lines_of(texts)), held_out=0.0)
    shard = Shard(shard_path(tmp_path / "out", "pile/train/00.jsonl", "train"))
    assert shard.tokens.tolist() == [token for text in texts for token in [*ids_of(text), EOS]]
    assert report.manifest.files[0].held_out == SplitRecord()
    assert not list((tmp_path / "out").rglob("*.held_out"))


def test_workers_write_the_same_bytes(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    build(tmp_path / "one", tokenizer, raw)
    build(tmp_path / "two", tokenizer, raw, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_second_build_keeps_what_is_done_and_mends_what_is_not(
    tmp_path: Path, raw: dict[str, Path], tokenizer: Path
) -> None:
    out = tmp_path / "out"
    build(out, tokenizer, raw)
    before = contents(out)
    assert build(out, tokenizer, raw).built == 0
    shard_path(out, "pile/train/00.jsonl.zst", "train").unlink()
    truncated = shard_path(out, "pile/train/01.jsonl.zst", "train")
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (out / "records/dolma/wiki/wiki-0.json.gz.json").write_bytes(b"{")
    (out / "shards/.unfinished-left-by-a-kill").touch()
    report = build(out, tokenizer, raw)
    assert (report.built, report.kept) == (3, 3)
    assert contents(out) == before


def test_a_changed_raw_file_is_built_again(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    out = tmp_path / "out"
    build(out, tokenizer, raw)
    write_raw(raw["dolma"] / "wiki/wiki-1.json.gz", lines_of(["w1 w2 w3"]))
    assert build(out, tokenizer, raw, held_out=0.1).built == 1
    assert Shard(shard_path(out, "dolma/wiki/wiki-1.json.gz", "train")).tokens.tolist() == [2, 3, 4, EOS]


def test_corpora_can_be_added_and_files_removed(
    tmp_path: Path, raw: dict[str, Path], tokenizer: Path
) -> None:
    out = tmp_path / "out"
    build(out, tokenizer, {"pile": raw["pile"]})
    (raw["pile"] / "train/00.jsonl.zst").unlink()
    assert len(build(out, tokenizer, {"dolma": raw["dolma"]}).manifest.files) == 4
    listener = Listener()
    manifest = build(out, tokenizer, {"pile": raw["pile"]}, watcher=listener).manifest
    assert any(
        "gone from the raw files, and so from the set: 1 file with" in said
        and "tokens, such as pile/train/00.jsonl.zst; restore what is gone" in said
        for said in listener.said
    )
    assert [file.key for file in manifest.files] == [
        "dolma/wiki/wiki-0.json.gz",
        "dolma/wiki/wiki-1.json.gz",
        "pile/train/01.jsonl.zst",
    ]


def test_bad_lines_are_set_aside_with_place_reason_and_bytes(tmp_path: Path, tokenizer: Path) -> None:
    good = lines_of(["w1 w2"])
    bad = [b"not json", b'{"text": null}', b'{"text": "\xff"}', b"\x00"]
    data = good + bad[0] + b"\n\n" + bad[1] + b"\n" + good + bad[2] + b"\n" + bad[3]
    report = build(tmp_path / "out", tokenizer, pile_only(tmp_path, data), held_out=0.0)
    record = report.manifest.files[0]
    assert (record.train.documents, record.bad_lines) == (2, 4)
    quarantine = (tmp_path / "out/quarantine/pile/train/00.jsonl.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in quarantine]
    assert [entry["line"] for entry in entries] == [2, 4, 6, 7]
    assert [base64.b64decode(entry["raw"]) for entry in entries] == bad
    assert all(entry["file"] == "train/00.jsonl" and entry["reason"] for entry in entries)


def test_too_many_bad_lines_stop_the_build(tmp_path: Path, tokenizer: Path) -> None:
    raw = pile_only(tmp_path, lines_of(["w1"] * 20) + b"bad\n" * 11)
    message = (
        "00.jsonl: 11 of 31 lines are no documents, more than 10 and more than the allowed share of 0.001;"
        " the last is line 31 ("
    )
    with pytest.raises(DataError, match=re.escape(message)):
        build(tmp_path / "out", tokenizer, raw)
    assert len((tmp_path / "out/quarantine/pile/train/00.jsonl.jsonl").read_text().splitlines()) == 11
    assert not (tmp_path / "out/manifest.json").exists()
    assert not list((tmp_path / "out").rglob("*.train"))
    assert build(tmp_path / "out", tokenizer, raw, max_bad_share=0.5).manifest.files[0].bad_lines == 11


def test_ten_bad_lines_are_always_allowed_and_a_share_of_a_long_file(tmp_path: Path, tokenizer: Path) -> None:
    raw = pile_only(tmp_path, lines_of(["w1"]) + b"bad\n" * 10)
    assert build(tmp_path / "short", tokenizer, raw, held_out=0.0).manifest.files[0].bad_lines == 10
    raw = pile_only(tmp_path, b"bad\n" * 12 + lines_of(["w1"]) * 11_988)
    with pytest.raises(DataError, match="12 of 10,000 lines are no documents"):
        build(tmp_path / "long", tokenizer, raw)
    raw = pile_only(tmp_path, lines_of(["w1"]) * 11_988 + b"bad\n" * 12)
    assert build(tmp_path / "long", tokenizer, raw).manifest.files[0].bad_lines == 12


def test_many_small_files_of_bad_lines_stop_the_build(tmp_path: Path, tokenizer: Path) -> None:
    for number in range(3):
        raw = pile_only(tmp_path, b"bad\n" * 4, f"{number}.jsonl")
    with pytest.raises(DataError, match=r"pile: 12 of 12 lines are no documents, more than 10 .* --max-bad-share"):
        build(tmp_path / "out", tokenizer, raw)
    assert not (tmp_path / "out/manifest.json").exists()
    assert build(tmp_path / "out", tokenizer, raw, max_bad_share=1.0).kept == 3


def test_a_set_inside_a_corpus_is_refused(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pile_only(tmp_path, lines_of(["w1"]))
    (tmp_path / "link").symlink_to(tmp_path / "pile")
    monkeypatch.chdir(tmp_path)
    for out in (raw["pile"], raw["pile"] / "new/out", tmp_path / "link/out", Path("pile/train")):
        with pytest.raises(DataError, match=r"lies in the folder of --pile, .*; build into a folder outside"):
            build(out, tokenizer, raw)
    assert not (tmp_path / "pile/new").exists()


def test_a_file_without_documents_is_recorded_and_has_no_shard(tmp_path: Path, tokenizer: Path) -> None:
    report = build(tmp_path / "out", tokenizer, pile_only(tmp_path, b"bad\n"))
    assert report.manifest.files[0].train == SplitRecord()
    assert not (tmp_path / "out/shards/pile/train/00.jsonl.train").exists()
    assert build(tmp_path / "out", tokenizer, {"pile": tmp_path / "pile"}).kept == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_file_stops_the_build_and_keeps_the_others(
    tmp_path: Path, raw: dict[str, Path], tokenizer: Path, workers: int
) -> None:
    last = raw["redpajama"] / "common_crawl/2023-06/cc.jsonl.zst"
    whole = last.read_bytes()
    last.write_bytes(whole[:-9])
    out = tmp_path / "out"
    with pytest.raises(DataError, match="cc.jsonl.zst is truncated: it ends inside a zstandard frame"):
        build(out, tokenizer, raw, workers=workers)
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*cc.jsonl.zst.train"))
    last.write_bytes(whole)
    report = build(out, tokenizer, raw, workers=workers)
    assert report.built + report.kept == 6
    assert workers > 1 or report.kept >= 1


def test_two_builds_into_one_folder(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    out = tmp_path / "out"
    (out / ".locks").mkdir(parents=True)
    with open(out / ".locks/set", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            DataError, match=re.escape(f"another build is writing to {out}; wait for it to end")
        ):
            build(out, tokenizer, raw)
    build(out, tokenizer, raw)


def test_the_lock_of_a_killed_build_is_free(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    out = tmp_path / "out"
    (out / ".locks").mkdir(parents=True)
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held',"
        " flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(out / ".locks/set")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    with pytest.raises(DataError, match="another build is writing"):
        build(out, tokenizer, raw)
    process.kill()
    process.communicate()
    assert build(out, tokenizer, raw).built == 6


def test_other_settings_are_refused(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    out = tmp_path / "out"
    build(out, tokenizer, raw)
    with pytest.raises(DataError, match="was begun with other settings: held-out share 0.1 then and 0.2 now"):
        build(out, tokenizer, raw, held_out=0.2)
    with pytest.raises(DataError, match="part length 32 then and 64 now; build into another folder"):
        build(out, tokenizer, raw, part_tokens=64)
    other = write_tokenizer(tmp_path / "other/tokenizer.json", ["<unk>", "w0"])
    with pytest.raises(DataError, match="was begun with other settings: tokenizer [0-9a-f]{12} then and"):
        build(out, other, raw)
    assert (out / "tokenizer/tokenizer.json").read_bytes() == tokenizer.read_bytes()
    os.rename(tokenizer, tmp_path / "renamed.json")
    assert build(out, tmp_path / "renamed.json", raw).kept == 6
    (out / "settings.json").write_text("{}")
    with pytest.raises(DataError, match="settings.json is damaged"):
        build(out, tmp_path / "renamed.json", raw)


def test_large_plain_files_are_built_in_pieces(tmp_path: Path, tokenizer: Path) -> None:
    texts = [text_of(number) for number in range(50)]
    raw = pile_only(tmp_path, lines_of(texts))
    size = (raw["pile"] / "train/00.jsonl").stat().st_size
    report = build(tmp_path / "out", tokenizer, raw, held_out=0.0, split_bytes=size // 3)
    assert [file.name for file in report.manifest.files] == [f"train/00.jsonl@000{piece}" for piece in range(3)]
    assert sum(file.input_bytes for file in report.manifest.files) == size
    shards = [Shard(shard_path(tmp_path / "out", file.key, "train")) for file in report.manifest.files]
    tokens = [token for shard in shards for token in shard.tokens.tolist()]
    assert tokens == [token for text in texts for token in [*ids_of(text), EOS]]
    with pytest.raises(DataError, match=f"other settings: split length {size // 3} then and 1073741824 now"):
        build(tmp_path / "out", tokenizer, raw, held_out=0.0)


def test_sets_of_the_pile_are_left_out_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    sets = ["Books3", "Github", "Books3", "ArXiv"]
    lines = [{"text": f"w{place}", "meta": {"pile_set_name": name}} for place, name in enumerate(sets)]
    raw = pile_only(tmp_path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    report = build(tmp_path / "out", tokenizer, raw, held_out=0.0, pile_exclude=["Github", "Books3", "Github"])
    (file,) = report.manifest.files
    assert (file.train.documents, file.excluded, file.bad_lines) == (1, 3, 0)
    assert report.manifest.settings.pile_exclude == ("Books3", "Github")
    assert Shard(shard_path(tmp_path / "out", file.key, "train")).tokens.tolist() == [4, EOS]
    with pytest.raises(DataError, match="excluded Pile sets Books3, Github then and none now"):
        build(tmp_path / "out", tokenizer, raw, held_out=0.0)
    with pytest.raises(DataError, match="the Pile has no set 'Book3'"):
        build(tmp_path / "other", tokenizer, raw, pile_exclude=["Book3"])


def test_sources_without_held_out_text_are_named(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    held = [text for text in map(text_of, range(200)) if is_held_out(text, 0.1)]
    write_raw(raw["redpajama"] / "arxiv/a.jsonl", lines_of(["w1"]))  # the hash keeps it in training
    write_raw(raw["redpajama"] / "book/more.jsonl", lines_of(held))
    assert not is_held_out("w1", 0.1)
    assert build(tmp_path / "out", tokenizer, {"redpajama": raw["redpajama"]}).without_held_out == ["redpajama/arxiv"]


class Listener(Watcher):
    """Keeps what is said, and the order of the files."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.files: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def end_file(self, job: FileJob, record: FileRecord) -> None:
        self.files.append(job.key)


def test_the_largest_files_come_first(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    listener = Listener()
    build(tmp_path / "out", tokenizer, raw, watcher=listener)
    files = {path: f"{name}/{path.relative_to(root)}" for name, root in raw.items() for path in root.rglob("*.*")}
    sizes = {key: path.stat().st_size for path, key in files.items()}
    assert [sizes[key] for key in listener.files] == sorted(sizes.values(), reverse=True)
    without_cache, space = listener.said
    assert without_cache == "no word cache for this tokenizer, so a slower build: it is a Hugging Face tokenizer"
    assert re.fullmatch(r"about 0.0 MB will be written for 0.0 MB of raw files; [\d,.]+ .B are free", space)


class FullDisk(Watcher):
    """Runs out of space when the second file is complete."""

    def __init__(self) -> None:
        self.files = 0

    def end_file(self, job: FileJob, record: FileRecord) -> None:
        self.files += 1
        if self.files == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    out = tmp_path / "out"
    left = r"the 0.0 MB of raw files still to build take about 0.0 MB, and [\d,.]+ .B are free"
    kept = "finished files are kept: make room, or see whether a quota or the number of files is what is used up, and"
    with pytest.raises(DataError, match=f"no space is left for {out}: {left}; {kept}"):
        build(out, tokenizer, raw, watcher=FullDisk())
    assert not (out / "manifest.json").exists()
    assert build(out, tokenizer, raw).kept == 2


class Appender(Watcher):
    """Adds to a raw file while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def advance(self, job: FileJob, done: Advance) -> None:
        with open(self.path, "ab") as file:
            file.write(lines_of(["w1"]))


def test_a_file_that_is_still_being_written_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    raw = pile_only(tmp_path, lines_of(["w1"] * 2000))
    path = raw["pile"] / "train/00.jsonl"
    with pytest.raises(DataError, match="00.jsonl was written to while it was read; when its download is complete"):
        build(tmp_path / "out", tokenizer, raw, watcher=Appender(path))
    assert not [name for name in contents(tmp_path / "out") if "00.jsonl" in name]
    assert build(tmp_path / "out", tokenizer, raw).manifest.files[0].documents > 2000


def test_a_text_that_cannot_be_encoded_is_named_with_its_file(tmp_path: Path) -> None:
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel({letter: id for id, letter in enumerate("ab </s>")}))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    letters.add_special_tokens(["</s>"])
    letters.save(str(tmp_path / "letters.json"))
    with pytest.raises(DataError, match=r"train/00\.jsonl: the tokenizer cannot encode a text"):
        build(tmp_path / "out", tmp_path / "letters.json", pile_only(tmp_path, lines_of(["ab", "zebra"])))


def test_the_first_texts_of_every_file_are_compared_with_plain_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a word cache made wrong on purpose: the first lines of the file are no documents, then comes a long one."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox"] * 3), model_writer=writer, model_type="bpe", vocab_size=300,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(writer.getvalue())
    raw = pile_only(tmp_path, b"bad\n" * 10_000 + lines_of(["the quick brown fox " * 100]))
    assert build(tmp_path / "sound", tmp_path / "tokenizer.model", raw, max_bad_share=1.0).built == 1
    monkeypatch.setattr(WordCache, "encode", lambda self, texts: [np.full(9, 5, dtype=np.int32) for _ in texts])
    with pytest.raises(DataError, match=r"train/00\.jsonl: the word cache encodes the text 'the quick brown fox "):
        build(tmp_path / "out", tmp_path / "tokenizer.model", raw, max_bad_share=1.0)


def test_lines_that_are_passed_over_are_reported_too(tmp_path: Path, tokenizer: Path) -> None:
    line = json.dumps({"text": "w1", "meta": {"pile_set_name": "Books3"}}).encode() + b"\n"
    said: list[Advance] = []

    class Counter(Watcher):
        def advance(self, job: FileJob, done: Advance) -> None:
            said.append(done)

    build(tmp_path / "out", tokenizer, pile_only(tmp_path, line * 20_500), pile_exclude=["Books3"], watcher=Counter())
    assert said == [Advance(0, 0, 0)] * 3, "after 10,000, 20,000 and all lines"


def test_arguments_that_make_no_sense(tmp_path: Path, raw: dict[str, Path], tokenizer: Path) -> None:
    with pytest.raises(DataError, match="nothing to build: name at least one corpus "):
        build(tmp_path / "out", tokenizer, {})
    with pytest.raises(DataError, match=re.escape("held-out share 1 is not in [0, 1)")):
        build(tmp_path / "out", tokenizer, raw, held_out=1)
    with pytest.raises(DataError, match="workers is 0; it must be at least 1"):
        build(tmp_path / "out", tokenizer, raw, workers=0)
    with pytest.raises(DataError, match="max_bad_share is 1.5; it is a share"):
        build(tmp_path / "out", tokenizer, raw, max_bad_share=1.5)
    with pytest.raises(DataError, match="s3:/bucket/out is a URL, and shards are read through memory maps; build into"):
        build(Path("s3://bucket/out"), tokenizer, raw)
    assert not (tmp_path / "out").exists()


def test_the_held_out_rule() -> None:
    texts = [text_of(number) for number in range(2000)]
    chosen = [HeldOutRule(0.1)(text.encode()) for text in texts]
    assert chosen == [is_held_out(text, 0.1) for text in texts]
    assert 140 < sum(chosen) < 260  # 200 expected, standard deviation 13.4
    more = [HeldOutRule(0.2)(text.encode()) for text in texts]
    assert all(now for now, then in zip(more, chosen) if then), "a larger share only adds documents"
    assert not any(HeldOutRule(0)(text.encode()) for text in texts)
