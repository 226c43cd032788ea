"""One rank that takes steps from a loader over a recipe's data and leaves its rows on the disk.

Standard input: {"data": section, "rank", "world", "batch_rows", "micro", "steps", "state": or null, "out": folder}.
It prints `open`, waits for a line, takes its steps, writes OUT/<rank>.npy ([rows, S + 1], in the order of the micro
batches' first rows) and OUT/<rank>.json (the loader's state), and prints what went wrong instead if something does.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.document import DataError
from data_pipeline.feed import open_rows
from data_pipeline.loader import Loader


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    try:
        _run(asked)
    except DataError as error:
        print(f"error: {error}", flush=True)


def _run(asked: dict) -> None:
    with closing(open_rows(DataConfig.model_validate(asked["data"]))) as rows:
        print("open", flush=True)
        sys.stdin.readline()
        layout = {"rank": asked["rank"], "world": asked["world"], "batch_rows": asked["batch_rows"]}
        with Loader(rows, **layout, micro_batch_size=asked["micro"], state=asked["state"]) as loader:
            steps = [next(loader) for _ in range(asked["steps"])]
            state = loader.state()
    out = Path(asked["out"])
    batches = [batch for step in steps for batch in step]
    np.save(out / f"{asked['rank']}.npy", np.concatenate([batch.tokens_BS1 for batch in batches]))
    state["row_starts"] = [batch.row_start for batch in batches]
    (out / f"{asked['rank']}.json").write_text(json.dumps(state))
    print("done", flush=True)


if __name__ == "__main__":
    main()
