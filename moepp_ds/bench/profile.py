"""A trace of one update, with every module of the model by its name (`moepp profile`).

A warm-up update, then the one that is written: `rank0.json.gz` and so on, for chrome://tracing or ui.perfetto.dev. Data
are tokens at random, so routing is that of a fresh model. Regions are those of modules (`blocks.0.moe.router`), of the
engine (`backward`, `optimizer step`), and of the layer's own operators: `_Take` and `_Combine` move rows to the
experts and back, `_AllToAllRows` between ranks, `_ScaleAndConstants` is all zero-computation experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moepp_ds.bench.step import one_update
from moepp_ds.config import Recipe
from moepp_ds.engine import Ranks, build_engine

SHOWN = 20


def profile_update(recipe: Recipe, ranks: Ranks, folder: Path) -> str:
    """Write the trace of this rank into `folder`; returns a table of what took longest. Collective."""
    engine, _ = build_engine(recipe, ranks, eos_id=0)
    engine.train()
    one_update(engine, recipe, ranks)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.device.type == "cuda" else [])]
    with profile(activities=activities) as found, named_regions(engine):
        one_update(engine, recipe, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / f"rank{ranks.rank}.json.gz"))
    key = "self_device_time_total" if ranks.device.type == "cuda" else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=key, row_limit=SHOWN))


@contextmanager
def named_regions(engine: Any) -> Iterator[None]:
    """Inside, forward passes of modules, and the engine's backward passes and steps, are regions of a trace."""
    with ExitStack() as stack:
        for name, module in engine.module.named_modules():
            _name_forward(stack, name or "model", module)
        _name_method(stack, engine, "backward", "backward")
        _name_method(stack, engine, "step", "optimizer step")
        yield


def _name_forward(stack: ExitStack, name: str, module: nn.Module) -> None:
    open_regions: list[Any] = []  # a module that is recomputed runs again, never inside itself

    def enter(*_: Any) -> None:
        open_regions.append(record_function(name))
        open_regions[-1].__enter__()

    def leave(*_: Any) -> None:
        open_regions.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _name_method(stack: ExitStack, engine: Any, method: str, name: str) -> None:
    given: Callable[..., Any] = getattr(engine, method)

    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return given(*args, **kwargs)

    setattr(engine, method, named)
    stack.callback(lambda: delattr(engine, method))
