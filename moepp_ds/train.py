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
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.document import DataError
from data_pipeline.feed import open_held_out, open_rows
from data_pipeline.loader import Loader, check_position
from data_pipeline.row_source import RowSource
from moepp_ds.agreement import AgreedError, all_or_none
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.files import read_index
from moepp_ds.checkpoint.live import load_checkpoint
from moepp_ds.config import Recipe, RecipeError, controller_rate, load_recipe
from moepp_ds.controller import RoutingState, next_state, restored_state
from moepp_ds.engine import build_engine, join_ranks
from moepp_ds.evaluate import Score, evaluate
from moepp_ds.resume import agree_on_checkpoint, compare_runs
from moepp_ds.run import Progress, Run, announce, check_rows_drawn, finish, open_folder, record, save
from moepp_ds.stop import StopSignal
from moepp_ds.update import NonFiniteError, UpdateResult, update


def train(recipe: Recipe, *, path: Path, resume: str, stop: StopSignal) -> Progress:
    """Run the recipe in the folder `path` to its end, or until a stop signal; return where it ended. Collective.

    resume: `auto` (the newest checkpoint of the folder if it has one), `none` (a new run), or a checkpoint's path.
    """
    ranks = join_ranks()
    with all_or_none():
        stream = open_rows(recipe.data)
        held_out = open_held_out(recipe.data, rows=recipe.evaluation.rows)
        _check_vocabulary(recipe, stream)
        total_steps = _count_updates(recipe, stream)
    checkpoint = agree_on_checkpoint(path, resume, ranks)
    index: dict[str, Any] | None = None
    changes: list[str] = []
    with all_or_none():
        if checkpoint is not None:
            index = read_index(checkpoint)
            changes = compare_runs(recipe, index)
            if index["data"] is not None:  # a run that starts from given weights has read no rows
                check_position(index["data"], stream)
    engine, ds_config = build_engine(recipe, ranks, eos_id=stream.tokenizer.eos_id)
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint)
    model = recipe.model
    routing = restored_state(index.get("routing") if index else None, model.moe, model.num_moe_layers)
    progress = Progress(index["step"] if index else 0, routing)
    with all_or_none():
        folder = open_folder(recipe, ds_config, path, progress, engine) if ranks.is_first else None
    origin = index.get("origin") if index else None
    run = Run(recipe, ranks, engine, stream, held_out, path, folder, origin, total_steps)
    try:
        announce(run, progress, checkpoint, changes, resume=resume)
        progress = _loop(run, progress, data_state=index["data"] if index else None, stop=stop)
        finish(run, progress)
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
    recipe, ranks, total = run.recipe, run.ranks, run.total_steps
    every = recipe.monitor.gradient_ratio_every
    loader = Loader(
        run.stream,
        rank=ranks.rank,
        world=ranks.world,
        batch_rows=recipe.batch_rows,
        micro_batch_size=recipe.train.micro_batch_size,
        state=data_state,
        dtype=recipe.data.token_dtype,
    )
    with loader, closing(run.stream):  # the stream first: the loader's thread may be waiting for it
        while progress.step < total and not progress.stop:
            started = time.perf_counter()
            result = update(
                run.engine,
                next(loader),
                ranks,
                rate=recipe.learning_rate(progress.step),
                num_sources=len(run.stream.source_names),
                stop=stop.requested,
                routing=progress.routing,
                seed=recipe.train.seed,
                watch=every is not None and (progress.step + 1) % every == 0,
            )
            seconds = time.perf_counter() - started
            progress = Progress(progress.step + 1, _steer(recipe, progress, result), result.stop)
            check_rows_drawn(run, result, progress.step)
            last = progress.step == total
            scores = _evaluate(run, progress) if last or progress.step % recipe.evaluation.every == 0 else {}
            record(run, progress, result, scores, seconds=seconds)
            if last or progress.stop or progress.step % recipe.checkpoint.every == 0:
                save(run, progress, loader)
    return progress


def _steer(recipe: Recipe, progress: Progress, result: UpdateResult) -> RoutingState:
    """What routing remembers after the update that followed `progress`."""
    moe = recipe.model.moe
    rate = 0.0 if moe.controller is None else controller_rate(moe.controller, progress.step, recipe.total_steps)
    counts = result.statistics
    return next_state(
        progress.routing,
        moe,
        wanted_LE=counts.wanted_E,
        first_LE=counts.first_E,
        tokens=recipe.train.batch_tokens,
        rate=rate,
    )


def _evaluate(run: Run, progress: Progress) -> dict[str, Score]:
    return evaluate(
        run.engine.module,
        run.held_out,
        ranks=run.ranks,
        seq_len=run.recipe.data.seq_len,
        micro_batch_size=run.recipe.train.micro_batch_size,
        rows=run.recipe.evaluation.rows,
        routing=progress.routing.inputs(seed=0, first_row=0, device=run.ranks.device),
    )


def _count_updates(recipe: Recipe, stream: RowSource) -> int:
    """Updates of the whole run: the recipe's, or as many as the rows suffice for."""
    if stream.rows_total is None:
        return recipe.total_steps
    possible = stream.rows_total // recipe.batch_rows
    if not possible:
        raise RecipeError(
            f"data.max_epochs lets the stream give {stream.rows_total:,} rows, fewer than the {recipe.batch_rows:,} of "
            "one update (train.batch_tokens / data.seq_len); raise max_epochs or lower batch_tokens"
        )
    return min(recipe.total_steps, possible)


def _check_vocabulary(recipe: Recipe, stream: RowSource) -> None:
    tokenizer = stream.tokenizer
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise RecipeError(
            f"the data at {recipe.data.path} hold token ids up to {tokenizer.vocab_size - 1} (tokenizer "
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
