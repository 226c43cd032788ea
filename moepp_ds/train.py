"""The training program.

    deepspeed [launcher options] --module moepp_ds.train RECIPE [--set key=value ...] [--run-dir DIR]
                                                                [--resume auto|none|PATH]

The same module starts under `torchrun` and, as one rank, under plain `python -m`.

1. Read and check the recipe; open the token shards; build the engine.
2. Resume, or start at update 0.
3. For each update: its rows, forward and backward, one look at the losses of all ranks, and only then the step.
4. Record, and at intervals evaluate and save.
5. A stop signal on any rank, or a launcher that died, ends the run on all ranks after the same update, saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.document import DataError
from data_pipeline.loader import Loader, check_position
from data_pipeline.stream import HeldOut, RowStream, open_held_out, open_stream
from moepp_ds.agreement import AgreedError, all_or_none
from moepp_ds.checkpoint import CheckpointError, load_checkpoint, read_index, save_checkpoint
from moepp_ds.config import Recipe, RecipeError, load_recipe
from moepp_ds.engine import Ranks, build_engine, join_ranks
from moepp_ds.evaluate import Score, evaluate, score_lines
from moepp_ds.model import expert_kinds
from moepp_ds.monitor import RunFolder, layer_metrics, progress_line
from moepp_ds.resume import agree_on_checkpoint, compare_runs
from moepp_ds.stop import StopSignal
from moepp_ds.update import NonFiniteError, UpdateResult, update


@dataclass(frozen=True)
class Run:
    """What stays the same from the first update of this process to its last. `folder` is None on all but one rank."""

    recipe: Recipe
    ranks: Ranks
    engine: Any
    stream: RowStream
    held_out: Mapping[str, HeldOut]
    path: Path
    folder: RunFolder | None

    def say(self, line: str) -> None:
        """Print and log, once for all ranks."""
        if self.folder:
            self.folder.say(line)


@dataclass(frozen=True)
class Progress:
    """Where the run is: updates done, and whether some rank was asked to stop."""

    step: int
    stop: bool = False


def train(recipe: Recipe, *, path: Path, resume: str, stop: StopSignal) -> Progress:
    """Run the recipe in the folder `path` to its end, or until a stop signal; return where it ended. Collective.

    resume: `auto` (the newest checkpoint of the folder if it has one), `none` (a new run), or a checkpoint's path.
    """
    ranks = join_ranks()
    with all_or_none():
        stream, held_out = open_stream(recipe.data), open_held_out(recipe.data)
        _check_vocabulary(recipe, stream)
    checkpoint = agree_on_checkpoint(path, resume, ranks)
    index: dict[str, Any] | None = None
    changes: list[str] = []
    with all_or_none():
        if checkpoint is not None:
            index = read_index(checkpoint)
            changes = compare_runs(recipe, index)
            check_position(index["data"], stream)
    engine, ds_config = build_engine(recipe, ranks, eos_id=stream.tokenizer.eos_id)
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint)
    progress = Progress(index["step"] if index else 0)
    with all_or_none():
        folder = _open_folder(recipe, ds_config, path, progress, engine) if ranks.is_first else None
    run = Run(recipe, ranks, engine, stream, held_out, path, folder)
    try:
        _announce(run, progress, checkpoint, changes, resume=resume)
        progress = _loop(run, progress, data_state=index["data"] if index else None, stop=stop)
        _finish(run, progress)
    except Exception as error:
        if folder:
            with suppress(OSError):  # a full disk must not hide what went wrong
                folder.log(f"error: {error}")
                folder.set_status("failed", step=progress.step, message=str(error))
                folder.close()
        raise
    if folder:
        folder.close()
    dist.barrier()
    dist.destroy_process_group()
    return progress


def _loop(run: Run, progress: Progress, *, data_state: Mapping[str, Any] | None, stop: StopSignal) -> Progress:
    """Update after update, from `progress` to the end of the run or to a stop; the last one is always saved."""
    recipe, ranks, total = run.recipe, run.ranks, run.recipe.total_steps
    with Loader(
        run.stream,
        rank=ranks.rank,
        world=ranks.world,
        batch_rows=recipe.batch_rows,
        micro_batch_size=recipe.train.micro_batch_size,
        state=data_state,
    ) as loader:
        while progress.step < total and not progress.stop:
            started = time.perf_counter()
            batches = next(loader)
            rate = recipe.learning_rate(progress.step)
            result = update(
                run.engine, batches, ranks, rate=rate, num_sources=len(run.stream.source_names), stop=stop.requested
            )
            seconds = time.perf_counter() - started
            progress = Progress(progress.step + 1, result.stop)
            _check_rows_drawn(run, result, progress.step)
            ends = progress.stop or progress.step == total
            scores = _evaluate(run) if progress.step % recipe.evaluation.every == 0 or progress.step == total else {}
            _record(run, progress, result, scores, seconds=seconds)
            if progress.step % recipe.checkpoint.every == 0 or ends:
                _save(run, progress, loader)
    return progress


def _evaluate(run: Run) -> dict[str, Score]:
    return evaluate(
        run.engine.module,
        run.held_out,
        ranks=run.ranks,
        seq_len=run.recipe.data.seq_len,
        micro_batch_size=run.recipe.train.micro_batch_size,
        rows=run.recipe.evaluation.rows,
    )


def _record(
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
        "grad_norm": result.grad_norm,
        "lr": recipe.learning_rate(step - 1),
        "tokens_per_s": tokens / seconds,
        "layers": layer_metrics(
            result.wanted_LE, result.kept_LE, kinds=expert_kinds(recipe.model.moe), tokens=tokens
        ),
        "sampled_share": {name: drawn / rows for name, drawn in run.stream.mixture.drawn(rows).items()},
    }
    if scores:
        metrics["validation"] = {source: asdict(score) for source, score in scores.items()}
    run.folder.record(metrics)
    if step % recipe.train.log_every == 0 or step == recipe.total_steps or progress.stop:
        left = (recipe.total_steps - step) * seconds
        run.say(progress_line(metrics, total_steps=recipe.total_steps, seconds_left=left))
    if scores:
        run.say("\n".join([f"held-out text after update {step}:", *score_lines(scores)]))


def _check_rows_drawn(run: Run, result: UpdateResult, step: int) -> None:
    """Compare the rows that all ranks read of each source, as counted, with those the mixture plans for this update."""
    before, after = (run.stream.mixture.drawn(at * run.recipe.batch_rows) for at in (step - 1, step))
    drawn = dict(zip(run.stream.source_names, result.source_rows))
    planned = {name: after[name] - before[name] for name in drawn}
    if drawn != planned:
        raise RuntimeError(f"update {step} read {drawn} rows of its sources, the mixture plans {planned}")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "deepspeed", "moepp_ds")}


def _save(run: Run, progress: Progress, loader: Loader) -> None:
    recipe = run.recipe
    facts = {
        "tokens": progress.step * recipe.train.batch_tokens,
        "recipe": recipe.model_dump(mode="json"),
        "data": loader.state(),
        "versions": _versions(),
    }
    with all_or_none():
        if run.folder:
            run.folder.sync()
    folder = save_checkpoint(
        run.engine, run.path / "checkpoints", step=progress.step, facts=facts, keep=recipe.checkpoint.keep
    )
    if run.folder:
        run.folder.set_status("running", step=progress.step)
    run.say(f"saved {folder}")


def _open_folder(
    recipe: Recipe, ds_config: Mapping[str, Any], path: Path, progress: Progress, engine: Any
) -> RunFolder:
    """The run folder with what the run was started with; the first rank's alone."""
    folder = RunFolder(
        path, tensorboard=recipe.monitor.tensorboard, resumed_step=progress.step, others=engine.monitor
    )
    folder.describe(recipe=recipe.dump(), ds_config=ds_config)
    folder.set_status("running", step=progress.step)
    return folder


def _announce(
    run: Run, progress: Progress, checkpoint: Path | None, changes: Sequence[str], *, resume: str
) -> None:
    """Print what runs, the arithmetic of the run and where it begins."""
    versions = ", ".join(f"{name} {number}" for name, number in _versions().items())
    run.say(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}  {versions}, {run.ranks.world} ranks")
    for line in run.recipe.arithmetic(run.ranks.world):
        run.say(line)
    run.say(f"tokens drawn from {run.stream.mixture.describe()}")
    unscored = [name for name in run.stream.source_names if name not in run.held_out]
    if unscored:
        run.say(f"no text is held out of {', '.join(unscored)}: it is not evaluated (moepp-data build --held-out)")
    if checkpoint is None and resume == "auto":
        run.say(f"no checkpoint in {run.path}: starting at update 1")
    if checkpoint is not None:
        run.say(f"resumed from {checkpoint} after update {progress.step}")
    for change in changes:
        run.say(f"resumed with another {change}")


def _finish(run: Run, progress: Progress) -> None:
    """The completion marker: what a supervisor trusts rather than exit codes."""
    state = "completed" if progress.step >= run.recipe.total_steps else "stopped"
    if run.folder:
        run.folder.set_status(state, step=progress.step)
    run.say(f"{state} after update {progress.step}: {run.path}")


def _check_vocabulary(recipe: Recipe, stream: RowStream) -> None:
    tokenizer = stream.tokenizer
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise RecipeError(
            f"the shards at {recipe.data.path} hold token ids up to {tokenizer.vocab_size - 1} (tokenizer "
            f"{tokenizer.fingerprint[:12]}), but model.vocab_size is {recipe.model.vocab_size}; set it to "
            f"{tokenizer.vocab_size} or more"
        )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; `--local_rank` is what DeepSpeed's launcher adds."""
    parser = argparse.ArgumentParser(
        prog="moepp_ds.train", description="Train a MoE++ model from a recipe.", allow_abbrev=False
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, a.b=c")
    parser.add_argument("--run-dir", type=Path, help="default: runs/<name of the recipe>")
    parser.add_argument("--resume", default="none", metavar="auto|none|PATH", help="default: none")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _environment_number(name: str) -> int:
    return int(os.environ.get(name, "0"))


def _fail(message: str, *, says: bool) -> int:
    if says:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 when the run completed or stopped cleanly (status.json says which), 1 on an error."""
    stop = StopSignal()
    # DeepSpeed's call, on every rank at every start; nothing a user could do about it
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        train(recipe, path=options.run_dir or Path("runs") / recipe.name, resume=options.resume, stop=stop)
    except (AgreedError, CheckpointError, NonFiniteError) as error:  # the same on every rank
        return _fail(str(error), says=_environment_number("RANK") == 0)
    except RecipeError as error:  # before the ranks have met: once a node
        return _fail(str(error), says=_environment_number("LOCAL_RANK") == 0)
    except DataError as error:  # while training: this rank's alone, the launcher ends the others
        return _fail(f"[rank {_environment_number('RANK')}] {error}", says=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
