"""Space: what is said before a build that will not fit, and when the disk is full."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from raw_corpora import write_tokenizer

from data_pipeline.document import RawFile
from data_pipeline.file_job import FileJob
from data_pipeline.manifest import FileRecord, Settings, SplitRecord
from data_pipeline.set_settings import tokenizer_info
from data_pipeline.space import SpaceEstimate
from data_pipeline.tokenizer import load_tokenizer


def test_a_disk_that_is_too_small_and_one_that_is_full_of_duplicates(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    info = tokenizer_info(load_tokenizer(tokenizer), f"tokenizer/{tokenizer.name}")
    settings = Settings(tokenizer=info, held_out=0.0, part_tokens=8, dedup=True)
    size = 10 * shutil.disk_usage(tmp_path).free
    job = FileJob(str(tmp_path), "pile", RawFile("a.jsonl", "a.jsonl", "pile", size, "1"), settings, 0.0, "lock")
    space = SpaceEstimate(tmp_path, settings, [job])
    assert ": too little, so make room or stop here" in space.foreseen()
    assert re.search(r"finished files are kept: make room for about [\d,]+\.\d .B more, and run", space.shortage())
    record = FileRecord(
        corpus="pile", name="a.jsonl", source="pile", input_bytes=size, bad_lines=0, train=SplitRecord(),
        held_out=SplitRecord(),
    )
    space.built(job, record)
    assert "but each worker that takes duplicates out writes a file's shards anew" in space.shortage()
