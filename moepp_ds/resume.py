"""Whether a run may go on, and from where: nothing here reads weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp_ds.agreement import all_or_none, gather
from moepp_ds.checkpoint.files import find_checkpoint
from moepp_ds.config import Recipe, RecipeError
from moepp_ds.config.stored import stored_recipe
from moepp_ds.engine import Ranks

FIXED_AT_RESUME = ("train.batch_tokens", "train.micro_batch_size")
"""Keys beside the model's that a resumed run must keep: capacity and balance are counted over micro batches."""


def agree_on_checkpoint(path: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint that the first rank finds, for all: folders on a network may look older from elsewhere."""
    found = None
    with all_or_none():
        if ranks.is_first:
            found = choose_checkpoint(path, resume)
    return gather(found)[0]


def choose_checkpoint(path: Path, resume: str) -> Path | None:
    """Where to go on, as --resume says; refuses what would overwrite the record of another run."""
    checkpoints = path / "checkpoints"
    holds_run = (path / "metrics.jsonl").exists() or any(checkpoints.glob("step-*/index.json"))
    if resume == "none":
        if holds_run:
            raise RecipeError(f"{path} already holds a run; continue it with --resume auto, or name another --run-dir")
        return None
    if resume == "auto":
        found = find_checkpoint(checkpoints)
        if found is None and any(checkpoints.glob("step-*/index.json")):
            raise RecipeError(f"{checkpoints} holds checkpoints but no file `latest`; name one with --resume PATH")
        return found
    given = Path(resume)
    for root in (given, given / "checkpoints"):  # the folder of a run, or of its checkpoints: the newest of them
        given = find_checkpoint(root) or given
    if holds_run and checkpoints.resolve() not in given.resolve().parents:
        raise RecipeError(
            f"{path} already holds a run, and {resume} is no checkpoint of it; name another --run-dir for a run that "
            "begins there"
        )
    return given


def compare_runs(recipe: Recipe, index: Mapping[str, Any]) -> list[str]:
    """The settings that differ from those of the checkpoint, in words.

    Raises RecipeError where the function being trained, or what was counted of it, would become another one. For the
    order of rows the loader's `check_position` does the same.
    """
    # Read as a recipe, so that a key that is newer than the checkpoint has the default it had then.
    began = stored_recipe(index["recipe"], place="the recipe in the checkpoint")
    stored, asked = (_flatten(one.model_dump(mode="json")) for one in (began, recipe))
    changes = {
        key: f"{key}: {stored.get(key)} then, {asked.get(key)} now"
        for key in sorted(stored.keys() | asked.keys())
        if stored.get(key) != asked.get(key)
    }
    fixed = [changes[key] for key in changes if key.startswith("model.") or key in FIXED_AT_RESUME]
    if index["step"] > recipe.total_steps:
        fixed.append(f"the run's length: {index['step']} updates are done, the recipe ends after {recipe.total_steps}")
    if fixed:
        said = "the checkpoint is of another run; restore these in the recipe, or start a new run:"
        raise RecipeError("\n  ".join([said, *fixed]))
    return list(changes.values())


def _flatten(section: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat.update(_flatten(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key: value})
    return flat
