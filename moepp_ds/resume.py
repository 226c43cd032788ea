"""Whether a run may go on, and from where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.document import DataError
from data_pipeline.loader import check_position
from data_pipeline.row_source import Rows
from data_pipeline.weights import as_written
from moepp_ds.agreement import all_or_none, gather
from moepp_ds.checkpoint.choices import Choices, check_resume_word, choices_under, find_choices, step_folders
from moepp_ds.checkpoint.chunks import ANOTHER
from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint
from moepp_ds.checkpoint.files import candidates, is_named_by_step, read_index, step_of
from moepp_ds.checkpoint.live import all_undamaged, load_checkpoint
from moepp_ds.config import Recipe, RecipeError
from moepp_ds.config.stored import dotted, stored_recipe
from moepp_ds.engine import Ranks
from moepp_ds.intent import intended
from moepp_ds.supervisor.attempt import read_record

FIXED_AT_RESUME = ("train.batch_tokens", "train.micro_batch_size")
"""Keys beside the model's that a resumed run must keep: capacity and balance are counted over micro batches."""


def agree_on_checkpoints(path: Path, resume: str, ranks: Ranks) -> Choices:
    """The checkpoints that the first rank finds, for all: folders on a network may look older from elsewhere."""
    found = Choices()
    with all_or_none():
        if ranks.is_first:
            found = choose_checkpoints(path, resume)
    return gather(found)[0]


def choose_checkpoints(path: Path, resume: str) -> Choices:
    """Where to go on, as --resume says. None for a new run.

    Refuses what would overwrite the record of another run, or of this one, whose checkpoints are gone.
    """
    check_resume_word(path, resume)
    own = choices_under(path / "checkpoints")
    if resume == "auto":
        resume = intended(path) or resume
    if resume == "none":
        if own.folders or (path / "metrics.jsonl").exists():
            raise RecipeError(f"{path} already holds a run; continue it with --resume auto, or name another --run-dir")
        return Choices()
    if resume == "auto":
        lost = None if own.folders else what_was_lost(path)
        if lost:
            raise RecipeError(
                f"{path / 'checkpoints'} holds no checkpoint that is whole, and there was one: {lost}. The run would "
                "start over at update 1; bring it back (a disk that is not mounted? a copy? a hidden .step-*), name "
                "another one with --resume PATH, or begin a new run in another --run-dir"
            )
        return own
    found = find_choices(Path(resume))
    # of a checkpoint that was moved away, and its link left here, the link counts
    if found.folders[0].absolute().parent.resolve() != (path / "checkpoints").resolve():
        lost = "it has checkpoints" if own.folders else _what_stands_against(path, found.folders[0])
        if lost:
            raise RecipeError(
                f"{path} already holds a run, and {resume} is no checkpoint of it ({lost}); continue it with --resume "
                "auto, or name another --run-dir for a run that begins there"
            )
    return found


def _what_stands_against(path: Path, checkpoint: Path) -> str | None:
    """Why the run in a folder without checkpoints did not go on from `checkpoint`, or was saved since."""
    try:
        metrics = path / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size and _first_update(metrics) is None:
            return "the first line of its metrics.jsonl is damaged"
        return what_was_lost(path, begin=checkpoint)
    except DamagedCheckpoint as error:
        return str(error)


def what_was_lost(path: Path, *, begin: Path | None = None) -> str | None:
    """What tells that a run folder without checkpoints had some; None if nothing does.

    begin: the checkpoint of another place that the run is to go on from; None starts it at update 1.

    A run that ended before its first save may begin again: of what it did nothing could be gone on from.

    1. A checkpoint's name, in `latest` or of a folder without an index.
    2. The record begins with another update: the run went on from a checkpoint of another place.
    3. status.json names the checkpoint that the run stands on.
    """
    root = path / "checkpoints"
    if (root / "latest").exists():
        return f"its `latest` says so{''.join(f'; {line}' for line in choices_under(root).passed_over)}"
    if step_folders(root):
        return "; ".join(choices_under(root).passed_over)
    first = _first_update(path / "metrics.jsonl")
    if first is None and begin is not None:
        return None  # there is no record that could be lost
    if first is not None and first != (0 if begin is None else _update_of(begin)) + 1:
        return f"metrics.jsonl begins with update {first}, the run went on from another place"
    stands_on = (read_record(path / "status.json") or {}).get("checkpoint")
    if isinstance(stands_on, str) and (begin is None or Path(stands_on).resolve() != begin.resolve()):
        return f"status.json says that the run stands on {stands_on}"
    return None


def _update_of(checkpoint: Path) -> int:
    return step_of(checkpoint) if is_named_by_step(checkpoint) else int(read_index(checkpoint)["step"])


def _first_update(metrics: Path) -> int | None:
    """The update of the first line of metrics.jsonl; None where there is none that can be read."""
    try:
        with metrics.open(encoding="utf-8") as lines:
            step = json.loads(next(lines, "{}"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


class Resumption:
    """The checkpoint that a run goes on from: the best of several, or the next one where that is damaged.

    checkpoint, index: of the one chosen, None for a new run. changes: settings that differ from those it was made
    with. skipped: what is wrong with better ones, a line for each.
    """

    def __init__(self, choices: Choices, recipe: Recipe, stream: Rows) -> None:
        self._choices, self._left = choices, list(choices.folders)
        self._recipe, self._stream = recipe, stream
        self.checkpoint: Path | None = None
        self.index: dict[str, Any] | None = None
        self.changes: list[str] = []
        self.skipped = list(choices.passed_over)
        if choices.folders:
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
                with all_undamaged():
                    self.index = read_index(self.checkpoint)
            except DamagedCheckpoint as error:
                self.skipped.append(str(error))
                continue
            assert self.index is not None
            with all_or_none():
                self.changes = _may_go_on(self._recipe, self.index, self._stream)
            return
        raise CheckpointError("\n".join(_none_left(self._choices, self.skipped)))


def _none_left(choices: Choices, skipped: Sequence[str]) -> list[str]:
    """What is wrong with every checkpoint that was tried, and what can be done."""
    root = choices.folders[0].parent
    others = [folder for folder in candidates(root) if folder not in choices.folders]
    lines = [said.replace(f"; {ANOTHER}", "") for said in skipped]
    if others:
        return [*lines, f"another one is there: --resume {others[0]}"]
    return [
        *lines,
        f"no checkpoint is left in {root}: bring one back from a copy and name it with --resume PATH, or begin a new "
        "run in another --run-dir",
    ]


def _may_go_on(recipe: Recipe, index: Mapping[str, Any], stream: Rows) -> list[str]:
    """The settings that differ, in words; RecipeError that lists all that must not, of recipe and data together."""
    changes, problems = [], []
    try:
        changes = compare_runs(recipe, index)
    except RecipeError as error:
        problems.append(str(error))
    if index.get("data") is not None:
        try:
            check_position(index["data"], stream)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    return changes


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
        refusal = "the checkpoint is of another run; restore these in the recipe, or start a new run:"
        raise RecipeError("\n  ".join([refusal, *fixed]))
    said = list(changes.values())
    step = index["step"]
    if step < recipe.total_steps:
        then, now = began.learning_rate(step), recipe.learning_rate(step)
        if then != now:
            said.append(f"learning rate at update {step + 1:,}: {then:g} then, {now:g} now")
    return said
