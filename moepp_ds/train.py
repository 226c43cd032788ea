"""The training program.

    deepspeed [launcher options] --module moepp_ds.train RECIPE [--set key=value ...] [--run-dir DIR] [--resume auto|none|PATH]

The same module starts under `torchrun` and, as one rank, under plain `python -m`.

1. Read and check the recipe; open the token shards; build the engine.
2. Resume, or start at update 0.
3. For each update: its rows, forward and backward for every micro batch, one look at the losses of all ranks, and
   only then the update.
4. Record, and at intervals evaluate and save.
5. A stop signal on any rank, or a launcher that died, ends the run on all ranks after the same update, saved.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.document import DataError
from data_pipeline.loader import Batch, Loader
from data_pipeline.stream import HeldOut, RowStream, open_held_out, open_stream
from moepp_ds.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, read_index, save_checkpoint
from moepp_ds.config import Recipe, RecipeError, load_recipe
from moepp_ds.engine import Ranks, build_engine, join_ranks, set_learning_rate
from moepp_ds.evaluate import evaluate, score_lines
from moepp_ds.model import expert_kinds
from moepp_ds.monitor import RunFolder, layer_metrics, progress_line


class NonFiniteError(RuntimeError):
    """A loss or gradient that is no number; raised before the update it would have spoiled."""


class StopSignal:
    """Whether this process was asked to stop: by SIGTERM, SIGINT or SIGUSR1, or because who started it is gone."""

    def __init__(self) -> None:
        self._signalled = False
        self._parent = os.getppid()
        self._supervisor = int(os.environ.get("MOEPP_SUPERVISOR_PID", "0"))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, *_: object) -> None:
        self._signalled = True

    def requested(self) -> bool:
        """True from the first signal on, or once DeepSpeed's launcher or the one of this project is gone."""
        return self._signalled or os.getppid() != self._parent or not _lives(self._supervisor)


def _lives(pid: int) -> bool:
    """Whether process `pid` exists; 0 stands for one that is not to be watched."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@dataclass(frozen=True)
class Progress:
    """Where the run is: updates done, and whether some rank was asked to stop."""

    step: int
    stop: bool = False


@dataclass(frozen=True)
class UpdateResult:
    """Means and counts of one update over all ranks and micro batches. L MoE layers, E experts."""

    loss: float
    lm_loss: float
    balance_loss: float
    grad_norm: float
    wanted_LE: list[list[int]]
    kept_LE: list[list[int]]
    stop: bool


def train(recipe: Recipe, *, run_dir: Path, resume: str) -> Progress:
    """Run the recipe to its end, or until a stop signal; return where it ended. Collective.

    resume: `auto` (newest checkpoint of the run folder if it has one), `none` (a new run in an empty folder), or the
    path of a checkpoint.
    """
    stop_signal = StopSignal()
    ranks = join_ranks()
    stream, held_out = open_stream(recipe.data), open_held_out(recipe.data)
    _check_vocabulary(recipe, stream)
    checkpoint = _checkpoint_to_resume(run_dir, resume)
    if checkpoint is not None:
        _check_same_run(recipe, stream, read_index(checkpoint))
    dist.barrier()  # every rank has looked at the run folder before the first one writes to it
    engine, ds_config = build_engine(recipe, ranks, eos_id=stream.tokenizer.eos_id)
    progress = Progress(0 if checkpoint is None else load_checkpoint(engine, checkpoint)["step"])
    folder = _open_run_folder(recipe, ds_config, run_dir, ranks, progress, checkpoint)
    try:
        progress = _run(recipe, engine, stream, held_out, ranks, folder, progress, stop_signal, run_dir)
        if folder:
            finished = progress.step >= recipe.total_steps
            folder.set_status("completed" if finished else "stopped", step=progress.step)
            folder.say(f"{'completed' if finished else 'stopped, saved'} at update {progress.step}: {run_dir}")
    except Exception as error:
        if folder:
            folder.set_status("failed", step=progress.step, message=str(error))
        raise
    finally:
        if folder:
            folder.close()
    dist.barrier()
    dist.destroy_process_group()
    return progress


def _run(
    recipe: Recipe,
    engine: Any,
    stream: RowStream,
    held_out: Mapping[str, HeldOut],
    ranks: Ranks,
    folder: RunFolder | None,
    progress: Progress,
    stop_signal: StopSignal,
    run_dir: Path,
) -> Progress:
    """The loop, from `progress` to the end of the run or to a stop."""
    every, total = recipe.checkpoint, recipe.total_steps
    loader = Loader(
        stream,
        rank=ranks.rank,
        world=ranks.world,
        batch_rows=recipe.batch_rows,
        micro_batch_size=recipe.train.micro_batch_size,
        start_step=progress.step,
    )
    saved = progress.step
    try:
        while progress.step < total and not progress.stop:
            started = time.perf_counter()
            batches = next(loader)
            result = update(engine, batches, ranks, rate=recipe.learning_rate(progress.step), stop=stop_signal)
            seconds = time.perf_counter() - started
            progress = Progress(progress.step + 1, result.stop)
            scores = None
            if progress.step % recipe.evaluation.every == 0 or progress.step == total:
                scores = evaluate(
                    engine.module,
                    held_out,
                    ranks=ranks,
                    seq_len=recipe.data.seq_len,
                    micro_batch_size=recipe.train.micro_batch_size,
                    rows=recipe.evaluation.rows,
                )
            if folder:
                metrics = _metrics(recipe, stream, progress, result, seconds)
                if progress.step % recipe.train.log_every == 0 or progress.step == total:
                    left = (total - progress.step) * seconds
                    folder.say(progress_line(metrics, total_steps=total, seconds_left=left))
                if scores:
                    metrics["validation"] = {source: vars(score) for source, score in scores.items()}
                    folder.say("\n".join([f"held-out text after update {progress.step}:", *score_lines(scores)]))
                folder.record(metrics)
            if progress.step % every.every == 0 or progress.step == total or progress.stop:
                _save(recipe, engine, loader, progress, run_dir, folder)
                saved = progress.step
    finally:
        loader.close()
    assert saved == progress.step
    return progress


def update(engine: Any, batches: Sequence[Batch], ranks: Ranks, *, rate: float, stop: StopSignal) -> UpdateResult:
    """One optimizer update from this rank's micro batches. Collective.

    Raises NonFiniteError on every rank, before the weights change, when any loss or the gradient norm is not finite.
    """
    set_learning_rate(engine, rate)
    outputs = []
    for number, batch in enumerate(batches):
        output = engine(torch.from_numpy(batch.tokens_BS).to(ranks.device, non_blocking=True))
        engine.backward(output.loss)
        outputs.append(output)
        if number < len(batches) - 1:
            engine.step()
    losses_MX = torch.stack([torch.stack([o.loss.detach(), o.lm_loss, o.balance_loss]) for o in outputs]).double()
    counts_2LE = torch.stack([torch.stack([o.wanted_LE for o in outputs]), torch.stack([o.kept_LE for o in outputs])])
    counts_2LE = counts_2LE.sum(dim=1)
    flags = torch.tensor([float(stop.requested())], dtype=torch.float64, device=ranks.device)
    packed = torch.cat([losses_MX.sum(dim=0), flags, counts_2LE.flatten().double()])
    dist.all_reduce(packed)
    means = (packed[:3] / (len(batches) * ranks.world)).tolist()
    if not all(map(_is_finite, means)):
        raise NonFiniteError(_nonfinite_rows(losses_MX[:, 0], batches, ranks, step=engine.global_steps + 1))
    engine.step()
    if getattr(engine.optimizer, "overflow", False) and not engine.fp16_enabled():
        first, last = batches[0].row_start, batches[-1].row_start + len(batches[-1].tokens_BS) - 1
        raise NonFiniteError(
            f"gradient norm of update {engine.global_steps} is not finite although every loss is; the weights were not "
            f"changed. Rank {ranks.rank} had rows {first} to {last}. Lower train.max_lr or resume from an earlier "
            "checkpoint"
        )
    counts_2LE = packed[4:].view_as(counts_2LE).long()
    loss, lm_loss, balance_loss = means
    return UpdateResult(
        loss=loss,
        lm_loss=lm_loss,
        balance_loss=balance_loss,
        grad_norm=float(engine.get_global_grad_norm()),
        wanted_LE=counts_2LE[0].tolist(),
        kept_LE=counts_2LE[1].tolist(),
        stop=bool(packed[3] > 0),
    )


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _nonfinite_rows(loss_M: torch.Tensor, batches: Sequence[Batch], ranks: Ranks, *, step: int) -> str:
    """Name the ranks and rows whose loss is not finite. Collective."""
    bad_M = ~torch.isfinite(loss_M)
    starts = torch.tensor([batch.row_start for batch in batches], device=ranks.device)
    mine = torch.where(bad_M, starts, -1)
    everyone = [torch.empty_like(mine) for _ in range(ranks.world)]
    dist.all_gather(everyone, mine)
    rows = len(batches[0].tokens_BS)
    places = [
        f"rank {rank} rows {start} to {start + rows - 1}"
        for rank, starts_M in enumerate(everyone)
        for start in starts_M.tolist()
        if start >= 0
    ]
    return (
        f"loss of update {step} is not finite in {', '.join(places)}; the weights were not changed. Look at the rows "
        "with `moepp-data show`, lower train.max_lr, or resume from an earlier checkpoint"
    )


def _metrics(
    recipe: Recipe, stream: RowStream, progress: Progress, result: UpdateResult, seconds: float
) -> dict[str, Any]:
    """The record of one update for metrics.jsonl."""
    tokens = recipe.train.batch_tokens
    rows = progress.step * recipe.batch_rows
    return {
        "step": progress.step,
        "tokens": progress.step * tokens,
        "loss": result.loss,
        "lm_loss": result.lm_loss,
        "balance_loss": result.balance_loss,
        "grad_norm": result.grad_norm,
        "lr": recipe.learning_rate(progress.step - 1),
        "tokens_per_s": tokens / seconds,
        "layers": layer_metrics(
            result.wanted_LE, result.kept_LE, kinds=expert_kinds(recipe.model.moe), tokens=tokens
        ),
        "sampled_share": {name: drawn / rows for name, drawn in stream.mixture.drawn(rows).items()},
    }


def _save(
    recipe: Recipe, engine: Any, loader: Loader, progress: Progress, run_dir: Path, folder: RunFolder | None
) -> None:
    facts = {
        "tokens": progress.step * recipe.train.batch_tokens,
        "recipe": recipe.model_dump(mode="json"),
        "data": loader.state(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "moepp_ds")},
    }
    path = save_checkpoint(
        engine, run_dir / "checkpoints", step=progress.step, facts=facts, keep=recipe.checkpoint.keep
    )
    if folder:
        folder.set_status("running", step=progress.step)
        folder.say(f"saved {path}")


def _open_run_folder(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    run_dir: Path,
    ranks: Ranks,
    progress: Progress,
    checkpoint: Path | None,
) -> RunFolder | None:
    """The first rank's run folder with the run described in it; None on other ranks."""
    if not ranks.is_first:
        return None
    folder = RunFolder(run_dir, tensorboard=recipe.monitor.tensorboard, resumed_step=progress.step)
    folder.describe(recipe=recipe.dump(), ds_config=ds_config)
    folder.set_status("running", step=progress.step)
    for line in recipe.arithmetic(ranks.world):
        folder.say(line)
    if checkpoint is not None:
        folder.say(f"resumed from {checkpoint} after update {progress.step}")
    return folder


def _checkpoint_to_resume(run_dir: Path, resume: str) -> Path | None:
    if resume == "auto":
        return find_checkpoint(run_dir / "checkpoints")
    if resume != "none":
        return Path(resume)
    if (run_dir / "metrics.jsonl").exists():
        raise RecipeError(f"{run_dir} already holds a run; continue it with --resume auto, or name another --run-dir")
    return None


def _check_vocabulary(recipe: Recipe, stream: RowStream) -> None:
    tokenizer = stream.tokenizer
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise RecipeError(
            f"the shards at {recipe.data.path} hold token ids up to {tokenizer.vocab_size - 1} (tokenizer "
            f"{tokenizer.fingerprint[:12]}), but model.vocab_size is {recipe.model.vocab_size}; set it to "
            f"{tokenizer.vocab_size} or more"
        )


def _check_same_run(recipe: Recipe, stream: RowStream, index: Mapping[str, Any]) -> None:
    """Refuse to resume where the model or the order of the data would become another one."""
    stored, asked = index["recipe"], recipe.model_dump(mode="json")
    differences = [
        f"model.{key}: checkpoint {stored['model'].get(key)}, recipe {value}"
        for key, value in asked["model"].items()
        if stored["model"].get(key) != value
    ]
    if index["data"]["fingerprint"] != stream.fingerprint:
        order = index["data"]["order"]
        differences += [
            f"data {key}: checkpoint {order.get(key)}, now {value}"
            for key, value in stream.order.items()
            if order.get(key) != value
        ]
    rows = index["step"] * recipe.batch_rows
    if index["data"]["rows"] != rows:
        differences.append(f"rows read: checkpoint {index['data']['rows']}, {rows} by this train.batch_tokens")
    if differences:
        raise RecipeError("the checkpoint is of another run; start a new one or restore:\n  " + "\n  ".join(differences))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; `--local_rank` is what DeepSpeed's launcher adds."""
    parser = argparse.ArgumentParser(prog="moepp_ds.train", description="Train a MoE++ model from a recipe.")
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, a.b=c")
    parser.add_argument("--run-dir", type=Path, help="default: runs/<name of the recipe>")
    parser.add_argument("--resume", default="none", metavar="auto|none|PATH")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 when the run completed or stopped cleanly (status.json says which), 1 on an error."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        train(recipe, run_dir=options.run_dir or Path("runs") / recipe.name, resume=options.resume)
    except (RecipeError, DataError, CheckpointError, NonFiniteError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
