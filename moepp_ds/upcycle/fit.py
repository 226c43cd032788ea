"""Whether a recipe, a checkpoint and the run's data fit together: the recipe laid over the checkpoint's section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.document import DataError
from data_pipeline.feed import find_tokenizer
from moepp_ds.config import ModelConfig, Recipe, load_recipe
from moepp_ds.hf_folder import FolderError
from moepp_ds.upcycle.parts import Experts, split_width
from moepp_ds.upcycle.source import Checkpoint

FREE = ("norm_eps", "rope_theta", "init_std", "top_k", "combine")
"""Keys of a checkpoint's section that a recipe may change: the weights fit whatever they are. The user is told."""


def load_fitting(
    path: Path, overrides: Sequence[str], checkpoints: Sequence[Checkpoint], experts: Experts | None
) -> tuple[Recipe, list[str]]:
    """The recipe laid over the checkpoint's section, and what it changes there; raises where the weights do not fit.

    experts: what becomes of dense FFNs, None for a MoE.
    """
    section = dict(checkpoints[0].section)
    if experts is not None:
        # The choices that keep the dense model's function, unless the recipe says otherwise.
        section["moe"] = {} if experts == "split" else {"combine": "renormalize_selected"}
    recipe = load_recipe(path, overrides, model=section)
    if experts == "split":
        asked, ffn_hidden_size = recipe.model.moe, recipe.model.ffn_hidden_size
        width = asked.expert_ffn_hidden_size or split_width(asked, ffn_hidden_size, len(checkpoints))
        routed = max(1, ffn_hidden_size // width - asked.num_shared_experts)
        copies = max(1, asked.num_ffn_experts // routed)
        section["moe"] = {"expert_ffn_hidden_size": width, "combine_scale": asked.num_experts / copies}
        recipe = load_recipe(path, overrides, model=section)
    return recipe, _check_sizes(recipe.model, section, checkpoints[0])


def _check_sizes(model: ModelConfig, section: Mapping[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Refuse sizes that are not the checkpoint's; what else is not, in words."""
    found: dict[str, Any] = {f"model.{key}": getattr(model, key) for key in section if key != "moe"}
    meant = {f"model.{key}": value for key, value in section.items() if key != "moe"}
    if checkpoint.family.moe:
        found |= {f"model.moe.{key}": getattr(model.moe, key) for key in section["moe"]}
        found |= {"model.moe.expert_ffn_hidden_size": model.expert_ffn_hidden_size}
        found |= {"model.moe.router.num_layers": model.moe.router.num_layers}
        meant |= {f"model.moe.{key}": value for key, value in section["moe"].items()}
        meant["model.moe.router.num_layers"] = 1
        if meant["model.moe.expert_ffn_hidden_size"] is None:
            meant["model.moe.expert_ffn_hidden_size"] = section["ffn_hidden_size"]
    elif model.moe.shared_expert_gate:
        found["model.moe.shared_expert_gate"], meant["model.moe.shared_expert_gate"] = True, False
    changed = {
        key: f"{key} is {found[key]} in the recipe, and {value} in the checkpoint"
        for key, value in meant.items()
        if found[key] != value
    }
    wrong = [line for key, line in changed.items() if key.rpartition(".")[2] not in FREE]
    if wrong:
        heading = f"the recipe does not fit {checkpoint.folder.path}; leave these keys out of it:"
        raise FolderError("\n  ".join([heading, *wrong]))
    return list(changed.values())


def check_data(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What the user should know of the run's data beside the checkpoint; raises where the two cannot go together."""
    notices, seq_len, vocab_size = [], recipe.data.seq_len, recipe.model.vocab_size
    for checkpoint in checkpoints:
        if checkpoint.window is not None and checkpoint.window < seq_len:
            raise FolderError(
                f"{checkpoint.folder.path}: its attention sees {checkpoint.window} tokens (sliding_window), and here "
                f"all; rows of data.seq_len {seq_len} are longer. Use data.seq_len {checkpoint.window} or less"
            )
        if checkpoint.context is not None and checkpoint.context < seq_len:
            notices.append(
                f"{checkpoint.folder.path} was made for texts of {checkpoint.context} tokens "
                f"(max_position_embeddings), data.seq_len is {seq_len}"
            )
    try:
        file, tokenizer = find_tokenizer(recipe.data)
    except DataError as error:
        return [*notices, f"the shards could not be looked at ({error}); make them with the checkpoint's tokenizer"]
    if tokenizer.vocab_size > vocab_size:
        raise FolderError(
            f"the shards of {recipe.data.path} have {tokenizer.vocab_size} ids, the checkpoint {vocab_size}: they were "
            "made with another tokenizer; build them with the checkpoint's"
        )
    if tokenizer.vocab_size != vocab_size:
        notices.append(
            f"the shards have {tokenizer.vocab_size} ids, the checkpoint's embedding {vocab_size} rows; it may be "
            "padded, or the shards are of another tokenizer"
        )
    return notices + _compare_tokenizers(file, checkpoints[0])


def _compare_tokenizers(used: Path, checkpoint: Checkpoint) -> list[str]:
    own = [checkpoint.folder.path / name for name in ("tokenizer.json", "tokenizer.model")]
    own = [file for file in own if file.is_file()]
    if not own or not used.is_file() or used.read_bytes() in [file.read_bytes() for file in own]:
        return []
    names = " or ".join(file.name for file in own)
    return [f"the shards' tokenizer, {used}, is not {names} of {checkpoint.folder.path}; the ids may mean other things"]
