"""Making run folders by the golden recipe, and reading them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from conftest import LaunchDeepspeed

GOLDEN_RECIPE = "tests/golden/golden.yaml"

TOLERANCES = {"loss": 1e-4, "lm_loss": 1e-4, "balance_loss": 5e-4, "grad_norm": 1e-4}
"""What the golden file keeps of each update, and how closely another layout or machine must agree, relative.

A rounding that flips one near-tie of the router moves one of 2,048 assignments, and the balance loss by 5e-5.
"""

UNTIMED = (
    *("loss", "lm_loss", "balance_loss", "z_loss", "grad_norm", "lr", "tokens", "layers"),
    *("sampled_share", "epochs", "validation"),
)
"""What two runs of the same arithmetic share in metrics.jsonl; the rest is time."""


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, in order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The records without their speed, for comparing runs digit for digit."""
    return [{key: record[key] for key in UNTIMED if key in record} for record in metrics(run)]


def status(run: Path) -> dict[str, Any]:
    """The completion marker, without when, where and by whom it was written, and what it stands on."""
    marker = json.loads((run / "status.json").read_text())
    for key in ("time", "host", "pid", "checkpoint"):
        del marker[key]
    return marker


def drawn(picture: Path) -> set[str]:
    """What is written in a picture of matplotlib's, an .svg: each text stands beside its outlines."""
    return set(re.findall(r"<!-- (.*?) -->", picture.read_text()))


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def train(launch: LaunchDeepspeed, run: Path, *settings: str, world: int = 2, ep: int = 2, resume: str = "none") -> str:
    """Run the golden recipe under the real launcher; return what was printed."""
    arguments = [GOLDEN_RECIPE, "--run-dir", str(run), "--resume", resume]
    done = launch(world, "moepp_ds.train", [*arguments, *sets(f"parallel.expert_parallel={ep}", *settings)])
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def finished(
    launch: LaunchDeepspeed, kept: Path, name: str, *settings: str, world: int = 2, ep: int = 2
) -> list[dict[str, Any]]:
    """The records of the golden recipe's run `name`, which is run once."""
    if not (kept / name).exists():
        train(launch, kept / name, *settings, world=world, ep=ep)
    assert status(kept / name) == {"state": "completed", "step": 20, "message": ""}
    return untimed(kept / name)
