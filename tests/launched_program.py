"""A program to launch: to the launcher it is like `moepp_ds.train`, but it loads neither torch nor deepspeed.

    python -m tests.launched_program RECIPE [--set key=value ...] [--run-dir DIR] [--resume ...]

Rank 0 writes metrics.jsonl and status.json. The environment tells it how to behave:
STEPS    how many steps of 20 ms the run has (default: without end)
SAVING   seconds that saving takes after SIGTERM or SIGUSR1 (default 1)
DEAF     when set, ignore both
SAVE_EVERY      steps between checkpoints, of which there is only the file `latest`; a resumed run goes on from it
FAIL_AT         the steps at which rank 0 fails; FAIL_FOR_GOOD says that another start would fail as well
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
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda signum, frame: asked.append(signum))
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

    def write_status(state: str, step: int, **more: object) -> None:
        if rank == 0:
            new = args.run_dir / "status.json.new"
            new.write_text(json.dumps({"state": state, "step": step, "message": "", **more}))
            new.replace(args.run_dir / "status.json")

    latest = args.run_dir / "checkpoints" / "latest"
    if rank == 0:
        with (args.run_dir / "resumed").open("a") as resumed:
            resumed.write(f"{args.resume}\n")
    save_every, fail_at = int(os.environ.get("SAVE_EVERY", "0")), os.environ.get("FAIL_AT", "").split()
    step = int(latest.read_text().removeprefix("step-")) if args.resume == "auto" and latest.exists() else 0
    write_status("running", step)
    while step < steps:
        step += 1
        time.sleep(0.02)
        if rank == 0:
            with (args.run_dir / "metrics.jsonl").open("a") as metrics:
                metrics.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
        if rank == 0 and save_every and step % save_every == 0:
            latest.parent.mkdir(exist_ok=True)
            latest.with_suffix(".new").write_text(f"step-{step:08d}\n")
            latest.with_suffix(".new").replace(latest)
        if rank == 0 and str(step) in fail_at:
            for_good = {"restart": False} if "FAIL_FOR_GOOD" in os.environ else {}
            write_status("failed", step, **{**for_good, "message": "as it was told"})
            return 1
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
