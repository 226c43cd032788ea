"""How long a checkpoint stops training, and what memory saving and loading take (`moepp bench save`).

1. Build the recipe's engine; its data are not needed. Fill the optimizer as if it had trained.
2. In turns, `repeats` times: every rank writes as many bytes as its fragments have to a file of its own and waits for
   the disk (the plain write); a save in the foreground; a save in the background. Of the saves only the two parts
   count that stop training: writing or copying, and publishing.
3. Each time is that of the slowest rank; what is compared are medians.
4. The memory of each rank at its highest, beyond what it was before, in a save of either kind and in a load.

The folder must be on the disk that checkpoints will be on; it is left as it was, or made and removed again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from moepp_ds.agreement import gather
from moepp_ds.bench.on_ranks import slowest
from moepp_ds.checkpoint.chunks import CHUNK_BYTES
from moepp_ds.checkpoint.fragments import owned_fragments
from moepp_ds.checkpoint.live import Saver, load_checkpoint
from moepp_ds.config import Recipe
from moepp_ds.engine import Ranks, build_engine

KINDS_OF_WRITE = ("plain", "foreground", "background")


def bench_save(recipe: Recipe, ranks: Ranks, folder: Path, *, repeats: int) -> dict[str, Any]:
    """Measure with this recipe's model and layout; the same on every rank. Collective."""
    engine, _ = build_engine(recipe, ranks, eos_id=0)
    root = folder / "bench-save"
    made: list[Path] = []
    if ranks.is_first:
        made = [parent for parent in (root, *root.parents) if not parent.exists()]
        root.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    try:
        return measure(engine, root, repeats=repeats)
    finally:
        dist.barrier()
        if ranks.is_first:
            shutil.rmtree(root, ignore_errors=True)
            for parent in made[1:]:
                with suppress(OSError):  # somebody else has put something there
                    parent.rmdir()


def measure(engine: Any, root: Path, *, repeats: int) -> dict[str, Any]:
    """Times and memory of saving and loading this engine, under `root`; the same on every rank. Collective."""
    fragments = _fill(engine)
    memory, seconds = {}, {name: [] for name in KINDS_OF_WRITE}  # type: ignore[var-annotated]
    foreground = Saver(engine, root / "foreground", keep=1)
    memory["foreground"] = _highest(lambda: _save(foreground, 0))
    savers: list[Saver] = []

    def first_in_background() -> None:
        savers.append(Saver(engine, root / "background", keep=1, background=True))
        _save(savers[0], 0)

    memory["background"] = _highest(first_in_background)
    for step in range(1, repeats + 1):
        seconds["plain"].append(slowest(lambda: _write_plainly(root, fragments)))
        seconds["foreground"].append(_stopped(foreground, step))
        seconds["background"].append(_stopped(savers[0], step))
    last = foreground.last
    assert last is not None
    memory["load"] = _highest(lambda: load_checkpoint(engine, last))
    for saver in (foreground, *savers):
        saver.close()
    typical = {name: median(times) for name, times in seconds.items()}
    return {
        "ranks": dist.get_world_size(),
        "fragment_bytes": gather(fragments),
        "seconds": seconds,
        "of_plain": {name: typical[name] / typical["plain"] for name in KINDS_OF_WRITE[1:]},
        "memory_bytes": {name: gather(growth) for name, growth in memory.items()},
    }


def _fill(engine: Any) -> int:
    """Give every fragment numbers, so that its memory is really there; the bytes of this rank's fragments."""
    total = 0
    for fragment in owned_fragments(engine):
        for tensor in fragment.tensors.values():
            tensor.uniform_(1e-4, 1e-3)
            total += tensor.nbytes
    return total


def _save(saver: Saver, step: int) -> None:
    saver.save(step=step, facts={"data": None})
    saver.complete()


def _stopped(saver: Saver, step: int) -> float:
    """Seconds for which a save stops training."""
    stopped = slowest(lambda: saver.save(step=step, facts={"data": None}))
    while not saver.ready:
        time.sleep(0.01)
    return stopped + slowest(saver.complete)


def _write_plainly(root: Path, size: int) -> None:
    """Write so many bytes to a file of this rank's own, and wait until the disk has them."""
    file = root / f"plain-{dist.get_rank()}"
    content = memoryview(bytes(range(256)) * (CHUNK_BYTES // 256))
    with file.open("wb", buffering=0) as out:
        for start in range(0, size, CHUNK_BYTES):
            out.write(content[: size - start])
        os.fsync(out.fileno())


def _highest(action: Callable[[], object]) -> int:
    """How far this process's memory goes, in the action, beyond what it is before. Bytes."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = _memory("VmRSS")
    action()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(found.split()[1]) * 1024


def report(found: dict[str, Any]) -> list[str]:
    """The measurements in words."""
    largest = max(found["fragment_bytes"])
    lines = [f"{found['ranks']} ranks, up to {largest / 1e6:,.1f} MB of fragments each"]
    for name, times in found["seconds"].items():
        share = f"  {found['of_plain'][name]:.2f} of the plain write" if name in found["of_plain"] else ""
        spread = f"{min(times):.3f} to {max(times):.3f}"
        lines.append(f"{name:10}  {median(times):8.3f} s, median of {len(times)} ({spread}){share}")
    for name, growth in found["memory_bytes"].items():
        lines.append(f"{name:10}  {max(growth) / 1e6:8.1f} MB more memory at most, {max(growth) / largest:.2f} of that")
    return lines
