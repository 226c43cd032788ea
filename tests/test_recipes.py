"""Every shipped recipe loads, can be cut for the machines it is meant for, and has the paper's sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepp_ds.config import count_parameters, expert_capacity, flops_per_token, load_recipe
from moepp_ds.ds_config import deepspeed_config

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"

PAPER = {  # total in billions, bound on what is activated, experts, mean FFN experts per token
    "0.6b": (0.582, 0.2, 8 + 4, 2 * 0.6),
    "1b": (1.035, 0.2, 16 + 4, 2 * 0.75),
    "2b": (1.941, 0.2, 32 + 8, 2 * 0.75),
    "7b": (7.68, 1.2, 16 + 4, 2 * 0.75),
}
SMALL = {"quickstart", "dense_to_sparse"}  # run on two CPU cores
OTHERS = {"xmoe_64x384", "adamoe_8+8", "longcat_budget", "released_7b"}


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipe_loads_and_configures_deepspeed(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    world = 2 if file.stem in SMALL else 32
    assert deepspeed_config(recipe, world)["train_batch_size"] == recipe.batch_rows
    assert recipe.arithmetic(world)


def test_all_recipes_are_shipped() -> None:
    names = {f"{kind}_{size}" for kind in ("moepp", "moe") for size in PAPER} | SMALL | OTHERS
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


def test_xmoe_is_the_papers_run() -> None:
    recipe = load_recipe(RECIPES / "xmoe_64x384.yaml")
    model, moe, train = recipe.model, recipe.model.moe, recipe.train
    assert [model.is_moe(layer) for layer in range(12)] == [False, True] * 6
    assert (model.hidden_size, model.ffn_hidden_size, model.expert_ffn_hidden_size) == (768, 3072, 384)
    assert (moe.num_experts, moe.num_ffn_experts, moe.router.threshold, moe.top_k) == (64, 64, 0.9, None)
    assert (moe.combine, moe.drop_policy, moe.balance_counts) == ("softmax", "rank", "first")
    assert moe.balance_weight == pytest.approx(0.01 * 64)
    # gamma T / E: 8 x 16,384 / 64
    assert expert_capacity(moe, 8 * 2048).ffn == 2048
    assert (train.max_lr, train.final_lr, train.adam_betas) == (4.5e-4, 4.5e-6, (0.9, 0.95))
    assert (train.weight_decay, train.gradient_clipping, model.init_std) == (0.1, 1.0, 0.014)
    # eight experts are as wide as the dense FFN: both kinds of layer cost the same but for the router
    dense = load_recipe(RECIPES / "xmoe_64x384.yaml", ["model.moe.every=12", "model.moe.num_ffn_experts=8"]).model
    router = 2 * 768 * (6 * 64 - 8)
    assert flops_per_token(model, 2048) - flops_per_token(dense, 2048) == pytest.approx(router)


def test_adamoe_is_moepp_with_null_experts() -> None:
    ours = load_recipe(RECIPES / "moe_0.6b.yaml")
    recipe = load_recipe(RECIPES / "adamoe_8+8.yaml")
    moe = recipe.model.moe
    assert (moe.num_ffn_experts, moe.num_zero, moe.num_experts, moe.top_k) == (8, 8, 16, 3)
    assert (moe.combine, moe.balance, moe.dropless) == ("renormalize_computing", "null_averaged", True)
    assert moe.balance_weight == pytest.approx(1e-3 * 16)
    assert moe.mean_ffn_experts == 1.5
    assert recipe.train == ours.train
    assert recipe.model.model_copy(update={"moe": ours.model.moe}) == ours.model


def test_longcat_costs_what_moepp_does() -> None:
    recipe, ours = (load_recipe(RECIPES / f"{name}.yaml") for name in ("longcat_budget", "moepp_0.6b"))
    moe = recipe.model.moe
    assert moe.controller is not None and moe.balance == "none" and moe.balance_weight == 0
    assert moe.mean_ffn_experts == 1.4 and moe.num_shared_experts == 1
    assert (1.4 + 1) * recipe.model.expert_ffn_hidden_size == pytest.approx(1.2 * ours.model.ffn_hidden_size)
    assert flops_per_token(recipe.model, 2048) == pytest.approx(flops_per_token(ours.model, 2048), rel=2e-3)
    assert recipe.train == ours.train


def test_released_7b_differs_from_the_papers_in_its_variant_alone() -> None:
    recipe, ours = (load_recipe(RECIPES / f"{name}.yaml") for name in ("released_7b", "moepp_7b"))
    moe = recipe.model.moe
    assert (moe.router.num_layers, moe.combine, moe.expert_input_scale) == (2, "renormalize_computing", 2.0)
    assert (moe.every, moe.num_constant, moe.num_copy, moe.num_zero, moe.top_k) == (1, 2, 1, 1, 2)
    assert load_recipe(RECIPES / "moepp_7b.yaml", ["model.moe.variant=released"]).model == recipe.model
    assert (recipe.data, recipe.train, recipe.parallel) == (ours.data, ours.train, ours.parallel)


def test_dense_to_sparse_begins_as_the_dense_ffn() -> None:
    recipe, quickstart = (load_recipe(RECIPES / f"{name}.yaml") for name in ("dense_to_sparse", "quickstart"))
    model, moe = recipe.model, recipe.model.moe
    assert moe.num_experts * model.expert_ffn_hidden_size == model.ffn_hidden_size == 512
    assert (moe.router.threshold, moe.dropless, moe.mean_ffn_experts) == (1.0, True, 16.0)
    assert moe.combine_scale == moe.num_experts
    assert recipe.data == quickstart.data and recipe.train.batch_tokens == quickstart.train.batch_tokens
    half = load_recipe(RECIPES / "dense_to_sparse.yaml", ["model.moe.router.threshold=0.5"]).model
    assert half.moe.mean_ffn_experts == 8.0
    ffn = 3 * 6 * 128 * 512  # three layers
    assert flops_per_token(model, 256) - flops_per_token(half, 256) == pytest.approx(ffn / 2)
