"""Checks that a replay gives the numbers of the run, whatever its layout; tests/test_replay.py starts them.

    ... --module tests.programs.replay_checks FOLDER
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.checkpoint.writer import write_weights
from moepp_ds.config import Recipe, SafetyConfig
from moepp_ds.controller import RoutingState
from moepp_ds.engine import join_ranks
from moepp_ds.guard import Guard
from moepp_ds.replay import Replay, replay
from moepp_ds.replay_rows import Facts, rows_folder, write_rows
from moepp_ds.update import UpdateResult, update
from tests.programs import checks, tiny

RANKS = join_ranks()
FOLDER = Path(sys.argv[1])
OTHERS = ["model.moe.controller.rate=0.01", "model.moe.router.jitter=0.1", "model.moe.balance_scope=global_batch"]
"""What makes a pass depend on more than its rows and the weights."""
ROUTING = RoutingState(
    bias_LE=((0.01, -0.02, 0.0, 0.03, *(0.0,) * 4),) * 2, share_LE=((0.5, 0.2, 0.1, 0.4, 0.3, 0.2, 0.2, 0.1),) * 2
)


def stopped_run(run: Path, asked: Recipe) -> tuple[Any, UpdateResult]:
    """A run that did two updates and took the third for a spike; its rows and the weights before it are saved."""
    engine = tiny.engine_for(asked, RANKS)
    tiny.train(engine, asked, RANKS, [0, 1])
    arrays = tiny.global_arrays(engine)
    if RANKS.is_first:
        shapes = global_shapes(asked.model)
        pieces = [(name, 0, arrays[f"weight|{name}"]) for name in shapes]
        write_weights(run / "checkpoints", pieces, shapes=shapes, step=2, facts={})
    safety = SafetyConfig(spike_above=1.0, spike_window=8)
    result = third(engine, guard=Guard((1.0,) * 8), safety=safety)
    assert result.incident is not None and result.incident.number == 3
    facts = Facts(
        step=3,
        reason=result.incident.reason,
        loss=result.loss,
        world=RANKS.world,
        eos_id=0,
        recipe=asked.model_dump(mode="json"),
        routing=ROUTING.facts(),
        source_names=["only"],
    )
    assert write_rows(rows_folder(run, 3), RANKS.rank, mine(), facts) is None
    return engine, result


def mine() -> list[Any]:
    return tiny.micro_batches(2)[RANKS.rank :: RANKS.world]


def third(engine: Any, **settings: Any) -> UpdateResult:
    return update(
        engine, mine(), RANKS, rate=1e-2, num_sources=1, stop=lambda: False, routing=ROUTING, **settings
    )


def compare(done: Replay, run: UpdateResult, norm: float, *, relative: float) -> None:
    assert (done.step, done.checkpoint_step, done.exact, done.run_loss) == (3, 2, True, run.loss)
    assert math.isclose(done.loss, run.loss, rel_tol=relative), (done.loss, run.loss)
    assert math.isclose(done.grad_norm, norm, rel_tol=20 * relative), (done.grad_norm, norm)
    lm_loss = sum(one.lm_loss for one in done.passes) / 4
    assert math.isclose(lm_loss, run.lm_loss, rel_tol=relative), (lm_loss, run.lm_loss)
    rows = [row for one in done.passes for row in one.rows]
    assert [row.row for row in rows] == list(range(16, 24)) and {row.source for row in rows} == {"only"}
    assert math.isclose(sum(row.loss for row in rows) / 8, run.lm_loss, rel_tol=relative)
    assert [one.rank for one in done.passes] == [m % RANKS.world for m in range(4)]
    assert all(one.bad_output is None and one.bad_gradient is None for one in done.passes)


def replay_gives_the_runs_numbers() -> None:
    """In fp32 to rounding; in bf16 the order in which experts' rows are added shows sooner."""
    for precision, relative in (("fp32", 1e-6), ("bf16", 1e-3)):
        asked = tiny.recipe(*OTHERS, expert_parallel=RANKS.world, precision=precision)
        run = FOLDER / f"run-{precision}"
        engine, skipped = stopped_run(run, asked)
        norm = third(engine).grad_norm  # the same update, taken
        if RANKS.is_first:
            compare(replay(run, 3, device=torch.device("cpu")), skipped, norm, relative=relative)
        dist.barrier()


def one_rank_that_cannot_write_is_known_to_all() -> None:
    """What cannot be written is told and does not end the run."""
    blocked = FOLDER / "blocked"
    if RANKS.is_first:
        blocked.write_text("a file where a folder is wanted")
    dist.barrier()
    facts = Facts(step=3, reason="", loss=1.0, world=2, eos_id=0, recipe={}, routing={}, source_names=[])
    said = write_rows(blocked if RANKS.rank == 1 else FOLDER / "free", RANKS.rank, mine(), facts)
    assert said is not None and said.startswith("rank 1: rows of update 3 are not in ") and "blocked" in said
    assert write_rows(FOLDER / "free", RANKS.rank, mine(), facts) is None


CHECKS = [replay_gives_the_runs_numbers, one_rank_that_cannot_write_is_known_to_all]

if __name__ == "__main__":
    checks.run(CHECKS[: 1 if RANKS.world == 1 else None])
