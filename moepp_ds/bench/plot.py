"""Pictures of measurements (--plot FILE): bars for what took turns, curves for what changes with one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from statistics import median
from textwrap import wrap

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from moepp_ds.bench.all2all import AllToAllResult
from moepp_ds.bench.cases import DIRECTIONS, in_words
from moepp_ds.bench.experts import ExpertsResult
from moepp_ds.bench.growth import GrowthResult
from moepp_ds.bench.layer import LayerResult
from moepp_ds.bench.memory import MemoryResult
from moepp_ds.bench.step import StepResult
from moepp_ds.bench.trained import TrainedResult
from moepp_ds.config import RecipeError


def write_plot(file: Path, result: object) -> None:
    """Draw a result into a file, of the kind that its name ends in. Raises RecipeError."""
    figure = draw(result)
    try:
        figure.savefig(file)
    except OSError as error:
        raise RecipeError(f"--plot {file} cannot be written: {error.strerror}; name another file") from None


@singledispatch
def draw(result: object) -> Figure:
    """The picture of a result."""
    raise TypeError(f"{type(result).__name__} has no picture")


@draw.register
def _(result: ExpertsResult) -> Figure:
    return _speedups(result, "tau", [row.tau for row in result.rows], log=True)


@draw.register
def _(result: LayerResult) -> Figure:
    title = f"MoE++ at tau {result.tau:g} and its rivals; {in_words(result.machine)}"
    return _bars(title, "seconds", result.seconds)


@draw.register
def _(result: MemoryResult) -> Figure:
    panels = {
        direction: {name: [peak / 1e6] for name, peak in peaks.items()}
        for direction, peaks in result.peak_bytes.items()
    }
    return _bars(f"memory beyond weights and inputs; {in_words(result.machine)}", "MB", panels)


@draw.register
def _(result: GrowthResult) -> Figure:
    panels = {}
    for growing in result.seconds:
        rows = [row for row in result.rows if row.growing == growing]
        x = [float(row.tokens if growing == "tokens" else row.num_ffn) for row in rows]
        panels[f"more {growing}"] = (growing, x, {name: [getattr(row, name) for row in rows] for name in DIRECTIONS})
    return _curves(f"time of a token, of the first's; {in_words(result.machine)}", panels, log=False)


@draw.register
def _(result: TrainedResult) -> Figure:
    return _speedups(result, "MoE layer", [row.layer for row in result.rows], log=False)


@draw.register
def _(result: StepResult) -> Figure:
    return _bars(f"{result.world} ranks; {in_words(result.machine)}", "seconds", {"update": result.seconds})


@draw.register
def _(result: AllToAllResult) -> Figure:
    return _bars(f"{result.world} ranks; {in_words(result.machine)}", "seconds", result.seconds)


def _speedups(result: ExpertsResult | TrainedResult, x_name: str, x: Sequence[float], *, log: bool) -> Figure:
    """What was reached over the vanilla twin beside the ideal, a point for each row."""
    lines = {
        "ideal": [row.ideal for row in result.rows],
        "forward": [row.measured for row in result.rows],
        "forward + backward": [row.measured_backward for row in result.rows],
    }
    title = f"times as fast as the vanilla twin; {in_words(result.machine)}"
    return _curves(title, {"experts": (x_name, x, lines)}, log=log)


def _bars(title: str, unit: str, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """In each panel a bar for each case: the median. The line at its end goes from the least to the most."""
    figure = Figure(figsize=(6 * len(panels), 1.5 + 0.4 * max(map(len, panels.values()))), layout="constrained")
    for axes, (name, cases) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        spans = [(median(values), min(values), max(values)) for values in cases.values()]
        spread = [[middle - least for middle, least, _ in spans], [most - middle for middle, _, most in spans]]
        axes.barh(list(cases), [middle for middle, _, _ in spans], xerr=spread, capsize=3)
        axes.invert_yaxis()
        axes.set(title=name.replace("_", " + "), xlabel=unit)
    _entitle(figure, title)
    return figure


def _curves(
    title: str, panels: Mapping[str, tuple[str, Sequence[float], Mapping[str, Sequence[float]]]], *, log: bool
) -> Figure:
    """In each panel, given as the name of x, its values, and as many values for each curve by the curves' names."""
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (name, (x_name, x, lines)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for label, y in lines.items():
            axes.plot(x, y, marker="o", linestyle="--" if label == "ideal" else "-", label=label.replace("_", " + "))
        if log:
            axes.set(xscale="log", yscale="log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.set_xticks(x, [f"{value:g}" for value in x], minor=False)
        axes.set(title=name, xlabel=x_name)
        axes.grid(alpha=0.3)
        axes.legend()
    _entitle(figure, title)
    return figure


def _entitle(figure: Figure, title: str) -> None:
    """Over the whole figure, in as many lines as its width asks for."""
    wide = 12 * round(figure.get_figwidth())  # letters
    figure.suptitle("\n".join(wrap(title, wide)), fontsize="medium")
