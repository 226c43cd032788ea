"""Two ranks, expert parallelism 2, of which the second stops coming. tests/test_engine.py starts them.

    ... --module tests.programs.slow_rank WHERE SECONDS      WHERE: world or experts
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from moepp_ds.engine import LostRankError, join_ranks, naming_lost_ranks
from moepp_ds.expert_parallel import ExpertParallelMoE
from tests.programs import tiny


def main(where: str, seconds: int) -> None:
    ranks = join_ranks(timeout=120)
    recipe = tiny.recipe(f"safety.collective_timeout={seconds}", expert_parallel=2)
    engine = tiny.engine_for(recipe, ranks)
    tiny.train(engine, recipe, ranks, range(1))
    if ranks.rank == 1:
        time.sleep(600)
    started = time.monotonic()
    try:
        with naming_lost_ranks(recipe, ranks):
            dist.all_reduce(torch.zeros(1), group=experts_group(engine) if where == "experts" else None)
    except LostRankError as error:
        print(f"ENDED after {time.monotonic() - started:.0f} s: {error}", flush=True)
        sys.exit(1)


def experts_group(engine: Any) -> Any:
    """The group that DeepSpeed made for the exchange of assignments."""
    return next(layer for layer in engine.modules() if isinstance(layer, ExpertParallelMoE)).exchange.group


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
