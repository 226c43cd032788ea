"""The program: open, fit, check, and only then write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.config import Recipe
from moepp_ds.hf_folder import FolderError, identity
from moepp_ds.start import Started, refuse_a_run, write_start
from moepp_ds.upcycle.fit import check_data, load_fitting
from moepp_ds.upcycle.layout import check_tensors, checkpoint_layout
from moepp_ds.upcycle.parts import Experts, routed_parts
from moepp_ds.upcycle.pieces import Attention, Plan, Source, upcycled_pieces
from moepp_ds.upcycle.source import Checkpoint, open_checkpoint

DEFAULT_NOISE = 0.01


def upcycle(
    run_dir: Path,
    recipe_path: Path,
    folders: Sequence[Path],
    *,
    experts: Experts | None = None,
    attention: Attention | None = None,
    noise: float | None = None,
    overrides: Sequence[str] = (),
) -> Started:
    """Write a run folder whose update 0 starts from published weights.

    recipe_path, overrides: the run; its model section need only say what the checkpoint does not. experts: what becomes
    of dense FFNs, by default copies. attention: whether what dense checkpoints share is averaged (default) or taken
    from the first. noise: with experts noise, over the spread of each matrix. These three are for dense checkpoints.

    Raises FolderError, RecipeError or CheckpointError, having written nothing that looks like a run.
    """
    refuse_a_run(run_dir)
    checkpoints = [open_checkpoint(path) for path in folders]
    moe = _agreed_kind(checkpoints)
    noise = _checked_options(moe, experts, attention, noise)
    become = None if moe else experts or "copy"
    recipe, changed = load_fitting(recipe_path, overrides, checkpoints, become)
    notices = changed + check_data(recipe, checkpoints) + _advice(recipe)
    layouts = [checkpoint_layout(checkpoint, recipe.model) for checkpoint in checkpoints]
    check_tensors(list(zip(checkpoints, layouts)))
    plan = Plan(
        sources=[Source(checkpoint.folder, layout) for checkpoint, layout in zip(checkpoints, layouts)],
        model=recipe.model,
        parts=None if become is None else routed_parts(recipe.model, become, len(checkpoints)),
        attention=attention or "average",
        noise=noise,
        even=experts == "split" and recipe.model.moe.router.threshold == 1.0,
        seed=recipe.train.seed,
    )
    origin = {
        "program": "upcycle",
        "from": [identity(checkpoint.folder) for checkpoint in checkpoints],
        "experts": become or "kept",
        "attention": "kept" if moe else plan.attention,
        "noise": noise,
    }
    folder = write_start(run_dir, recipe, upcycled_pieces(plan, global_shapes(recipe.model)), origin=origin)
    return Started(folder, recipe, notices)


def _agreed_kind(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether the checkpoints are one MoE; several must be dense and of one size."""
    first, *others = checkpoints
    if others and any(checkpoint.family.moe for checkpoint in checkpoints):
        named = [str(c.folder.path) for c in checkpoints if c.family.moe]
        raise FolderError(f"{', '.join(named)}: a MoE is upcycled alone; give one --from, or several dense folders")
    differing = [
        f"{key}: {first.section[key]} in {first.folder.path}, {other.section[key]} in {other.folder.path}"
        for other in others
        for key in first.section
        if key != "init_std" and other.section[key] != first.section[key]
    ]
    if differing:
        raise FolderError("\n  ".join(["the folders are of different sizes or kinds; use equal ones:", *differing]))
    return first.family.moe


def _checked_options(moe: bool, experts: Experts | None, attention: Attention | None, noise: float | None) -> float:
    """The noise to be used; raises FolderError for options that would have no effect."""
    if moe and (experts or attention or noise is not None):
        raise FolderError("--experts, --attention and --noise are for dense checkpoints; a MoE is taken as it is")
    if noise is not None and experts != "noise":
        raise FolderError(f"--noise {noise:g} has no effect without --experts noise; leave out one, or give both")
    if noise is not None and not 0.0 < noise < float("inf"):
        raise FolderError(f"--noise {noise:g} must be above 0; use --experts copy for none")
    if experts != "noise":
        return 0.0
    return DEFAULT_NOISE if noise is None else noise


def _advice(recipe: Recipe) -> list[str]:
    moe = recipe.model.moe
    if not moe.num_zero_computation or moe.controller is not None or moe.top_k is None:
        return []
    return [
        f"the {moe.num_zero_computation} zero-computation experts begin almost unused, and the balance loss is slow to "
        f"bring them in; --set model.moe.controller={{}} steers to {moe.mean_ffn_experts:.2f} FFN experts per token"
    ]
