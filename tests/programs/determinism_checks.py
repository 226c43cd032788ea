"""What is identical across what, on two ranks with expert parallelism 2; started by tests/test_engine.py.

    ... --module tests.programs.determinism_checks FILE [once]      where the digests of all weights and moments go

With `once` it trains once, for another process's digests to be compared with, and checks nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch._dynamo.utils import counters

from data_pipeline.loader import Batch
from moepp_ds.engine import join_ranks
from tests.programs import checks, tiny

RANKS = join_ranks()
FILE, ONCE = Path(sys.argv[1]), "once" in sys.argv


def runs_are_the_same_bits() -> None:
    """With train.deterministic; again in this process, and, by the digests in the file, in another one."""
    found = {}
    for precision in ("fp32", "bf16"):
        recipe = tiny.recipe("train.deterministic=true", expert_parallel=RANKS.world, precision=precision)
        runs = []
        for _ in range(1 if ONCE else 2):
            engine = tiny.engine_for(recipe, RANKS)
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()  # what is not deterministic would raise
            runs.append((tiny.train(engine, recipe, RANKS, range(3)), tiny.global_arrays(engine)))
        (losses, arrays), (again, arrays_again) = runs[0], runs[-1]
        assert losses == again
        tiny.same(arrays, arrays_again)
        digests = {name: hashlib.sha256(array.numpy().tobytes()).hexdigest() for name, array in arrays.items()}
        found[precision] = {"losses": losses, **digests}
    if RANKS.is_first:
        FILE.write_text(json.dumps(found))


def a_recipe_without_it_allows_everything_again() -> None:
    recipe = tiny.recipe(expert_parallel=RANKS.world)
    tiny.engine_for(recipe, RANKS)
    assert not torch.are_deterministic_algorithms_enabled()


def activation_checkpointing_changes_no_bit() -> None:
    """Although with full checkpointing assignments travel again, and in the meantime other layers' have."""
    found = []
    for how in ("none", "selective", "full"):
        recipe = tiny.recipe(f"train.activation_checkpointing={how}", expert_parallel=RANKS.world)
        engine = tiny.engine_for(recipe, RANKS)
        found.append((tiny.train(engine, recipe, RANKS, range(3)), tiny.global_arrays(engine)))
    (losses, arrays), *others = found
    for losses_again, arrays_again in others:
        assert losses == losses_again
        tiny.same(arrays, arrays_again)


def compiling_changes_rounding_alone() -> None:
    """Dropless: rounding can decide who gets a last seat. What of the model is compiled is so without interruption."""
    os.environ.pop("TORCHDYNAMO_DISABLE", None)  # set for other tests
    dropless = ("model.moe.dropless=true", "train.gradient_clipping=0")
    eager = tiny.recipe(*dropless, expert_parallel=RANKS.world)
    expected = tiny.train(tiny.engine_for(eager, RANKS), eager, RANKS, range(3))
    for how in ("none", "selective"):
        settings = (*dropless, "train.compile=true", f"train.activation_checkpointing={how}")
        compiled = tiny.recipe(*settings, expert_parallel=RANKS.world)
        losses = tiny.train(tiny.engine_for(compiled, RANKS), compiled, RANKS, range(3))
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
    assert counters["stats"]["unique_graphs"] >= 3 and not counters["graph_break"]


def joined(first: Batch, second: Batch) -> Batch:
    """Two micro batches as one."""
    tokens = np.concatenate([first.tokens_BS1, second.tokens_BS1])
    return Batch(tokens, first.row_start, np.concatenate([first.source_B, second.source_B]))


def other_micro_batches_change_rounding_alone_where_none_are_counted() -> None:
    """Dropless and without balance loss; else capacity and balance are counted per micro batch, and so change."""
    settings = ("model.moe.dropless=true", "model.moe.balance=none", "train.gradient_clipping=0")
    by_two = tiny.recipe(*settings, expert_parallel=RANKS.world)
    expected = tiny.train(tiny.engine_for(by_two, RANKS), by_two, RANKS, range(3))
    by_four = tiny.recipe(*settings, "train.micro_batch_size=4", expert_parallel=RANKS.world)
    engine, losses = tiny.engine_for(by_four, RANKS), []
    for step in range(3):
        pairs = tiny.micro_batches(step)
        mine = [joined(pairs[at], pairs[at + 1]) for at in (0, 2)][RANKS.rank :: RANKS.world]
        result = tiny.update(
            engine, mine, RANKS, rate=by_four.learning_rate(step), num_sources=1, stop=lambda: False
        )
        losses.append((result.loss, result.grad_norm))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)


def bf16_is_near_fp32() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        recipe = tiny.recipe("train.max_lr=1e-3", expert_parallel=RANKS.world, precision=precision)
        losses[precision] = tiny.train(tiny.engine_for(recipe, RANKS), recipe, RANKS, range(3))
    assert losses["bf16"] != losses["fp32"]
    near = [[loss for loss, _ in losses[precision]] for precision in ("bf16", "fp32")]
    torch.testing.assert_close(torch.tensor(near[0]), torch.tensor(near[1]), rtol=1e-2, atol=0)


if __name__ == "__main__":
    checks.run(
        [runs_are_the_same_bits]
        if ONCE
        else [
            runs_are_the_same_bits,
            a_recipe_without_it_allows_everything_again,
            activation_checkpointing_changes_no_bit,
            compiling_changes_rounding_alone,
            other_micro_batches_change_rounding_alone_where_none_are_counted,
            bf16_is_near_fp32,
        ]
    )
