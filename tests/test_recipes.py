"""Every shipped recipe loads, can be cut for the machines it is meant for, and has the paper's sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepp_ds.config import count_parameters, load_recipe
from moepp_ds.ds_config import deepspeed_config

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"

PAPER = {  # total in billions, bound on what is activated, experts, mean FFN experts per token
    "0.6b": (0.582, 0.2, 8 + 4, 2 * 0.6),
    "1b": (1.035, 0.2, 16 + 4, 2 * 0.75),
    "2b": (1.941, 0.2, 32 + 8, 2 * 0.75),
    "7b": (7.68, 1.2, 16 + 4, 2 * 0.75),
}


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipe_loads_and_configures_deepspeed(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    world = 2 if file.stem == "quickstart" else 32
    assert deepspeed_config(recipe, world)["train_batch_size"] == recipe.batch_rows
    assert recipe.arithmetic(world)


def test_all_recipes_are_shipped() -> None:
    names = {f"{kind}_{size}" for kind in ("moepp", "moe") for size in PAPER} | {"quickstart"}
    assert {file.stem for file in RECIPES.glob("*.yaml")} == names


@pytest.mark.parametrize("size", PAPER)
def test_sizes_are_the_papers(size: str) -> None:
    total, activated, experts, mean = PAPER[size]
    model = load_recipe(RECIPES / f"moepp_{size}.yaml").model
    counts = count_parameters(model)
    assert float(f"{counts.total / 1e9:.4g}") == pytest.approx(total, abs=5.1e-3 if size == "7b" else 5.1e-4)
    assert counts.activated / 1e9 <= activated
    assert model.moe.num_experts == experts
    assert model.moe.mean_ffn_experts == pytest.approx(mean)


@pytest.mark.parametrize("size", PAPER)
def test_twins_differ_in_their_experts_alone(size: str) -> None:
    ours, vanilla = (load_recipe(RECIPES / f"{kind}_{size}.yaml") for kind in ("moepp", "moe"))
    assert (
        vanilla.model.moe.num_experts == vanilla.model.moe.num_ffn_experts == ours.model.moe.num_ffn_experts
    )
    assert not vanilla.model.moe.gating_residual
    assert (ours.data, ours.train, ours.parallel) == (vanilla.data, vanilla.train, vanilla.parallel)
    assert ours.model.model_copy(update={"moe": vanilla.model.moe}) == vanilla.model


@pytest.mark.parametrize("size", PAPER)
def test_training_is_strategy_1(size: str) -> None:
    recipe = load_recipe(RECIPES / f"moepp_{size}.yaml")
    assert (recipe.train.token_budget, recipe.train.batch_tokens) == (100_000_000_000, 4_194_304)
    assert recipe.total_steps == 23_841
    assert recipe.learning_rate(0) == pytest.approx(1e-7)
    assert recipe.learning_rate(2000) == pytest.approx(5e-4)
    assert recipe.learning_rate(23_840) == pytest.approx(5e-5)
    assert (recipe.data.seq_len, recipe.data.mixture) == (2048, "strategy_1")


def test_quickstart_is_what_the_script_expects() -> None:
    recipe = load_recipe(RECIPES / "quickstart.yaml")
    assert (recipe.parallel.expert_parallel, recipe.train.precision) == (2, "bf16")
    assert recipe.arithmetic(2)[3] == "8 rows x 256 tokens x 1 steps x 2 ranks = 4,096 tokens per update"
