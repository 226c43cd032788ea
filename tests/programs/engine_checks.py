"""One process without a launcher joins its ranks and builds an engine. Prints what it found, as JSON."""

from __future__ import annotations

import json
import os

import torch.distributed as dist

from moepp_ds.ds_config import deepspeed_config
from moepp_ds.engine import build_engine, join_ranks
from tests.programs import tiny


def main() -> None:
    ranks = join_ranks()
    again = join_ranks()  # whoever joined already stays as it is
    asked = tiny.recipe("train.gradient_clipping=0.5", precision="bf16")
    engine, given = build_engine(asked, ranks, eos_id=0)
    found = {
        "rank": ranks.rank,
        "world": ranks.world,
        "device": str(ranks.device),
        "is_first": ranks.is_first,
        "same_again": again == ranks,
        "backend": dist.get_backend(),
        "environment": {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")},
        "given": given,
        "expected": deepspeed_config(asked, world=1),
        "rates": [group["lr"] for group in engine.optimizer.param_groups],
        "first_rate": asked.learning_rate(0),
        "weights": sorted({str(parameter.dtype) for parameter in engine.module.parameters()}),
    }
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
