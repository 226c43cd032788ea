"""Reading the run folders that tests make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN_RECIPE = "tests/golden/golden.yaml"

UNTIMED = ("loss", "lm_loss", "balance_loss", "grad_norm", "lr", "tokens", "layers", "sampled_share", "validation")
"""What two runs of the same arithmetic share in metrics.jsonl; the rest is time."""


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, in order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The records without their speed, for comparing runs digit for digit."""
    return [{key: record[key] for key in UNTIMED if key in record} for record in metrics(run)]


def status(run: Path) -> dict[str, Any]:
    """The completion marker."""
    return json.loads((run / "status.json").read_text())
