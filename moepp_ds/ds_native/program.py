"""The program: open, match, check, and only then write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.choices import find_choices
from moepp_ds.checkpoint.files import MOMENTS
from moepp_ds.config import Recipe, RecipeError, load_recipe
from moepp_ds.ds_native.checkpoint import NativeCheckpoint
from moepp_ds.ds_native.names import Sources, find_sources, read_rules
from moepp_ds.start import Optimizer, Started, refuse_a_run, write_start


def import_deepspeed(
    folder: Path,
    run_dir: Path,
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    tag: str | None = None,
    names: Path | None = None,
) -> Started:
    """Write the run folder `run_dir` that goes on from a checkpoint of DeepSpeed's own saver, at its step.

    folder: the one given to `engine.save_checkpoint`, or the folder of a tag in it. tag: by default the one that its
    file `latest` names. recipe_path, overrides: the run. names: file of names, for a model that has its own.

    Raises CheckpointError, RecipeError, having written nothing that looks like a run.
    """
    refuse_a_run(run_dir)
    rules = None if names is None else read_rules(names)
    recipe = load_recipe(recipe_path, overrides)
    _refuse_our_own(folder)
    checkpoint = NativeCheckpoint(folder, tag)
    sources = find_sources(recipe.model, {**checkpoint.shapes, **checkpoint.buffers}, rules)
    if checkpoint.step > recipe.total_steps:
        raise RecipeError(
            f"{checkpoint.folder} has done {checkpoint.step:,} updates, and the recipe ends after "
            f"{recipe.total_steps:,}; raise train.max_steps or train.token_budget"
        )
    lacking = checkpoint.lacks_moments()
    optimizer = None
    if lacking is None:
        moments = ((kind, *piece) for kind in MOMENTS for piece in _pieces(checkpoint, sources, kind))
        optimizer = Optimizer(checkpoint.updates, checkpoint.loss_scaler, moments)
    written = write_start(
        run_dir,
        recipe,
        _pieces(checkpoint, sources, "weight"),
        origin={
            "program": "import-deepspeed",
            "from": [{"folder": str(checkpoint.folder), "deepspeed": checkpoint.version, "step": checkpoint.step}],
        },
        step=checkpoint.step,
        optimizer=optimizer,
    )
    return Started(written, recipe, _notices(checkpoint, recipe, sources, lacking))


def _refuse_our_own(folder: Path) -> None:
    """A run's own checkpoints have a file `latest`, too, and are no mistake for those of DeepSpeed's saver."""
    try:
        found = find_choices(folder).folders[0]
    except CheckpointError:
        return
    raise CheckpointError(
        f"{found} is a checkpoint of moepp_ds itself, and needs no import; go on with --resume {found}"
    )


def _pieces(checkpoint: NativeCheckpoint, sources: Sources, kind: str) -> Iterator[tuple[str, int, Tensor]]:
    """All of one kind. Moments take the way of their weights: each of our elements is one of theirs."""
    for part in sources.parts:
        tensors = {name: checkpoint.read(sources.native[name], kind) for name in part.tensors}
        yield part.parameter, part.start, part.from_hf(tensors)


def _notices(checkpoint: NativeCheckpoint, recipe: Recipe, sources: Sources, lacking: str | None) -> list[str]:
    """What was not taken as it is, and what the run takes for granted."""
    notices = []
    if lacking is not None:
        notices.append(f"the optimizer starts anew: {lacking}")
    differing = checkpoint.betas - {recipe.train.adam_betas}
    if lacking is None and differing:
        then = ", ".join(map(str, sorted(differing)))
        notices.append(f"train.adam_betas: {then} in the checkpoint, {recipe.train.adam_betas} in the recipe")
    if sources.left_out:
        notices.append(f"left behind: {', '.join(sources.left_out)}")
    if recipe.model.moe.controller is not None:
        notices.append("the checkpoint has no biases for the controller of the recipe; they start at 0")
    if checkpoint.step:
        notices.append(
            f"the run goes on after update {checkpoint.step:,} of the recipe's schedule and data: row "
            f"{checkpoint.step * recipe.batch_rows:,} is its first; what was read before it is not known here"
        )
    return notices
