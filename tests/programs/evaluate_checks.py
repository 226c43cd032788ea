"""Two ranks, which hold half of the FFN experts each, score held-out text; tests/test_evaluate.py starts them.

    ... --module tests.programs.evaluate_checks FOLDER [OVERRIDE ...]

FOLDER/shards holds the text. Each rank writes what it got to FOLDER/scores-RANK.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from data_pipeline.stream import open_held_out
from moepp_ds.engine import join_ranks
from moepp_ds.evaluate import evaluate
from tests.programs import checks, tiny

FOLDER = Path(sys.argv[1])


def scores_are_written() -> None:
    ranks = join_ranks()
    asked = tiny.recipe(*sys.argv[2:], expert_parallel=2)
    model = tiny.engine_for(asked, ranks).module
    assert model.training
    scores = evaluate(
        model,
        open_held_out(asked.data),
        ranks=ranks,
        seq_len=tiny.SEQUENCE,
        micro_batch_size=tiny.MICRO_BATCH,
        rows=asked.evaluation.rows,
    )
    assert model.training
    written = {source: asdict(score) for source, score in scores.items()}
    (FOLDER / f"scores-{ranks.rank}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    join_ranks()
    checks.run([scores_are_written])
