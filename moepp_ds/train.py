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

import atexit
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from data_pipeline.document import DataError
from data_pipeline.feed import open_held_out, open_rows
from data_pipeline.loader import Batch, Loader
from data_pipeline.row_source import RowSource
from moepp_ds.agreement import AgreedError, FinalError, all_or_none, is_of_input
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.config import Recipe, RecipeError, controller_rate, load_recipe
from moepp_ds.consistency import check_consistency
from moepp_ds.controller import RoutingState, next_state, restored_state
from moepp_ds.engine import LostRankError, Ranks, build_engine, join_ranks, naming_lost_ranks
from moepp_ds.evaluate import Score, evaluate
from moepp_ds.freed_memory import keep_freed_memory
from moepp_ds.guard import going_on, restored_guard
from moepp_ds.monitor import take_folder
from moepp_ds.output import flush_output, print_line
from moepp_ds.replay_rows import Facts, rows_folder, write_rows
from moepp_ds.resume import Resumption, agree_on_checkpoints
from moepp_ds.run import Progress, Run, announce, check_rows_drawn, finish, open_folder, record
from moepp_ds.saves import Saves
from moepp_ds.stop import StopSignal
from moepp_ds.supervisor.verdict import FAILED, FAILED_FOR_GOOD, MISSED_ANOTHER
from moepp_ds.train_arguments import train_parser
from moepp_ds.update import Incident, UpdateResult, update


class BadUpdate(FinalError):
    """An update that the recipe does not let the run go on after."""


def train(recipe: Recipe, *, path: Path, resume: str, stop: StopSignal) -> Progress:
    """Run the recipe in the folder `path` to its end, or until a stop signal; return where it ended. Collective.

    resume: `auto` (the newest checkpoint of the folder if it has one), `none` (a new run), or a checkpoint's path.
    """
    ranks = join_ranks(timeout=recipe.safety.collective_timeout)
    with naming_lost_ranks(recipe, ranks):
        run, progress, resumption = _begin(recipe, ranks, path, resume)
    folder = run.folder
    try:
        with naming_lost_ranks(recipe, ranks):
            announce(run, progress, resumption, resume=resume)
            progress = _loop(run, progress, resumption, stop)
            finish(run, progress, stop)
    except Exception as error:
        if folder:
            folder.log(f"error: {error}")
            with suppress(OSError):  # a full disk must not hide what went wrong
                folder.set_status("failed", step=folder.step, message=str(error), restart=not _is_final(error))
            with suppress(OSError):
                folder.close()
        raise
    with all_or_none():
        if folder:
            folder.close()
    dist.destroy_process_group()
    return progress


def _is_final(error: Exception) -> bool:
    """Whether a supervisor is not to start the run again; of one rank's own errors those of its input are final."""
    return isinstance(error, FinalError) or (isinstance(error, (DataError, RecipeError)) and is_of_input(error))


def _begin(recipe: Recipe, ranks: Ranks, path: Path, resume: str) -> tuple[Run, Progress, Resumption]:
    """Data, engine and run folder, and where the run stands."""
    with all_or_none():
        stream = open_rows(recipe.data)
        held_out = open_held_out(recipe.data, rows=recipe.evaluation.rows)
        _check_vocabulary(recipe, stream)
        total_steps = _count_updates(recipe, stream)
        # before the checkpoints are looked at: ranks of an earlier start may still be saving one
        lock = take_folder(path) if ranks.is_first else None
    resumption = Resumption(agree_on_checkpoints(path, resume, ranks), recipe, stream)
    engine, ds_config = build_engine(recipe, ranks, eos_id=stream.tokenizer.eos_id)
    resumption.load(engine)
    index = resumption.index or {"step": 0}
    routing = restored_state(index.get("routing"), recipe.model.moe, recipe.model.num_moe_layers)
    progress = Progress(index["step"], routing, restored_guard(index.get("guard")))
    with all_or_none():
        folder = None
        if ranks.is_first:
            found = resumption.checkpoint
            folder = open_folder(recipe, ds_config, path, progress, engine, checkpoint=found, lock=lock)
    run = Run(recipe, ranks, engine, stream, held_out, path, folder, index.get("origin"), total_steps)
    return run, progress, resumption


def _loop(run: Run, progress: Progress, resumption: Resumption, stop: StopSignal) -> Progress:
    """Update after update, from `progress` to the end of the run or to a stop; the last one is always saved."""
    recipe = run.recipe
    loader = Loader(
        run.stream,
        rank=run.ranks.rank,
        world=run.ranks.world,
        batch_rows=recipe.batch_rows,
        micro_batch_size=recipe.train.micro_batch_size,
        start_step=progress.step,  # where no state says it: weights that another program has trained so far
        state=resumption.data_state,
        dtype=recipe.data.token_dtype,
    )
    first = progress.step + 1
    # the stream first: the loader's thread may be waiting for it
    with loader, closing(run.stream), closing(Saves(run, resumption.checkpoint)) as saves:
        while progress.step < run.total_steps and not progress.stop:
            started = time.perf_counter()
            batches = next(loader)
            result = _update(run, progress, batches, stop, ready=saves.ready)
            seconds = time.perf_counter() - started
            if result.incident is not None:
                told = _keep_rows(run, progress, result.incident, result.loss, batches)
                if result.incident.action == "stop":
                    told += going_on(result.incident.kind, progress.guard, recipe.safety, run.path)
                    raise BadUpdate(told + _saved_before(saves, progress, loader.state(steps_back=1)))
                run.say(f"warning: {told}")
            progress = _after(recipe, progress, result)
            check_rows_drawn(run, result, progress.step)
            if progress.step == first or _is_due(recipe.safety.check_every, progress.step):
                check_consistency(run.engine, batches, progress.step)
            last = progress.step == run.total_steps
            scores = _evaluate(run, progress) if last or _is_due(recipe.evaluation.every, progress.step) else {}
            record(run, progress, result, scores, seconds=seconds)
            if last or progress.stop:
                saves.last(progress, loader.state())
            else:
                saves.after_update(progress, loader.state, all_ready=result.all_ready)
    return progress


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _update(
    run: Run, progress: Progress, batches: Sequence[Batch], stop: StopSignal, *, ready: bool
) -> UpdateResult:
    """The update after `progress`."""
    recipe = run.recipe
    return update(
        run.engine,
        batches,
        run.ranks,
        rate=recipe.learning_rate(progress.step),
        num_sources=len(run.stream.source_names),
        stop=stop.requested,
        routing=progress.routing,
        seed=recipe.train.seed,
        watch=_is_due(recipe.monitor.gradient_ratio_every, progress.step + 1),
        guard=progress.guard,
        safety=recipe.safety,
        ready=ready,
    )


def _after(recipe: Recipe, progress: Progress, result: UpdateResult) -> Progress:
    """Where the run is after an update; routing remembers none that was not taken."""
    routing = _steer(recipe, progress, result) if result.taken else progress.routing
    return Progress(progress.step + 1, routing, result.guard, result.stop)


def _keep_rows(run: Run, progress: Progress, incident: Incident, loss: float, batches: Sequence[Batch]) -> str:
    """Write the rows of an update that was not taken for `moepp replay`; what happened, in words. Collective."""
    facts = Facts(
        step=incident.number,
        reason=incident.reason,
        loss=loss,
        world=run.ranks.world,
        eos_id=run.stream.tokenizer.eos_id,
        recipe=run.recipe.model_dump(mode="json"),
        routing=progress.routing.facts(),
        source_names=list(run.stream.source_names),
    )
    problem = write_rows(rows_folder(run.path, incident.number), run.ranks.rank, batches, facts)
    look = problem or f"look at its rows with: moepp replay {run.path} --step {incident.number}"
    return f"{incident.reason}. {look}"


def _saved_before(saves: Saves, progress: Progress, data: Mapping[str, Any]) -> str:
    """Save what was before a bad update. If that fails: words that say so, as the update is why the run ends."""
    try:
        saves.last(progress, data)
    except CheckpointError as error:
        return f". {error}"
    return ""


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


def _environment_number(name: str) -> int:
    return int(os.environ.get(name, "0"))


def _fail(error: Exception, *, says: bool, place: str = "") -> int:
    if says:
        print_line(f"error: {place}{error}", error=True)
    return FAILED_FOR_GOOD if _is_final(error) else FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return an exit code.

    0: completed or stopped cleanly, status.json says which. 78: no other start would help. 76: another rank was missed,
    1: something else; another start may help.
    """
    stop = StopSignal()
    keep_freed_memory()
    options = train_parser().parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        train(recipe, path=options.run_dir or Path("runs") / recipe.name, resume=options.resume, stop=stop)
    except (AgreedError, CheckpointError) as error:  # the same on every rank
        return _fail(error, says=_environment_number("RANK") == 0)
    except RecipeError as error:  # before the ranks have met: once a node
        return _fail(error, says=_environment_number("LOCAL_RANK") == 0)
    except LostRankError as error:
        _fail(error, says=True)
        return MISSED_ANOTHER
    except DataError as error:  # while training: this rank's alone, the launcher ends the others
        return _fail(error, says=True, place=f"[rank {_environment_number('RANK')}] ")
    return 0


def _leave(code: int) -> NoReturn:
    """End this process without taking the interpreter apart.

    Gloo's threads outlive their groups, to which DeepSpeed holds on. One that lets go of a tensor late, when there is
    no interpreter any more, ends a rank whose run is complete with SIGABRT (pytorch/pytorch#179291).
    """
    atexit._run_exitfuncs()
    flush_output()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
