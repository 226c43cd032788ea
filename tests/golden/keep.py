"""Keep a run's losses as the golden ones: python tests/golden/keep.py RUN_DIR (see README.md beside this file)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

KEPT = ("loss", "lm_loss", "balance_loss", "grad_norm")


def main(run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = {key: [record[key] for record in records] for key in KEPT}
    Path(__file__).with_name("losses.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
