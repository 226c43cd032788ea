"""Named checks that several ranks run together, one start of the ranks for many checks.

A program under tests/programs lists its checks and calls `run`; each rank prints a line per check. The test file
starts the program once with `start` and asserts each check by name.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

MARK = "CHECK "


def run(checks: Sequence[Callable[[], None]]) -> None:
    """Run the checks in order on this rank. The first that fails ends it: the ranks are out of step then.

    At the end the ranks part: connections that are still there when Python ends may abort it.
    """
    rank = int(os.environ["RANK"])
    for check in checks:
        started = time.perf_counter()
        try:
            check()
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        record = {"name": check.__name__, "rank": rank, "failure": failure, "seconds": time.perf_counter() - started}
        sys.stdout.write(MARK + json.dumps(record) + "\n")
        sys.stdout.flush()
        if failure:
            os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def start(
    module: str, arguments: Sequence[str] = (), *, world: int, log: Path, launcher: str = "torchrun"
) -> dict[str, str]:
    """Start `module` on `world` CPU ranks of this machine; return, by check, what went wrong ("" where nothing).

    launcher: `deepspeed`, or torch's `torchrun`, which starts sooner, where the launcher adds nothing.
    """
    from conftest import find_free_port, run_in_group  # a program that runs checks has no pytest

    port = str(find_free_port())
    if launcher == "deepspeed":
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
        command += ["--master_port", port, "--module", module, *arguments]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        command += ["--master_port", port, "--module", module, *arguments]
    # DeepSpeed hands functions of an optimizer not used here to torch.compile, whose import takes each rank seconds
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    code = run_in_group(command, env, log, 150.0)
    output = log.read_text(errors="replace")
    found: dict[str, list[dict[str, Any]]] = {}
    for line in output.splitlines():
        _, mark, record = line.partition(MARK)
        if mark:
            parsed = json.loads(record)
            found.setdefault(parsed["name"], []).append(parsed)
    results = {
        name: next((f"rank {r['rank']}: {r['failure']}" for r in records if r["failure"]), "")
        for name, records in found.items()
    }
    for name, records in found.items():
        if len(records) < world and not results[name]:
            results[name] = f"only {len(records)} of {world} ranks came through:\n{output[-4000:]}"
    if code != 0 and not any(results.values()):
        ended = "was stopped after 150 s" if code is None else f"ended with code {code}"
        results["program"] = f"{module} {ended}:\n{output[-4000:]}"
    return results


def expect(results: dict[str, str], name: str) -> None:
    """Assert that a check was run by every rank and found nothing wrong."""
    assert "program" not in results or name in results, results["program"]
    assert name in results, f"{name} was not run; run were {', '.join(results)}\n" + "\n".join(results.values())
    assert not results[name], results[name]
