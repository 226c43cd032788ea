"""A run folder that starts from given weights: what importing and upcycling end with.

    RUN/checkpoints/step-00000000/   the weights alone; a run that goes on from it has an optimizer that is new, and
                                     reads its data from the beginning (`data` in the index is null)
                                     where another program has trained them: at its step, if need be with moments
    RUN/checkpoints/latest           names it
    RUN/recipe.yaml                  written last, so that no recipe is there without the weights it starts from

The run is then started with `--resume auto`, on any layout:

    bash launch/train.sh RUN/recipe.yaml --run-dir RUN --resume auto
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.atomic import write_atomically
from moepp_ds import __version__
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.checkpoint.writer import write_weights
from moepp_ds.config import Recipe, RecipeError


@dataclass(frozen=True)
class Optimizer:
    """Where AdamW was: what `checkpoint.fragments.optimizer_facts` says, and its moments.

    moments: pieces as those of weights, with their kind before the name.
    """

    updates: int
    loss_scaler: Mapping[str, Any]
    moments: Iterable[tuple[str, str, int, Tensor]]


@dataclass(frozen=True)
class Started:
    """A run that begins from given weights: its checkpoint's folder, its recipe, and what the user should know."""

    folder: Path
    recipe: Recipe
    notices: list[str]


def write_start(
    run_dir: Path,
    recipe: Recipe,
    pieces: Iterable[tuple[str, int, Tensor]],
    *,
    origin: Mapping[str, Any],
    routing: Mapping[str, Any] | None = None,
    step: int = 0,
    optimizer: Optimizer | None = None,
) -> Path:
    """Write a run folder at update `step` from `pieces`, and return its checkpoint's folder.

    pieces: (global parameter name, first element in the flattened parameter, tensor of any floating dtype and shape)
    in any order, as `checkpoint.writer` takes them: a file's worth is in memory at a time.
    origin: where the weights come from, in JSON values; it stays in the index.
    routing: what the controller had come to, as `controller.RoutingState.facts` has it; None starts it anew.
    step: updates behind the weights; the run's schedule and data go on from there. optimizer: None starts it anew.
    Raises RecipeError where a run is already, CheckpointError where the pieces are not just the recipe's model or the
    disk fails; then `run_dir` holds nothing that looks like a run.
    """
    refuse_a_run(run_dir)
    checkpoints = run_dir / "checkpoints"
    facts = {
        "tokens": step * recipe.train.batch_tokens,
        "recipe": recipe.model_dump(mode="json"),
        "data": None,
        "routing": None if routing is None else dict(routing),
        "versions": {"torch": version("torch"), "moepp_ds": __version__},
        "origin": dict(origin),
    }
    if optimizer is not None:
        facts |= {"updates": optimizer.updates, "loss_scaler": dict(optimizer.loss_scaler)}
    try:
        folder = write_weights(
            checkpoints,
            pieces,
            shapes=global_shapes(recipe.model),
            step=step,
            facts=facts,
            moments=None if optimizer is None else optimizer.moments,
        )
        write_atomically(run_dir / "recipe.yaml", recipe.dump().encode())
    except BaseException as error:
        _take_back(run_dir, checkpoints)
        if isinstance(error, OSError):
            raise CheckpointError(f"{run_dir} cannot be written: {error}; free its disk or name another") from error
        raise
    return folder


def _take_back(run_dir: Path, checkpoints: Path) -> None:
    """Delete a start that was not finished, and the folders if nothing else is in them."""
    for made in checkpoints.glob("step-*"):  # there was none before
        shutil.rmtree(made, ignore_errors=True)
    with suppress(OSError):
        (checkpoints / "latest").unlink()
    for folder in (checkpoints, run_dir):
        with suppress(OSError):  # it was never made, or it holds something that is not ours
            folder.rmdir()


def refuse_a_run(run_dir: Path) -> None:
    """Raise RecipeError if a run is at `run_dir`; worth asking before long work."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RecipeError(f"{run_dir} is a file; name a folder for the run that does not exist yet")
    for name in ("recipe.yaml", "metrics.jsonl", "checkpoints/latest", "checkpoints/step-*"):
        found = next(run_dir.glob(name), None)
        if found is not None:
            raise RecipeError(f"{run_dir} already holds a run ({found.name}); name another folder, or remove it")
