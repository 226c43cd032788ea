"""A trained model in one process, for looking at it: no DeepSpeed, no ranks, any device and dtype.

1. Find   the checkpoint: its own folder, a run's folder or its checkpoints' folder, where the newest counts.
2. Recipe the one in the index, with overrides laid over it that change no parameter's shape.
3. Model  made without memory, then given its weights one parameter at a time.
4. Text   the tokenizer that the shards of the recipe hold, or another one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import feed
from data_pipeline.document import DataError
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.choices import find_choices
from moepp_ds.checkpoint.files import shape_differences
from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.config import Recipe, RecipeError
from moepp_ds.config.stored import stored_recipe
from moepp_ds.controller import RoutingInputs, restored_state
from moepp_ds.model import MoEPlusPlusModel


@dataclass(frozen=True)
class LoadedModel:
    """A model as a checkpoint holds it, ready to evaluate.

    recipe: overrides included. index: the checkpoint's. bias_LE: of the controller, fp32, or None.
    """

    folder: Path
    model: MoEPlusPlusModel
    recipe: Recipe
    index: dict[str, Any]
    bias_LE: Tensor | None
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embedding.weight.device

    @property
    def routing(self) -> RoutingInputs:
        """What a forward pass is told beside its tokens."""
        return RoutingInputs(bias_LE=self.bias_LE)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, at least one and no more than a row of the recipe has, or DataError."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of a shell that are no text
            place = f"{error.reason} at character {error.start}"
            raise DataError(f"the text is not UTF-8: {place}; give plain text") from None
        ids = self.tokenizer.encode_batch([text])[0].tolist()
        if not ids:
            raise DataError("the text is empty: it has no token; give some words")
        most = self.recipe.data.seq_len
        if len(ids) > most:
            raise DataError(
                f"the text has {len(ids):,} tokens, and the model was trained on rows of {most:,} (data.seq_len); "
                "shorten it, or allow more with --set data.seq_len=N"
            )
        return ids


def load_model(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
) -> LoadedModel:
    """Load the checkpoint at `path`, checked as `WeightReader` does, in evaluation mode and without gradients.

    path: folder of a checkpoint, of a run, or of its checkpoints. overrides: "a.b=value" over the stored recipe.
    tokenizer: file of another tokenizer than the shards' own, such as where the shards are not at hand.
    Raises CheckpointError for what is no whole checkpoint, RecipeError for overrides that make no recipe or another
    model, DataError for a tokenizer that is missing or not the model's.
    """
    folder = choose_folder(path)
    reader = WeightReader(folder)
    recipe = checked_recipe(reader.index, overrides, folder)
    _, loaded_tokenizer = find_tokenizer(recipe, reader.index, tokenizer)
    weights = {
        name: reader.read(name).view(shape).to(device=device, dtype=dtype) for name, shape in reader.shapes.items()
    }
    model = _assembled(recipe, weights, eos_id=loaded_tokenizer.eos_id)
    bias_LE = selection_bias(recipe, reader.index, device)
    return LoadedModel(folder, model, recipe, reader.index, bias_LE, loaded_tokenizer)


def with_overrides(loaded: LoadedModel, overrides: Sequence[str]) -> LoadedModel:
    """The same weights, not copied, under all of `overrides` instead of those it was loaded with."""
    recipe = checked_recipe(loaded.index, overrides, loaded.folder)
    weights = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    model = _assembled(recipe, weights, eos_id=loaded.model.eos_id)
    bias_LE = selection_bias(recipe, loaded.index, loaded.device)
    return LoadedModel(loaded.folder, model, recipe, loaded.index, bias_LE, loaded.tokenizer)


def default_device() -> torch.device:
    """The accelerator if this machine has one, or else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def choose_folder(path: Path) -> Path:
    """The checkpoint that `path` means, as `--resume` would find it; warns of newer ones that are passed over."""
    found = find_choices(path)
    for line in found.passed_over:
        warnings.warn(f"a newer checkpoint is passed over: {line}", stacklevel=2)
    return found.folders[0]


def checked_recipe(index: Mapping[str, Any], overrides: Sequence[str], folder: Path) -> Recipe:
    """The recipe of a checkpoint's index under overrides; RecipeError if its model is not the one that is stored."""
    recipe = stored_recipe(index.get("recipe"), overrides, place=f"recipe of {folder}")
    stored = index["parameters"]
    if recipe.model.num_layers > len(stored):  # found before a model of so many layers is made
        raise RecipeError(
            f"the recipe of {folder} has {recipe.model.num_layers} layers, and its checkpoint {len(stored)} parameters"
        )
    shapes = global_shapes(recipe.model)
    if shapes != stored:
        asked = f" with {' '.join(f'--set {override}' for override in overrides)}" if overrides else ""
        raise RecipeError(
            f"the recipe of {folder}{asked} is another model than its weights; set only what changes no parameter:\n"
            + shape_differences(stored, shapes)
        )
    return recipe


def _assembled(recipe: Recipe, weights: Mapping[str, Tensor], *, eos_id: int) -> MoEPlusPlusModel:
    with torch.device("meta"):  # without memory, and without drawing weights that are replaced
        model = MoEPlusPlusModel(recipe.model, eos_id=eos_id)
    model.load_state_dict(dict(weights), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def selection_bias(recipe: Recipe, index: Mapping[str, Any], device: torch.device | str) -> Tensor | None:
    """The biases that training had reached, fp32 [L, E]; none where the recipe has no controller."""
    model = recipe.model
    if model.moe.controller is None:
        return None
    try:
        state = restored_state(index.get("routing"), model.moe, model.num_moe_layers)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return state.inputs(seed=0, first_row=0, device=torch.device(device)).bias_LE


def find_tokenizer(recipe: Recipe, index: Mapping[str, Any], file: Path | None = None) -> tuple[Path, Tokenizer]:
    """The tokenizer that goes with a checkpoint's model, and its file: the shards' own, or that of `file`.

    The shards' must be the one that the model was trained with. DataError where it is not, or is not there.
    """
    place, tokenizer = (file, load_tokenizer(file)) if file is not None else _tokenizer_of_shards(recipe, index)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise DataError(
            f"the tokenizer {place} has {tokenizer.vocab_size:,} ids, and the model {recipe.model.vocab_size:,} "
            "(model.vocab_size); name the model's own with --tokenizer FILE"
        )
    return place, tokenizer


def _tokenizer_of_shards(recipe: Recipe, index: Mapping[str, Any]) -> tuple[Path, Tokenizer]:
    try:
        file, known = feed.find_tokenizer(recipe.data)
        tokenizer = load_tokenizer(file, known.eos_token)
    except DataError as error:
        raise DataError(f"{error}\n(data.path of the recipe; or name the tokenizer with --tokenizer FILE)") from error
    trained = (index.get("data") or {}).get("order", {}).get("tokenizer", known.fingerprint)
    for fingerprint, place in ((known.fingerprint, "its manifest"), (trained, "the checkpoint")):
        if fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"the tokenizer {file} ({tokenizer.fingerprint[:12]}...) is not the one that {place} "
                f"names ({fingerprint[:12]}...); set data.path to the shards of the run, or name --tokenizer FILE"
            )
    return file, tokenizer
