"""Checkpoints from layout to layout, in real ranks; tests/test_checkpoint_layouts.py starts a world after the other.

    ... --module tests.programs.layout_checks FOLDER JOB ...

Jobs are done one after the other, by all ranks. A layout is world-EP-stage, such as 4-2-1: four ranks, expert
parallelism over two, ZeRO stage 1.

    NAME=LAYOUT         train from the beginning
    NAME=LAYOUT:FROM    go on from the checkpoint that the job named FROM left

A job trains, saves a checkpoint three updates later, and goes on for 20 more: it is what an uninterrupted run is to the
jobs that load the checkpoint. These check that a save right after loading has every bit of what was saved, and that
their losses over these 20 updates are those of the run that was not interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moepp_ds.checkpoint.compare import compare
from moepp_ds.checkpoint.live import Saver, load_checkpoint
from moepp_ds.engine import join_ranks
from tests.programs import tiny

RANKS = join_ranks()
ARGUMENTS = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # of DeepSpeed's launcher
FOLDER = Path(ARGUMENTS[0])
UNTIL_SAVED, AFTERWARDS = 3, 20
SETTINGS = ("train.max_lr=1e-3", "model.init_std=0.05", "model.num_layers=2", "model.moe.every=1")
"""Of a training that is not chaotic: rounding must not decide where a token goes."""


def engine_of(layout: str) -> tuple[Any, Any]:
    """A recipe of that layout, and its engine."""
    world, ways, stage = map(int, layout.split("-"))
    assert world == RANKS.world
    config = json.loads((tiny.ROOT / "ds_configs/zero2_fp32.json").read_text())
    config["zero_optimization"]["stage"] = stage
    file = FOLDER / f"zero{stage}-{RANKS.rank}.json"
    file.write_text(json.dumps(config))
    asked = tiny.recipe(f"deepspeed={file}", *SETTINGS, expert_parallel=ways)
    return asked, tiny.engine_for(asked, RANKS)


def save(engine: Any, root: Path, step: int) -> Path:
    saver = Saver(engine, root, keep=9)
    saver.save(step=step, facts={"recipe": {}, "data": None})
    folder = saver.complete()
    assert folder is not None
    return folder


def do(job: str) -> None:
    """Do one job, and leave what was found for the test to judge."""
    name, _, rest = job.partition("=")
    layout, _, source = rest.partition(":")
    here = FOLDER / name
    asked, engine = engine_of(layout)
    found: dict[str, Any] = {"job": job, "identical": True, "expected": [], "start": 0}
    if source:
        before = json.loads((FOLDER / source / "losses.json").read_text())
        folder = Path(before["checkpoint"])
        found["start"] = load_checkpoint(engine, folder)["step"]
        again = save(engine, here / "again", found["start"])
        found["identical"] = compare(folder, again).identical
        found["expected"] = before["losses"][UNTIL_SAVED:]
    start = found["start"]
    losses = tiny.train(engine, asked, RANKS, range(start, start + UNTIL_SAVED))
    found["checkpoint"] = str(save(engine, here, start + UNTIL_SAVED))
    found["losses"] = losses + tiny.train(
        engine, asked, RANKS, range(start + UNTIL_SAVED, start + UNTIL_SAVED + AFTERWARDS)
    )
    if RANKS.is_first:
        (here / "losses.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    for job in ARGUMENTS[1:]:
        do(job)
    dist.destroy_process_group()
