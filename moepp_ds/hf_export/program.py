"""Writing a checkpoint as a model folder.

1. Find     the checkpoint, and its recipe under the overrides.
2. Lay out  as the released model where that can say it, or else as our own; names and keys are `hf_names`'.
3. Stream   range by range of our parameters, at most one shard of the folder in memory.
4. Beside   config.json, the two files of code, tokenizer, generation_config.json, README.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.config import ModelConfig, Recipe, RecipeError
from moepp_ds.hf_export.card import model_card
from moepp_ds.hf_export.tokenizer import TokenizerFiles, tokenizer_files
from moepp_ds.hf_folder import write_folder
from moepp_ds.hf_names import (
    Layout,
    bias_names,
    changed_settings,
    model_section,
    moepp_config,
    parts,
    released_config,
    released_differences,
    unused_tensors,
)
from moepp_ds.load import checked_recipe, choose_folder, find_tokenizer, selection_bias

CODE = Path(__file__).parent.parent / "hf"
CONFIGURATION, MODELING = "configuration_moepp", "modeling_moepp"
PREFIXES: Mapping[Layout, str] = {"moepp": "", "released": "Released"}
"""Of the classes in those two files."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Exported:
    """What `export_checkpoint` wrote, and what the user should know of it."""

    folder: Path
    layout: Layout
    notices: list[str]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    layout: Layout | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
    overrides: Sequence[str] = (),
    tokenizer: Path | None = None,
) -> Exported:
    """Write the model folder `out` from the checkpoint at `checkpoint` (its folder, or a run's: the newest).

    layout: None takes the released one where it says the same model. dtype: of the weights; selection biases stay
    fp32. overrides: "a.b=value" over the stored recipe, none that changes a parameter. tokenizer: file of the
    tokenizer, where the shards are not at hand.
    Raises CheckpointError, RecipeError, DataError or FolderError; then there is no `out`.
    """
    folder = choose_folder(checkpoint)
    reader = WeightReader(folder)
    recipe = checked_recipe(reader.index, overrides, folder)
    model, differences = recipe.model, released_differences(recipe.model)
    chosen: Layout = layout or ("moepp" if differences else "released")
    described = released_config(model) if chosen == "released" else moepp_config(model)
    file, loaded = find_tokenizer(recipe, reader.index, tokenizer)
    declared = tokenizer_files(loaded, file.read_bytes(), max_length=recipe.data.seq_len)
    config = {**described, **_common_keys(recipe, loaded, chosen, dtype)}
    write_folder(
        out,
        config,
        _tensors(reader, model, chosen, dtype, selection_bias(recipe, reader.index, "cpu")),
        max_shard_bytes=max_shard_bytes,
        extra_files=_files(recipe, reader.index, chosen, dtype, loaded, declared, name=out.name),
    )
    notices = [declared.notice] if declared.notice else []
    if chosen == "released":
        notices.append("the first layer's gate_map.weight is zeros: the released layout has it, and no model uses it")
        lost = [f"{key}: {value}" for key, _, value in changed_settings(model_section(described), model)]
        if lost:
            notices.append(f"it has no key for some settings, an import needs them in its recipe: {', '.join(lost)}")
    elif layout is None and model.moe.variant == "released":
        notices.append("not in the released layout, which cannot say " + "; ".join(differences))
    return Exported(out, chosen, notices)


def parse_size(text: str) -> int:
    """Bytes, from "5GB", "200MB" or a plain number; RecipeError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = round(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise RecipeError(f"--max-shard-size {text!r} is no size; write it as 5GB or 500MB")
    return size


def _tensors(
    reader: WeightReader, model: ModelConfig, layout: Layout, dtype: torch.dtype, bias_LE: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the folder, read when they are asked for."""
    for part in parts(model):
        values_N = reader.read(part.parameter, part.start, part.stop)
        yield from ((name, tensor.to(dtype)) for name, tensor in part.to_hf(values_N).items())
    for name, shape in unused_tensors(model, layout).items():
        yield name, torch.zeros(shape, dtype=dtype)
    if bias_LE is not None:
        yield from zip(bias_names(model), bias_LE, strict=True)


def _common_keys(recipe: Recipe, tokenizer: Tokenizer, layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json holds in either layout beside the model itself."""
    prefix = PREFIXES[layout]
    return {
        "architectures": [f"{prefix}MoEPPForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.{prefix}MoEPPConfig",
            "AutoModel": f"{MODELING}.{prefix}MoEPPModel",
            "AutoModelForCausalLM": f"{MODELING}.{prefix}MoEPPForCausalLM",
        },
        "dtype": _name(dtype),
        "max_position_embeddings": recipe.data.seq_len,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": None,
        "use_cache": True,
    }


def _files(
    recipe: Recipe,
    index: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    declared: TokenizerFiles,
    *,
    name: str,
) -> dict[str, bytes]:
    """All files beside config.json and the weights."""
    generation: dict[str, Any] = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    if tokenizer.vocab_size < recipe.model.vocab_size:  # rows that fill up the table stand for no text
        generation["suppress_tokens"] = list(range(tokenizer.vocab_size, recipe.model.vocab_size))
    card = model_card(recipe, index, name=name, layout=layout, dtype=_name(dtype), notice=declared.notice)
    return {
        **declared.files,
        "generation_config.json": (json.dumps(generation) + "\n").encode(),
        "README.md": card.encode(),
        **{f"{module}.py": (CODE / f"{module}.py").read_bytes() for module in (CONFIGURATION, MODELING)},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
