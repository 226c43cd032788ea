"""`moepp bench ...`: measurements as ratios, each to rivals that take turns with it in one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moepp_ds.result_files import Json, Plot, check_place, write_json

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from moepp_ds.bench.presets import LayerSizes

# What needs torch is imported inside: `moepp --help` answers at once.

app = typer.Typer(no_args_is_help=True, help="Measure speed, as ratios to rivals in the same run.")

Preset = Annotated[Literal["0.6b", "1b", "2b", "7b"], typer.Option(help="sizes of the paper's models")]
Tokens = Annotated[int, typer.Option(min=1)]
Dtype = Annotated[Literal["fp32", "bf16"], typer.Option(help="of weights and tokens")]
Repeats = Annotated[int, typer.Option(min=1, help="rounds of which medians are taken")]
Threads = Annotated[int | None, typer.Option(min=1, help="of a CPU; default: PyTorch's choice")]
Device = Annotated[str | None, typer.Option(help="such as cpu or cuda:1; default: the first accelerator")]

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key: model.num_layers=4")
]
Ranks = Annotated[int | None, typer.Option(min=1, help="processes to start; default: parallel.expert_parallel")]
MicroBatches = Annotated[int, typer.Option(min=1, help="of a rank in an update")]

MICRO_BATCH = 16384
"""Tokens of the 0.6B recipe's micro batch. Far fewer leave an expert too few rows for fast products at a small tau."""


@app.command()
def experts(
    preset: Preset = "0.6b",
    taus: Annotated[str, typer.Option(help="separated by commas")] = "1.0,0.75,0.5,0.25,0.1",
    tokens: Tokens = MICRO_BATCH,
    dtype: Dtype = "fp32",
    repeats: Repeats = 7,
    threads: Threads = None,
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """The experts of an MoE++ layer beside the same layer without zero-computation experts, at forced balance."""
    from moepp_ds.bench.experts import bench_experts, print_experts

    given = {"preset": preset, "tokens": tokens, "dtype": dtype, "repeats": repeats}
    at = {"tokens": tokens, "repeats": repeats, **_machine(dtype, threads, device)}

    asked = [_tau(word) for word in taus.split(",")]
    if len({f"{tau:g}" for tau in asked}) < len(asked):
        raise typer.BadParameter(f"taus {taus} has one twice; name each once")
    _report(given, lambda: bench_experts(_sizes(preset), asked, **at), print_experts, json, plot)


@app.command()
def layer(
    preset: Preset = "0.6b",
    tau: Annotated[float, typer.Option(help="of MoE++, in (0, 1]")] = 0.75,
    tokens: Tokens = MICRO_BATCH,
    dtype: Dtype = "fp32",
    repeats: Repeats = 7,
    threads: Threads = None,
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """A whole MoE++ layer beside its vanilla twin, DeepSpeed's, Mixtral's, a loop over experts and a dense FFN."""
    from moepp_ds.bench.layer import bench_layer, print_layer

    given = {"preset": preset, "tokens": tokens, "dtype": dtype, "repeats": repeats}
    at = {"tokens": tokens, "repeats": repeats, **_machine(dtype, threads, device)}
    _report(given, lambda: bench_layer(_sizes(preset), _tau(tau), **at), print_layer, json, plot)


@app.command()
def memory(
    preset: Preset = "0.6b",
    tau: Annotated[float, typer.Option(help="of MoE++, in (0, 1]")] = 0.75,
    tokens: Tokens = MICRO_BATCH,
    dtype: Dtype = "fp32",
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """The memory that these layers take beyond weights and inputs."""
    from moepp_ds.bench.memory import bench_memory, print_memory

    given = {"preset": preset, "tokens": tokens, "dtype": dtype}
    at = {"tokens": tokens, **_machine(dtype, None, device)}
    _report(given, lambda: bench_memory(_sizes(preset), _tau(tau), **at), print_memory, json, plot)


@app.command()
def growth(
    preset: Preset = "0.6b",
    tau: Annotated[float, typer.Option(help="of MoE++, in (0, 1]")] = 0.75,
    tokens: Annotated[int, typer.Option(min=1, help="the fewest; the most are 8 times as many")] = 4096,
    dtype: Dtype = "fp32",
    repeats: Repeats = 7,
    threads: Threads = None,
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """The time of a token in a MoE++ layer with more tokens, and with more experts."""
    from moepp_ds.bench.growth import bench_growth, print_growth

    given = {"preset": preset, "tau": tau, "dtype": dtype, "repeats": repeats}
    at = {"tokens": tokens, "repeats": repeats, **_machine(dtype, threads, device)}
    _report(given, lambda: bench_growth(_sizes(preset), _tau(tau), **at), print_growth, json, plot)


@app.command()
def trained(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a checkpoint, or of a run: its newest")],
    rows: Annotated[int, typer.Option(min=1, help="held-out rows that are routed at once")] = 8,
    dtype: Dtype = "fp32",
    repeats: Repeats = 7,
    threads: Threads = None,
    device: Device = None,
    overrides: Overrides = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """The experts of a trained model, by its own routing of held-out text, beside their vanilla twin."""
    from moepp_ds.bench.trained import bench_trained, print_trained
    from moepp_ds.load import load_model

    _check_places(json, plot)
    loaded = load_model(checkpoint, overrides or [], **_machine(dtype, threads, device))
    given = {"checkpoint": str(loaded.folder), "dtype": dtype, "repeats": repeats}
    _report(given, lambda: bench_trained(loaded, rows=rows, repeats=repeats), print_trained, json, plot)


@app.command()
def step(
    path: RecipeFile,
    ranks: Ranks = None,
    overrides: Overrides = None,
    beside: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="and the recipe with this: train.compile=true")
    ] = None,
    micro_batches: MicroBatches = 1,
    repeats: Repeats = 7,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """A whole update of a recipe beside its vanilla twin's, on RANKS ranks, at forced balance."""
    from moepp_ds.bench.on_ranks import on_ranks
    from moepp_ds.config import load_recipe

    _check_places(json, plot)
    loaded = load_recipe(path, overrides or [])
    with on_ranks(ranks or loaded.parallel.expert_parallel) as joined:
        from moepp_ds.bench.step import bench_step, load_cases, print_step

        recipes = load_cases(path, overrides or [], beside or [], world=joined.world, micro_batches=micro_batches)
        given = {"recipe": str(path), "set": overrides or [], "beside": beside or [], "repeats": repeats}
        run = partial(bench_step, recipes, joined, repeats=repeats)
        _report(given, run, print_step, json, plot, first=joined.is_first)


@app.command()
def all2all(
    preset: Preset = "0.6b",
    ranks: Annotated[int, typer.Option(help="processes to start, at least 2")] = 2,
    tau: Annotated[float, typer.Option(help="of MoE++, in (0, 1]")] = 0.75,
    tokens: Annotated[int, typer.Option(min=1, help="of each rank")] = MICRO_BATCH,
    dtype: Dtype = "fp32",
    repeats: Repeats = 7,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """What expert parallelism sends, to the byte, and what it costs a layer, at forced balance."""
    from moepp_ds.bench.on_ranks import on_ranks

    _check_places(json, plot)
    aimed = _tau(tau)
    with on_ranks(ranks) as joined:
        from moepp_ds.bench.all2all import bench_all2all, print_all2all

        given = {"preset": preset, "tokens": tokens, "dtype": dtype, "repeats": repeats}
        run = partial(
            bench_all2all, _sizes(preset), aimed, joined, tokens=tokens, dtype=_dtype(dtype), repeats=repeats
        )
        _report(given, run, print_all2all, json, plot, first=joined.is_first)


@app.command()
def save(
    path: RecipeFile,
    folder: Annotated[Path, typer.Option(help="on the disk to be measured; left as it was, or made and removed")],
    ranks: Ranks = None,
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="of each kind of write")] = 5,
    json: Json = None,
) -> None:
    """How long a checkpoint of a recipe's model stops training, beside a plain write of as many bytes."""
    from moepp_ds.bench.on_ranks import on_ranks
    from moepp_ds.config import load_recipe

    check_place(json)
    loaded = load_recipe(path, overrides or [])
    with on_ranks(ranks or loaded.parallel.expert_parallel) as joined:
        from moepp_ds.bench.save import bench_save, report

        result = bench_save(loaded, joined, folder, repeats=repeats)
        if joined.is_first:
            write_json(json, result)
            print("\n".join(report(result)), flush=True)


def _report(
    given: dict[str, Any],
    run: Callable[[], Any],
    show: Callable[[Any, Console], None],
    json: Path | None,
    plot: Path | None,
    *,
    first: bool = True,
) -> None:
    """Measure, write the result beside what was given, and show it; what cannot be measured is a mistake in options.

    first: of several ranks one writes and shows.
    """
    from dataclasses import asdict

    from rich.console import Console

    _check_places(json, plot)
    result = run()
    if first:
        write_json(json, {**given, **asdict(result)})
        show(result, Console())
        if plot is not None:
            from moepp_ds.bench.plot import write_plot  # matplotlib is loaded for it alone

            write_plot(plot, result)


def _check_places(json: Path | None, plot: Path | None) -> None:
    """Refuse files that cannot be written, before anything is measured, or ranks are started, for them."""
    check_place(json)
    check_place(plot, "--plot")


def _sizes(preset: str) -> LayerSizes:
    from moepp_ds.bench.presets import PRESETS

    return PRESETS[preset]


def _tau(word: str | float) -> float:
    """A number in (0, 1]. Raises BadParameter."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise typer.BadParameter(f"tau {word} is not in (0, 1]")
    return number


def _machine(dtype: str, threads: int | None, device: str | None) -> dict[str, Any]:
    """The dtype and the device of a measurement, on so many threads, with memory that is kept."""
    import torch

    from moepp_ds.freed_memory import keep_freed_memory
    from moepp_ds.load import default_device

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    return {
        "dtype": _dtype(dtype),
        "device": torch.device(device) if device else default_device(),
    }


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
