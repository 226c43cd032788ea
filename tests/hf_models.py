"""Models of every kind of setting as run folders and as exported folders, for tests of both directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from loaded_models import golden_recipe, initial_model
from safetensors.torch import save_file
from torch import Tensor

from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.config import Recipe
from moepp_ds.load import LoadedModel, choose_folder, load_model
from moepp_ds.start import write_start

SETTINGS: Mapping[str, list[str]] = {
    "paper": [],
    "released": ["model.moe.variant=released"],
    "released_mixtral": [
        "model.moe.variant=released",
        "model.moe.combine=renormalize_selected",
        "model.moe.router.num_layers=1",
        "model.moe.router.logit_std=1.3",
        "model.num_heads=4",
        "model.num_kv_heads=2",
    ],
    "threshold": [
        "model.moe.router.threshold=0.6",
        "model.moe.dropless=true",
        "model.moe.router.num_layers=2",
        "model.moe.num_zero=2",
    ],
    "shared": [
        "model.moe.num_shared_experts=2",
        "model.moe.shared_expert_gate=true",
        "model.moe.expert_ffn_hidden_size=12",
        "model.moe.top_k=3",
        "model.moe.combine=renormalize_computing",
        "model.moe.combine_scale=1.5",
        "model.moe.expert_input_scale=0.7",
    ],
    "controller": ["model.moe.controller={rule: sign}", "model.moe.router.jitter=0.1"],
    "dense_between": ["model.moe.every=2", "model.num_layers=5", "model.moe.expert_ffn_hidden_size=20"],
    "grouped_queries": [
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.head_dim=6",
        "model.qkv_bias=true",
        "model.qk_norm=full",
    ],
    "per_head_norm": ["model.qk_norm=per_head", "model.document_attention=true", "model.rope_theta=500.0"],
    "vanilla": [f"model.moe.num_{kind}=0" for kind in ("zero", "copy", "constant")]
    + ["model.moe.gating_residual=false", "model.moe.combine=renormalize_selected"],
}
"""Overrides of the golden recipe."""

LAYOUTS = {name: "released" if name.startswith("released") else "moepp" for name in SETTINGS}
"""The layout that each of them is exported in, if none is asked for."""


def recipe_for(name: str) -> Recipe:
    return golden_recipe(*SETTINGS[name])


def start(path: Path, name: str) -> LoadedModel:
    """Make `path` a run folder of these settings, with lively weights and the controller's biases; return it loaded."""
    recipe = recipe_for(name)
    model = initial_model(recipe, std=0.2)
    generator = torch.Generator().manual_seed(1)
    routing = None
    if recipe.model.moe.controller:
        bias_LE = torch.randn(recipe.model.num_moe_layers, recipe.model.moe.num_experts, generator=generator) / 10
        routing = {"bias_LE": bias_LE.tolist(), "share_LE": None}
    pieces = [(name, 0, tensor) for name, tensor in model.named_parameters()]
    write_start(path, recipe, pieces, origin={"seed": 0}, routing=routing)
    return load_model(path, device="cpu")


@torch.no_grad()
def logits(loaded: LoadedModel, tokens_BS: Tensor) -> Tensor:
    """Of our own model, [B, S, V]."""
    h_BSD, _ = loaded.model.hidden(tokens_BS, loaded.routing)
    return torch.nn.functional.linear(h_BSD, loaded.model.head.weight)


def stored(run: Path) -> dict[str, Tensor]:
    """All weights of a run's newest checkpoint."""
    reader = WeightReader(choose_folder(run))
    return {name: reader.read(name) for name in reader.shapes}


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal names, dtypes and bits (so that 0 is not -0)."""
    if one.keys() != other.keys():
        return False
    return all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and torch.equal(tensor.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name, tensor in one.items()
    )


def save_model(folder: Path, config: str, tensors: Mapping[str, Tensor]) -> Path:
    """A model folder made by hand, of one file."""
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
