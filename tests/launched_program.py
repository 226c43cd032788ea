"""A program to launch: to the launcher it is like `moepp_ds.train`, but it loads neither torch nor deepspeed.

    python -m tests.launched_program RECIPE [--set key=value ...] [--run-dir DIR] [--resume ...]

Rank 0 writes metrics.jsonl and status.json. The environment tells it how to behave:
STEPS    how many steps of 20 ms the run has (default: without end)
SAVING   seconds that saving takes after SIGTERM (default 1)
DEAF     when set, ignore SIGTERM
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: asked.append(signum))
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--resume", default="none")
    parser.add_argument("--set", action="append")
    parser.add_argument("--local_rank")
    args = parser.parse_args()
    rank, steps = int(os.environ["RANK"]), float(os.environ.get("STEPS", "inf"))
    supervisor = int(os.environ.get("MOEPP_SUPERVISOR_PID", "0"))
    args.run_dir.mkdir(parents=True, exist_ok=True)
    (args.run_dir / f"rank{rank}.pid").write_text(str(os.getpid()))

    def write_status(state: str, step: int) -> None:
        if rank == 0:
            new = args.run_dir / "status.json.new"
            new.write_text(json.dumps({"state": state, "step": step, "message": ""}))
            new.replace(args.run_dir / "status.json")

    step = 0
    write_status("running", step)
    while step < steps:
        step += 1
        time.sleep(0.02)
        if rank == 0:
            with (args.run_dir / "metrics.jsonl").open("a") as metrics:
                metrics.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
        parent_gone = supervisor and not Path(f"/proc/{supervisor}").exists()
        if (asked and "DEAF" not in os.environ) or parent_gone:
            time.sleep(float(os.environ.get("SAVING", "1")))
            (args.run_dir / f"saved{rank}").touch()
            write_status("stopped", step)
            return 0
    write_status("completed", step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
