"""Models to look at: the golden recipe's as a run folder that has not begun, and one whose every number is known."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from run_folders import GOLDEN_RECIPE

from data_pipeline.tokenizer import Tokenizer
from moepp_ds.__main__ import main
from moepp_ds.config import Recipe, load_recipe
from moepp_ds.load import LoadedModel
from moepp_ds.model import MoEPlusPlusModel, initialize
from moepp_ds.start import write_start

GOLDEN_SHARDS = ROOT / "tests" / "golden" / "shards"


def golden_recipe(*settings: str) -> Recipe:
    """The golden recipe, whatever the working folder."""
    return load_recipe(ROOT / GOLDEN_RECIPE, [f"data.path={GOLDEN_SHARDS}", *settings])


def initial_model(recipe: Recipe, *, std: float | None = None) -> MoEPlusPlusModel:
    """The model that training by this recipe starts from; `std` spreads its weights wider than the recipe."""
    model = MoEPlusPlusModel(recipe.model, eos_id=2)
    initialize(model, seed=recipe.train.seed, std=std or recipe.model.init_std)
    return model


def start_run(path: Path, *settings: str, std: float | None = None) -> MoEPlusPlusModel:
    """Make `path` a run folder at update 0 by the golden recipe; return the model that it holds."""
    recipe = golden_recipe(*settings)
    model = initial_model(recipe, std=std)
    write_start(path, recipe, [(name, 0, tensor) for name, tensor in model.named_parameters()], origin={"seed": 0})
    return model


class Words(Tokenizer):
    """A text is its token ids as decimal numbers with spaces between; 1 ends a document."""

    kind = "huggingface"
    eos_id = 1
    eos_token = "</s>"
    fingerprint = "0" * 64
    plain_because = ("it is made of whole words",)

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def _plain(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([int(word) for word in text.split()], dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(str(number) for number in ids)


@torch.no_grad()
def known_model(*settings: str, vocab_size: int = 8, logits_VE: Sequence[Sequence[float]] | None = None) -> LoadedModel:
    """A model of 8 features in which token v is feature v, and neither attention nor experts add anything to it.

    So the token after v is v + 1, from the last to the first, by a wide margin. Each of 2 layers has 3 FFN, 1 constant,
    1 copy and 1 zero expert; logits_VE: what a router says of each token.
    """
    sizes = ["num_layers=2", "hidden_size=8", "num_heads=2", "ffn_hidden_size=4", f"vocab_size={vocab_size}"]
    experts = ["num_ffn_experts=3", "num_constant=1", "gating_residual=false"]
    overrides = [f"model.{size}" for size in sizes] + [f"model.moe.{count}" for count in experts]
    recipe = golden_recipe(*overrides, *settings)
    model = MoEPlusPlusModel(recipe.model, eos_id=1)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    model.embedding.weight.copy_(torch.eye(vocab_size, 8))
    model.head.weight.copy_(torch.eye(8, 8).roll(1, 0)[:vocab_size] * 10)
    if logits_VE is not None:
        for block in model.blocks:
            # what the router reads is feature v at sqrt(8), the length of a normalised vector of 8
            block.moe.router.weight_ED.copy_(torch.tensor(logits_VE).t() / 8**0.5)
            block.moe.experts.down_EFD.zero_()
            block.moe.constants.selector_J2D.zero_()
    return LoadedModel(Path("nowhere"), model.eval(), recipe, {"step": 7}, None, Words(vocab_size))


def moepp(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["moepp", *arguments])
    monkeypatch.chdir(ROOT)
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
