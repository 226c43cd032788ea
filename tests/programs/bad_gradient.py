"""Two ranks; from its second micro batch on, rank 1's gradient is no number. Prints what `update` says, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from data_pipeline.loader import Loader
from data_pipeline.stream import open_stream
from moepp_ds.config import load_recipe
from moepp_ds.engine import build_engine, join_ranks
from moepp_ds.update import NonFiniteError, update


def main() -> None:
    recipe = load_recipe("tests/golden/golden.yaml", ["parallel.expert_parallel=2"])
    ranks = join_ranks()
    stream = open_stream(recipe.data)
    engine, _ = build_engine(recipe, ranks, eos_id=stream.tokenizer.eos_id)
    weight = engine.module.blocks[1].attention.q_proj.weight
    if ranks.rank == 1:
        weight.register_hook(_spoil_every_second())
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    batch_rows, micro = recipe.batch_rows, recipe.train.micro_batch_size
    with Loader(stream, rank=ranks.rank, world=2, batch_rows=batch_rows, micro_batch_size=micro) as loader:
        try:
            update(engine, next(loader), ranks, rate=1e-3, num_sources=7, stop=lambda: False)
            said = "nothing"
        except NonFiniteError as error:
            said = str(error)
    same = all(torch.equal(old, new) for old, new in zip(before, engine.module.parameters()))
    print(json.dumps({"rank": ranks.rank, "said": said, "weights_same": same}), flush=True)
    torch.distributed.barrier()


def _spoil_every_second() -> object:
    good: Iterator[bool] = iter([True, False] * 10)

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient if next(good) else torch.full_like(gradient, float("nan"))

    return hook


if __name__ == "__main__":
    main()
