"""What memory a layer takes beyond weights and inputs, beside its rivals (`moepp bench memory`).

The highest sum of all tensors that PyTorch has at a time while the layer runs, over what there was before: outputs,
what is kept for the backward pass, gradients of weights and tokens, and whatever is needed in passing. On a CPU
scratch memory inside of matrix products, which PyTorch does not see, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import torch
from rich.console import Console
from rich.table import Table

from moepp_ds.bench.cases import DIRECTIONS, in_words, machine
from moepp_ds.bench.layer import OWN, layer_cases
from moepp_ds.bench.presets import LayerSizes


@dataclass(frozen=True)
class MemoryResult:
    """What was measured, and where. peak_bytes: by direction and layer."""

    machine: dict[str, Any]
    tau: float
    peak_bytes: dict[str, dict[str, int]]


def bench_memory(
    sizes: LayerSizes, tau: float, *, tokens: int, dtype: torch.dtype, device: torch.device
) -> MemoryResult:
    """Run the layers of `bench layer` once each way. Raises RecipeError for a tau that cannot be in balance."""
    cases = layer_cases(sizes, tau, tokens=tokens, dtype=dtype, device=device)
    layers = {name: case for name, case in cases.items() if not name.startswith("products")}
    peaks = {
        direction: {name: peak_bytes(getattr(case, direction), device) for name, case in layers.items()}
        for direction in DIRECTIONS
    }
    return MemoryResult(machine(device), tau, peaks)


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors take during the action, beyond what they take before. Bytes."""
    action()  # what is made once, and kept, does not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = orjson.loads(trace.read_bytes())["traceEvents"]
    changes = [event["args"] for event in sorted(events, key=lambda event: event["ts"]) if event["name"] == "[memory]"]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(change["Total Allocated"] for change in changes) - before


def print_memory(result: MemoryResult, console: Console) -> None:
    """A line for each layer."""
    what = f"memory at its highest beyond weights and inputs, MoE++ at tau {result.tau:g}"
    console.print(f"{what}; {in_words(result.machine)}")
    table = Table("", *(head for name in ("forward", "forward + backward") for head in (name, f"of {OWN}")))
    for name in result.peak_bytes[DIRECTIONS[0]]:
        cells = []
        for peaks in result.peak_bytes.values():
            cells += [f"{peaks[name] / 1e6:,.0f} MB", f"{peaks[name] / peaks[OWN]:.2f}"]
        table.add_row(name, *cells)
    console.print(table)
