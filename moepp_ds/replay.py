"""`moepp replay`: an update that was not taken, once more, in one process and with every number in sight.

1. Rows    those the run wrote (`moepp_ds.replay_rows`), in the micro batches and with the routing inputs it had.
2. Weights of the checkpoint before the update, rounded as the run computed with them. Where the run saved none right
           before it, an older one, and the numbers are not the run's.
3. Passes  forward and backward of each micro batch, and the first module on each way whose numbers are not finite.
4. Norms   of every parameter's gradient, averaged over the micro batches as in training, before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from data_pipeline.document import DataError
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.config import Recipe, RecipeError
from moepp_ds.config.stored import stored_recipe
from moepp_ds.controller import RoutingInputs, restored_state
from moepp_ds.load import choose_folder, default_device
from moepp_ds.model import MoEPlusPlusModel
from moepp_ds.replay_rows import RankBatch, read_batches, read_facts

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LINES = 20
"""Of each table that is printed; the JSON has all."""


@dataclass(frozen=True)
class RowLoss:
    """A row's number in the stream, its source, and its language-model loss."""

    row: int
    source: str
    loss: float


@dataclass(frozen=True)
class Pass:
    """One micro batch there and back. loss: all that is trained on. The two names: of modules, None if all is finite.

    bad_output: the first whose output is not finite. bad_gradient: the first on the way back at whose output the
    gradient is not.
    """

    rank: int
    row_start: int
    loss: float
    lm_loss: float
    bad_output: str | None
    bad_gradient: str | None
    rows: list[RowLoss]


@dataclass(frozen=True)
class Replay:
    """What became of an update. exact: the weights are those that the run had before it."""

    step: int
    reason: str
    checkpoint: str
    checkpoint_step: int
    exact: bool
    run_loss: float | None
    loss: float
    grad_norm: float
    passes: list[Pass]
    grad_norms: dict[str, float]


def replay(run_dir: Path, step: int, *, device: torch.device, checkpoint: Path | None = None) -> Replay:
    """Do update `step` of a run once more, up to its gradients.

    checkpoint: folder of the weights; default: the run's newest from before the update.
    Raises DataError where its rows are missing or damaged, CheckpointError and RecipeError as loading a model does.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is no folder; name a run's, such as runs/NAME")
    facts = read_facts(run_dir, step)
    recipe = stored_recipe(facts.recipe, place=f"recipe of update {step} of {run_dir}")
    batches = read_batches(
        run_dir, facts, micro_batch_size=recipe.train.micro_batch_size, vocab_size=recipe.model.vocab_size
    )
    reader = WeightReader(choose_folder(checkpoint or _before(run_dir, step)))
    model = _model(recipe, reader, eos_id=facts.eos_id, device=device)
    try:
        routing = restored_state(facts.routing, recipe.model.moe, recipe.model.num_moe_layers)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"routing of update {step} of {run_dir} is damaged: {error!r}") from None
    told = routing.inputs(seed=recipe.train.seed, first_row=0, device=device)
    gradients = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    passes = [_pass(model, item, told, facts.source_names, gradients) for item in batches]
    norms = {name: _norm(gradient) / len(passes) for name, gradient in gradients.items()}
    return Replay(
        step=step,
        reason=facts.reason,
        checkpoint=str(reader.folder),
        checkpoint_step=reader.index["step"],
        exact=reader.index["step"] == step - 1,
        run_loss=facts.loss,
        loss=sum(done.loss for done in passes) / len(passes),
        grad_norm=math.hypot(*norms.values()),
        passes=passes,
        grad_norms=norms,
    )


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, or the first accelerator, or else the CPU; RecipeError where there is no such one."""
    if name is None:
        return default_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:  # the second: torch without CUDA
        raise RecipeError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def _before(run_dir: Path, step: int) -> Path:
    """The run's newest checkpoint from before update `step`."""
    folders = {}
    for index in run_dir.glob("checkpoints/step-*/index.json"):
        number = index.parent.name.removeprefix("step-")
        if number.isdecimal() and int(number) < step:
            folders[int(number)] = index.parent
    if not folders:
        raise CheckpointError(
            f"{run_dir}/checkpoints holds no checkpoint from before update {step}; name one with --checkpoint"
        )
    return folders[max(folders)]


def _model(recipe: Recipe, reader: WeightReader, *, eos_id: int, device: torch.device) -> MoEPlusPlusModel:
    """The model that the update was done with, all experts in this process."""
    dtype = DTYPES[recipe.train.precision]
    with torch.device("meta"):  # without memory, and without drawing weights that are replaced
        model = MoEPlusPlusModel(recipe.model, eos_id=eos_id, recompute=recipe.train.activation_checkpointing)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    if shapes != reader.shapes:
        raise RecipeError(f"{reader.folder} holds another model than the one that did the update; name another one")
    weights = {name: reader.read(name).view(shape).to(device, dtype) for name, shape in shapes.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(True)


def _pass(
    model: MoEPlusPlusModel,
    item: RankBatch,
    told: RoutingInputs,
    source_names: Sequence[str],
    gradients: dict[str, Tensor],
) -> Pass:
    """One micro batch; its gradients are added to `gradients`."""
    batch = item.batch
    device = model.head.weight.device
    tokens_BS1 = torch.from_numpy(batch.tokens_BS1).to(device).long()
    told = replace(told, first_row=batch.row_start)
    with torch.no_grad():
        losses_B = model.token_losses(tokens_BS1, told).mean(dim=1).tolist()
    with _watched(model) as bad:
        output = model(tokens_BS1, told)
        output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] += parameter.grad
            parameter.grad = None
    rows = [
        RowLoss(batch.row_start + number, source_names[source], loss)
        for number, (source, loss) in enumerate(zip(batch.source_B.tolist(), losses_B))
    ]
    lm_loss = float(output.lm_loss)
    return Pass(
        item.rank, batch.row_start, output.loss.item(), lm_loss, bad.get("output"), bad.get("gradient"), rows
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, str]]:
    """Inside, the first module on each way whose numbers are not finite comes to stand under "output", "gradient"."""
    bad: dict[str, str] = {}

    def look(way: str, name: str, values: Tensor) -> None:
        if way not in bad and not values.isfinite().all():
            bad[way] = name

    def after_forward(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _floats(output):
            look("output", name, tensor.detach())
            if tensor.requires_grad:
                tensor.register_hook(partial(look, "gradient", name))

    named = [(name or "the whole model", module) for name, module in model.named_modules()]
    handles = [module.register_forward_hook(partial(after_forward, name)) for name, module in named]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()


def _norm(gradient: Tensor) -> float:
    """In fp64: squares of large gradients have no place in fp32."""
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def _floats(output: Any) -> Iterator[Tensor]:
    """The floating point tensors in what a module returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for inner in output:
            yield from _floats(inner)
    elif is_dataclass(output):
        for field in fields(output):
            yield from _floats(getattr(output, field.name))


def as_json(done: Replay) -> dict[str, Any]:
    """All of it; numbers that are not finite become null where this is written."""
    return asdict(done)


def print_replay(done: Replay, console: Console) -> None:
    """What was done, and the worst of micro batches, rows and gradients."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(done.reason)
    say(f"weights of {done.checkpoint}, after update {done.checkpoint_step}")
    if not done.exact:
        say(f"the run saved none after update {done.step - 1}: what follows is near the run's numbers, not equal")
    of_run = "not finite" if done.run_loss is None else f"{done.run_loss:.6g}"
    say(f"loss {done.loss:.6g}, in the run {of_run}; gradient norm {done.grad_norm:.6g}")
    passes = Table("rank", "rows", "loss", "language model", "bad output", "bad gradient")
    for one in _worst(done.passes, key=lambda one: one.lm_loss):
        place = (str(one.rank), f"{one.row_start} to {one.row_start + len(one.rows) - 1}")
        found = (one.bad_output or "-", one.bad_gradient or "-")
        passes.add_row(*place, f"{one.loss:.6g}", f"{one.lm_loss:.6g}", *found)
    rows = Table("row", "source", "language model")
    for row in _worst([row for one in done.passes for row in one.rows], key=lambda row: row.loss):
        rows.add_row(str(row.row), row.source, f"{row.loss:.6g}")
    norms = Table("gradient of", "norm")
    for name, norm in _worst(list(done.grad_norms.items()), key=lambda pair: pair[1]):
        norms.add_row(name, f"{norm:.6g}")
    for title, table in (("micro batches", passes), ("rows", rows), ("gradients", norms)):
        table.title = f"{title}, the worst first (at most {LINES})"
        console.print(table, highlight=False, markup=False)
    if any(one.bad_output or one.bad_gradient for one in done.passes):
        say("bad: the first module, on the way there or back, at whose output numbers are not finite")


def _worst(items: Sequence[T], *, key: Callable[[T], float]) -> list[T]:
    """The items of the largest numbers, those that are not finite before all."""
    return sorted(items, key=lambda item: (not math.isfinite(key(item)), key(item)), reverse=True)[:LINES]
