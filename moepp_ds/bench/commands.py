"""`moepp bench ...`: measurements as ratios, each to rivals that take turns with it in one process."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moepp_ds.json_option import Json, check_place, write_json

# What needs torch is imported inside: `moepp --help` answers at once.

app = typer.Typer(no_args_is_help=True, help="Measure speed, as ratios to rivals in the same run.")


@app.callback()
def _group() -> None:
    """Have even a single command called by its name."""


@app.command()
def experts(
    preset: Annotated[Literal["0.6b", "1b", "2b", "7b"], typer.Option(help="sizes of the paper's models")] = "0.6b",
    taus: Annotated[str, typer.Option(help="separated by commas")] = "1.0,0.75,0.5,0.25,0.1",
    tokens: Annotated[int, typer.Option(min=1)] = 4096,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="of weights and tokens")] = "fp32",
    repeats: Annotated[int, typer.Option(min=1, help="rounds of which medians are taken")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="of a CPU; default: PyTorch's choice")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda:1; default: the first accelerator")] = None,
    json: Json = None,
) -> None:
    """The experts of an MoE++ layer beside the same layer without zero-computation experts, at forced balance."""
    from dataclasses import asdict

    import torch
    from rich.console import Console

    from moepp_ds.bench.experts import bench_experts, print_experts
    from moepp_ds.bench.presets import PRESETS
    from moepp_ds.load import default_device

    check_place(json)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        result = bench_experts(
            PRESETS[preset],
            _numbers(taus),
            tokens=tokens,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
            device=torch.device(device) if device else default_device(),
            repeats=repeats,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--taus") from None
    write_json(json, {"preset": preset, "tokens": tokens, "dtype": dtype, "repeats": repeats, **asdict(result)})
    print_experts(result, Console())


def _numbers(text: str) -> list[float]:
    """The taus of --taus; each in (0, 1]."""
    numbers = [float(word) for word in text.split(",")]
    for number in numbers:
        if not 0 < number <= 1:
            raise ValueError(f"tau {number:g} is not in (0, 1]")
    return numbers
