"""A run as it goes on: what it is made of, where it is, and what it leaves in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from data_pipeline.row_source import RowSource
from data_pipeline.stream import HeldOut
from moepp_ds.agreement import agreed_message, all_or_none, gather
from moepp_ds.checkpoint.files import step_of
from moepp_ds.config import Recipe
from moepp_ds.controller import RoutingState
from moepp_ds.engine import Ranks
from moepp_ds.evaluate import Score, score_lines
from moepp_ds.guard import Guard
from moepp_ds.model import expert_kinds
from moepp_ds.monitor import RunFolder, layer_metrics, progress_line
from moepp_ds.resume import Resumption
from moepp_ds.status import State, time_now
from moepp_ds.stop import StopSignal
from moepp_ds.update import UpdateResult


@dataclass(frozen=True)
class Run:
    """What stays the same from the first update of this process to its last.

    folder: None on all but one rank. origin: where the first weights came from, if they were given.
    total_steps: updates until the run is complete: the recipe's, or fewer where data.max_epochs ends the rows.
    """

    recipe: Recipe
    ranks: Ranks
    engine: Any
    stream: RowSource
    held_out: Mapping[str, HeldOut]
    path: Path
    folder: RunFolder | None
    origin: Mapping[str, Any] | None
    total_steps: int

    def say(self, line: str) -> None:
        """Print and log, once for all ranks."""
        if self.folder:
            self.folder.say(line)

    def note_saved(self, checkpoint: Path) -> None:
        """Say, and say in status.json, that the run stands on a checkpoint of its own now."""
        if self.folder:
            self.folder.checkpoint = checkpoint
        self.note_status(step_of(checkpoint))
        self.say(f"saved {checkpoint}")

    def note_status(self, step: int, message: str = "") -> None:
        """Say in status.json that the run goes on, if the disk has room for that."""
        if self.folder:
            try:
                self.folder.set_status("running", step=step, message=message)
            except OSError as error:
                self.say(f"warning: {self.path}/status.json: {error.strerror}; it still says what it said before")


@dataclass(frozen=True)
class Progress:
    """Where the run is: updates done, what routing and the guard remember, and whether some rank was asked to stop."""

    step: int
    routing: RoutingState
    guard: Guard = Guard()
    stop: bool = False


def record(
    run: Run, progress: Progress, result: UpdateResult, scores: Mapping[str, Score], *, seconds: float
) -> None:
    """Write one update's metrics, and print a line now and then."""
    if run.folder is None:
        return
    recipe, step = run.recipe, progress.step
    tokens, rows = recipe.train.batch_tokens, step * recipe.batch_rows
    metrics: dict[str, Any] = {
        "step": step,
        "tokens": step * tokens,
        "loss": result.loss,
        "lm_loss": result.lm_loss,
        "balance_loss": result.balance_loss,
        "z_loss": result.z_loss,
        "grad_norm": result.grad_norm,
        "lr": recipe.learning_rate(step - 1),
        "tokens_per_s": tokens / seconds,
        "layers": layer_metrics(
            result.statistics,
            kinds=expert_kinds(recipe.model.moe),
            tokens=tokens,
            state=progress.routing,
            gradient_ratio_L=result.gradient_ratio_L,
        ),
        "sampled_share": {name: drawn / rows for name, drawn in run.stream.mixture.drawn(rows).items()},
        "epochs": run.stream.epochs(rows),
        "skipped_updates": progress.guard.skipped,
    }
    if scores:
        metrics["validation"] = {source: asdict(score) for source, score in scores.items()}
    run.folder.record(metrics)
    if step % recipe.train.log_every == 0 or step == run.total_steps or progress.stop:
        left = (run.total_steps - step) * seconds
        run.say(progress_line(metrics, total_steps=run.total_steps, seconds_left=left))
    if scores:
        run.say("\n".join([f"held-out text after update {step}:", *score_lines(scores)]))


def check_rows_drawn(run: Run, result: UpdateResult, step: int) -> None:
    """Compare the rows that all ranks read of each source, as counted, with those the mixture plans for this update."""
    before, after = (run.stream.mixture.drawn(at * run.recipe.batch_rows) for at in (step - 1, step))
    drawn = dict(zip(run.stream.source_names, result.source_rows))
    planned = {name: after[name] - before[name] for name in drawn}
    if drawn != planned:
        raise RuntimeError(f"update {step} read {drawn} rows of its sources, the mixture plans {planned}")


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    return {name: version(name) for name in ("torch", "deepspeed", "moepp_ds")}


def open_folder(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    path: Path,
    progress: Progress,
    engine: Any,
    *,
    checkpoint: Path | None,
    lock: IO[bytes] | None,
) -> RunFolder:
    """The run folder with what the run was started with; the first rank's alone.

    checkpoint: where the run goes on from. lock: of `take_folder`.
    """
    folder = RunFolder(
        path,
        tensorboard=recipe.monitor.tensorboard,
        resumed_step=progress.step,
        others=engine.monitor,
        lock=lock,
    )
    folder.describe(recipe=recipe.dump(), ds_config=ds_config)
    folder.checkpoint = checkpoint
    folder.set_status("running", step=progress.step)
    return folder


def _data_lines(run: Run) -> list[str]:
    """What is drawn, how often, and how long it lasts."""
    recipe, stream = run.recipe, run.stream
    epochs = {name: count for name, count in stream.epochs(run.total_steps * recipe.batch_rows).items() if count}
    lines = [*recipe.data.notices, f"tokens drawn from {stream.mixture.describe()}"]
    if epochs:
        lines.append("epochs at the end: " + ", ".join(f"{name} {count:.2f}" for name, count in epochs.items()))
    if run.total_steps < recipe.total_steps:
        lines.append(
            f"the run ends after update {run.total_steps:,} of {recipe.total_steps:,}, at learning rate "
            f"{recipe.learning_rate(run.total_steps - 1):g}: then {stream.mixture.ended_by} has given all of its "
            "epochs (data.max_epochs)"
        )
    return lines + _unreached_stages(recipe, run.total_steps * recipe.batch_rows)


def _unreached_stages(recipe: Recipe, rows: int) -> list[str]:
    """A line for each stage of the recipe that begins after the run's last row."""
    lines, start = [], 0
    for number, stage in enumerate(recipe.data.flat_stages, start=1):
        if start >= rows:
            lines.append(f"stage {number} begins at row {start:,} and the run ends after {rows:,}: it is not used")
        start += stage.rows or 0
    return lines


def announce(run: Run, progress: Progress, resumption: Resumption, *, resume: str) -> None:
    """Print what runs, the arithmetic of the run and where it begins."""
    ran_by = ", ".join(f"{name} {number}" for name, number in versions().items())
    run.say(f"{time_now()}  {ran_by}, {run.ranks.world} ranks")
    for line in run.recipe.arithmetic(run.ranks.world):
        run.say(line)
    for line in _data_lines(run):
        run.say(line)
    unscored = [name for name in run.stream.source_names if name not in run.held_out]
    if unscored:
        run.say(
            f"no text is held out of {', '.join(unscored)}: it is not evaluated (the share held out is"
            " `moepp-data build --held-out`, or data.raw.held_out with mode: stream)"
        )
    for damage in resumption.skipped:
        run.say(f"warning: a newer checkpoint is passed over: {damage}")
    if resumption.checkpoint is None and resume == "auto":
        run.say(f"no checkpoint in {run.path}: starting at update 1")
    if resumption.checkpoint is not None:
        run.say(f"resumed from {resumption.checkpoint} after update {progress.step}")
    for change in resumption.changes:
        run.say(f"resumed with another {change}")


def finish(run: Run, progress: Progress, stop: StopSignal) -> None:
    """The completion marker: what a supervisor trusts rather than exit codes. Collective."""
    state: State = "completed" if progress.step >= run.total_steps else "stopped"
    why = agreed_message(gather(stop.reason)) or "" if state == "stopped" else ""
    orphaned = state == "stopped" and not any(gather(stop.asked))
    with all_or_none():
        if run.folder:
            run.folder.set_status(state, step=progress.step, message=why, restart=True if orphaned else None)
    run.say(f"{state} after update {progress.step}{f' ({why})' if why else ''}: {run.path}")
