"""From a model folder of either of our layouts to a run that goes on training it.

1. Open    config.json says the model section of the recipe; what the recipe file says of the model is laid over it.
2. Compare every tensor by name, shape and dtype with what that model needs; all that is wrong is told at once, and
           nothing is written.
3. Write   a run folder at update 0, tensor by tensor; biases of the controller go where a checkpoint keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.document import DataError
from data_pipeline.feed import find_tokenizer
from data_pipeline.tokenizer import load_tokenizer
from moepp_ds.config import ModelConfig, Recipe, RecipeError, load_recipe
from moepp_ds.hf_folder import FolderError, HFFolder, identity, tensor_problems
from moepp_ds.hf_names import (
    Layout,
    bias_names,
    changed_settings,
    layout_of,
    model_section,
    parts,
    unused_tensors,
)
from moepp_ds.start import Started, refuse_a_run, write_start

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAR_MORE = 10
"""Times as many tensors as there are: then they are not even listed."""


def import_folder(path: Path, run_dir: Path, recipe_path: Path, overrides: Sequence[str] = ()) -> Started:
    """Write the run folder `run_dir` whose update 0 has the weights of the model folder `path`.

    recipe_path, overrides: the run; its model section need only say what differs from config.json, such as tau.
    Raises FolderError, RecipeError, DataError or CheckpointError, having written nothing that looks like a run.
    """
    refuse_a_run(run_dir)
    folder = HFFolder(path)
    layout, section = layout_of(folder.config), model_section(folder.config)
    recipe = load_recipe(recipe_path, overrides, model=section)
    # As in transformers, a head that is there counts, whatever config.json says of it.
    tied = bool(folder.config.get("tie_word_embeddings")) and HEAD not in folder.shapes
    biased = _check(folder, recipe.model, layout, tied=tied)
    notices = _notices(folder, recipe, layout, section, tied=tied, biased=biased)
    routing = {"bias_LE": _biases(folder, recipe.model), "share_LE": None} if biased else None
    origin = {"program": "import", "from": [identity(folder)]}
    written = write_start(run_dir, recipe, _pieces(folder, recipe.model, tied=tied), origin=origin, routing=routing)
    return Started(written, recipe, notices)


def _pieces(folder: HFFolder, model: ModelConfig, *, tied: bool) -> Iterator[tuple[str, int, Tensor]]:
    for part in parts(model):
        tensors = {name: folder.read(EMBEDDING if tied and name == HEAD else name) for name in part.tensors}
        yield part.parameter, part.start, part.from_hf(tensors)


def _biases(folder: HFFolder, model: ModelConfig) -> list[list[float]]:
    return [folder.read(name).double().tolist() for name in bias_names(model)]


def _check(folder: HFFolder, model: ModelConfig, layout: Layout, *, tied: bool) -> bool:
    """Refuse a folder that does not hold just this model, naming all that is wrong; whether it has biases, too."""
    needed = _needed(folder, model)
    biases = {name: (model.moe.num_experts,) for name in bias_names(model)}
    biased = any(name in folder.shapes for name in biases)
    needed |= biases if biased else {}
    if tied:
        del needed[HEAD]
    problems = list(tensor_problems(folder, needed, unused_tensors(model, layout)))
    if problems:
        hint = "config.json and the model section of the recipe say what it should hold"
        raise FolderError("\n  ".join([f"{folder.path} does not hold this model; {hint}:", *problems]))
    return biased


def _needed(folder: HFFolder, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that hold the parameters, with their shapes."""
    most = FAR_MORE * len(folder.shapes)
    named = ((name, shape) for part in parts(model) for name, shape in part.tensors.items())
    needed = dict(islice(named, most))
    if next(named, None):  # a config that is not of these weights could ask for more than memory holds
        raise FolderError(
            f"{folder.path} holds {len(folder.shapes)} tensors, and config.json with the model section of the recipe "
            f"({model.num_layers} layers, {model.moe.num_experts} experts) asks for more than {most}; they are not of "
            "one model"
        )
    return needed


def _notices(
    folder: HFFolder, recipe: Recipe, layout: Layout, section: Mapping[str, Any], *, tied: bool, biased: bool
) -> list[str]:
    """What was not taken as it is."""
    changed = changed_settings(section, recipe.model)
    notices = [f"{key}: {said} in the folder, {asked} in the recipe" for key, said, asked in changed]
    unused = [name for name in unused_tensors(recipe.model, layout) if name in folder.shapes]
    if unused:
        notices.append(f"{', '.join(unused)} is left behind: no logits come before the first layer, so nothing uses it")
    if tied:
        notices.append("the head starts as a copy of the embedding, as config.json ties them; they train apart")
    if recipe.model.moe.controller and not biased:
        notices.append("the folder has no biases for the controller of the recipe; they start at 0")
    if any(folder.dtypes[name] == torch.float64 for name in folder.dtypes):
        notices.append("weights of float64 are rounded to fp32")
    return notices + _compare_tokenizers(folder, recipe)


def _compare_tokenizers(folder: HFFolder, recipe: Recipe) -> list[str]:
    """Ids of another tokenizer mean nothing to an embedding; say so where that may be."""
    try:
        _, known = find_tokenizer(recipe.data)
    except DataError:
        return [f"data.path {recipe.data.path} holds no shards yet; make them with the tokenizer of {folder.path}"]
    if known.vocab_size > recipe.model.vocab_size:
        raise RecipeError(
            f"the shards at {recipe.data.path} hold token ids up to {known.vocab_size - 1}, and the model has "
            f"{recipe.model.vocab_size} (vocab_size in config.json); make them with the folder's own tokenizer"
        )
    for name in ("tokenizer.model", "tokenizer.json"):
        try:
            if load_tokenizer(folder.path / name, known.eos_token).fingerprint == known.fingerprint:
                return []
        except DataError:  # not there, or without that token: not the shards' tokenizer
            continue
    return [
        f"no tokenizer of {folder.path} is, byte for byte, that of the shards at {recipe.data.path}; if it gives other "
        "ids, the shards must be made anew with it"
    ]
