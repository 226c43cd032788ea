"""Whether a run may go on, and from where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.loader import check_position
from data_pipeline.row_source import Rows
from data_pipeline.weights import as_written
from moepp_ds.agreement import all_or_none, gather
from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint
from moepp_ds.checkpoint.files import candidates, read_index, step_of
from moepp_ds.checkpoint.live import load_checkpoint
from moepp_ds.config import Recipe, RecipeError
from moepp_ds.config.stored import dotted, stored_recipe
from moepp_ds.engine import Ranks

FIXED_AT_RESUME = ("train.batch_tokens", "train.micro_batch_size")
"""Keys beside the model's that a resumed run must keep: capacity and balance are counted over micro batches."""


def agree_on_checkpoints(path: Path, resume: str, ranks: Ranks) -> list[Path]:
    """The checkpoints that the first rank finds, for all: folders on a network may look older from elsewhere."""
    found: list[Path] = []
    with all_or_none():
        if ranks.is_first:
            found = choose_checkpoints(path, resume)
    return gather(found)[0]


def choose_checkpoints(path: Path, resume: str) -> list[Path]:
    """Where to go on, as --resume says: the best first, then those that would do if it is damaged.

    Empty for a new run. Refuses what would overwrite the record of another run.
    """
    checkpoints = path / "checkpoints"
    own = candidates(checkpoints)
    if resume == "none":
        if own or (path / "metrics.jsonl").exists():
            raise RecipeError(f"{path} already holds a run; continue it with --resume auto, or name another --run-dir")
        return []
    if resume == "auto":
        if not own and (checkpoints / "latest").exists():
            raise RecipeError(
                f"{checkpoints} holds no checkpoint, and its `latest` says that there was one: the run would start "
                "over; look for the folder it names, also as a hidden .step-*, or name another --run-dir"
            )
        return own
    given = Path(resume)
    # the folder of a run, or of its checkpoints: the newest of them
    found = candidates(given) or candidates(given / "checkpoints") or [given]
    if checkpoints.resolve() not in found[0].resolve().parents and not _may_begin(path, found[0]):
        raise RecipeError(
            f"{path} already holds a run, and {resume} is no checkpoint of it; name another --run-dir for a run that "
            "begins there"
        )
    return found


def _may_begin(path: Path, checkpoint: Path) -> bool:
    """Whether a folder holds nothing of a run, or the start of one that went on from there and never saved."""
    metrics = path / "metrics.jsonl"
    if candidates(path / "checkpoints") or (path / "checkpoints" / "latest").exists():
        return False
    if not metrics.exists():
        return True
    try:
        with metrics.open(encoding="utf-8") as lines:
            return bool(json.loads(next(lines, "{}"))["step"] == step_of(checkpoint) + 1)
    except (ValueError, KeyError, TypeError):
        return False


class Resumption:
    """The checkpoint that a run goes on from: the best of several, or the next one where that is damaged.

    checkpoint, index: of the one chosen, None for a new run. changes: settings that differ from those it was made
    with. skipped: what is wrong with better ones, a line for each.
    """

    def __init__(self, choices: Sequence[Path], recipe: Recipe, stream: Rows) -> None:
        self._left, self._recipe, self._stream = list(choices), recipe, stream
        self.checkpoint: Path | None = None
        self.index: dict[str, Any] | None = None
        self.changes: list[str] = []
        self.skipped: list[str] = []
        if choices:
            self._choose()

    @property
    def data_state(self) -> dict[str, Any] | None:
        """Where the loader was; None for a run that has read no rows."""
        return self.index["data"] if self.index else None

    def load(self, engine: Any) -> None:
        """Give the engine what the checkpoint holds. Collective; CheckpointError where none of them can be read."""
        while self.checkpoint is not None:
            try:
                self.index = load_checkpoint(engine, self.checkpoint)
                return
            except DamagedCheckpoint as error:
                self.skipped.append(str(error))
                self._choose()

    def _choose(self) -> None:
        """Take the next one whose index is whole; AgreedError if it is of a run that cannot go on by the recipe."""
        while self._left:
            self.checkpoint = self._left.pop(0)
            try:
                with all_or_none(DamagedCheckpoint):
                    self.index = read_index(self.checkpoint)
            except DamagedCheckpoint as error:
                self.skipped.append(str(error))
                continue
            assert self.index is not None
            with all_or_none():
                self.changes = compare_runs(self._recipe, self.index)
                if self.data_state is not None:
                    check_position(self.data_state, self._stream)
            return
        raise CheckpointError("\n".join(self.skipped))


def compare_runs(recipe: Recipe, index: Mapping[str, Any]) -> list[str]:
    """The settings that differ from those of the checkpoint, in words.

    Raises RecipeError where the function being trained, or what was counted of it, would become another one. For the
    order of rows the loader's `check_position` does the same.
    """
    # Read as a recipe, so that a key that is newer than the checkpoint has the default it had then.
    began = stored_recipe(index["recipe"], place="the recipe in the checkpoint")
    stored, asked = (dotted(one.model_dump(mode="json")) for one in (began, recipe))
    changes = {
        key: f"{key}: {as_written(stored.get(key))} then, {as_written(asked.get(key))} now"
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
