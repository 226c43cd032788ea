"""The recipe: what follows from it, by hand; what is refused and in which words; the round trip by YAML.

The rules of the mixture-of-experts section are in test_config_moe.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from moepp_ds.config import (
    Capacity,
    ControllerConfig,
    Layout,
    MoEConfig,
    Recipe,
    RecipeError,
    controller_rate,
    count_parameters,
    expert_capacity,
    flops_per_token,
    load_recipe,
)

TINY = """
deepspeed: ds.json
model:
  {vocab_size: 100, num_layers: 2, hidden_size: 8, num_heads: 2, ffn_hidden_size: 16,
   moe: {num_ffn_experts: 4}}
data: {path: shards, seq_len: 16}
train: {max_steps: 10, batch_tokens: 512, micro_batch_size: 4, max_lr: 1e-3, final_lr: 1e-4, warmup_steps: 4,
        warmup_start_lr: 0}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "ds.json").write_text("{}")
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


def moe(**changes: object) -> MoEConfig:
    return MoEConfig.model_validate({"num_ffn_experts": 8, "num_constant": 2, **changes})


# what follows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ffn, zero, copy, constants",
    [(8, 1, 1, 1), (16, 1, 1, 2), (32, 1, 1, 6), (4, 0, 0, 1), (16, 0, 0, 4), (7, 0, 0, 1)],
)
def test_constants_follow_equation_10(ffn: int, zero: int, copy: int, constants: int) -> None:
    config = MoEConfig(num_ffn_experts=ffn, num_zero=zero, num_copy=copy)
    assert config.num_constant == constants
    assert config.num_experts == ffn + zero + copy + constants


def test_constants_that_are_given_stay() -> None:
    assert moe(num_constant=0).num_constant == 0
    assert moe(num_constant=None).num_constant == 1


@pytest.mark.parametrize(
    "changes, tokens, seats",
    [
        # 8 + 4 experts, tau 3/4: 100 tokens x 2 choices x 1.1 / (6 + 4) = 22 seats, and 3/4 of that
        ({}, 100, Capacity(ffn=17, zero_computation=22)),
        ({"capacity_counts": "tokens"}, 100, Capacity(ffn=9, zero_computation=11)),  # 8.25 and exactly 11
        # vanilla, tau cancels: 100 x 2 x 1.1 / 8 = 27.5 (of the other kinds there are none)
        ({"num_zero": 0, "num_copy": 0, "num_constant": 0, "tau": 0.1}, 100, Capacity(28, 100)),
        ({"capacity_factor": 0.001}, 100, Capacity(1, 1)),  # at least one seat
        ({"capacity_factor": 50.0}, 100, Capacity(100, 100)),  # at most one for each token
        ({"tau": 0.1}, 100, Capacity(ffn=5, zero_computation=46)),  # 220 / 4.8 = 45.83, and a tenth
        ({"min_capacity": 20}, 100, Capacity(ffn=20, zero_computation=22)),  # 17 is too few, 22 is not
        ({"min_capacity": 20}, 10, Capacity(10, 10)),  # but there are 10 tokens
        # threshold: tokens count and not choices; 100 x 4 / (6 + 4) = 40 seats, and 3/4 of that
        ({"router": {"threshold": 0.9}, "capacity_factor": 4}, 100, Capacity(ffn=30, zero_computation=40)),
    ],
)
def test_capacity_by_hand(changes: dict[str, object], tokens: int, seats: Capacity) -> None:
    assert expert_capacity(moe(**changes), tokens) == seats


def test_capacity_is_exact_where_binary_fractions_are_not() -> None:
    # 1.1 x 100 / 10 is 11 and not the 12 that rounding up 11.000000000000002 gives
    config = moe(tau=1.0, num_ffn_experts=6, top_k=1)
    assert expert_capacity(config, 100) == Capacity(11, 11)


@pytest.mark.parametrize(("tokens", "least", "seats"), [(1000, 1, 125), (1001, 1, 126), (1000, 200, 200)])
def test_capacity_with_a_threshold_is_xmoes(tokens: int, least: int, seats: int) -> None:
    # max(min_capacity, tokens / 64 experts x 8, rounded up); tau cancels
    kinds = {"num_ffn_experts": 64, "num_zero": 0, "num_copy": 0, "num_constant": 0}
    config = moe(**kinds, router={"threshold": 0.9}, capacity_factor=8.0, min_capacity=least, tau=0.3)
    assert expert_capacity(config, tokens).ffn == seats


def test_dropless_has_no_capacity() -> None:
    with pytest.raises(ValueError, match="a dropless layer has no seats; ask for them only where"):
        expert_capacity(moe(dropless=True), 100)


def test_shares_at_the_wanted_load() -> None:
    config = MoEConfig(num_ffn_experts=16, num_constant=2)
    assert config.ffn_share == 0.75  # 12 / (12 + 4)
    assert config.mean_ffn_experts == 1.5
    assert moe(num_zero=0, num_copy=0, num_constant=0, tau=0.1).mean_ffn_experts == 2.0


def test_parameters_and_flops_by_hand(recipe_file: Path) -> None:
    # D 8, F 16, V 100, 2 layers; layer 1 alone is MoE: 4 FFN + 1 zero + 1 copy + 1 constant = 7 experts
    model = load_recipe(recipe_file, ["model.moe.every=2"]).model
    assert [model.is_moe(layer) for layer in range(2)] == [False, True]
    norms, attention, ffn, table = 2 * 2 * 8 + 8, 2 * 4 * 64, 3 * 8 * 16, 800
    router, constant = 7 * 8, 3 * 8  # the first MoE layer has no residual
    counts = count_parameters(model)
    assert counts.total == norms + attention + 2 * table + router + constant + (1 + 4) * ffn
    # 2 choices x 3 / (3 + 3) = 1 FFN expert, and the dense layer
    assert counts.activated == norms + attention + table + router + constant + (1 + 1) * ffn
    # 16 positions see 8.5 on average: two products of 2 x 8 x 8.5 operations in each layer
    score_and_value = 2 * 8  # of two scores their difference is enough
    by_hand = 2 * (attention + table + router + score_and_value + 2 * ffn) + 2 * 2 * 2 * 8 * 8.5
    assert flops_per_token(model, 16) == by_hand


def test_residual_is_counted_in_all_but_the_first_layer(recipe_file: Path) -> None:
    with_, without = (
        count_parameters(load_recipe(recipe_file, [f"model.moe.gating_residual={on}"]).model)
        for on in ("true", "false")
    )
    assert with_.total - without.total == 7 * 7


# (changes to D 8, H 2, A 4, F 16, 2 MoE layers of 4 FFN + 1 zero + 1 copy + 1 constant = 7 experts, K tau-share = 1 FFN
# expert per token; parameters more in total, more activated, operations per token more at 16 positions)
CHANGED = {
    "expert width": ({"moe.expert_ffn_hidden_size": 4}, -2 * 4 * 3 * 8 * 12, -2 * 3 * 8 * 12, -2 * 2 * 3 * 8 * 12),
    "shared": ({"moe.num_shared_experts": 2}, 2 * 2 * 384, 2 * 2 * 384, 2 * 2 * 2 * 384),
    "narrow shared": (
        {"moe.num_shared_experts": 2, "moe.expert_ffn_hidden_size": 4, "moe.shared_expert_gate": True},
        -2304 + 2 * (2 * 96 + 8),
        -576 + 2 * (2 * 96 + 8),
        2 * (-576 + 2 * (2 * 96 + 8)),
    ),
    "two layers": ({"moe.router.num_layers": 2}, *[2 * (56 * 8 + 7 * 56 - 7 * 8)] * 2, 4 * (56 * 8 + 7 * 56 - 7 * 8)),
    "kv heads": ({"num_kv_heads": 1}, *[-2 * 2 * 8 * 4] * 2, -2 * 2 * 2 * 8 * 4),
    # each of four matrices 8 x 8 becomes 8 x 12; scores and sums of 2 heads x 8.5 positions cost a half more
    "head width": ({"head_dim": 6}, *[2 * 4 * 8 * 4] * 2, 2 * (2 * 4 * 8 * 4 + 2 * 2 * 4 * 8.5)),
    "biases": ({"qkv_bias": True}, *[2 * 3 * 8] * 2, 0),
    "biases of groups": ({"qkv_bias": True, "num_kv_heads": 1}, *[-128 + 2 * (8 + 4 + 4)] * 2, -256),
    "full norms": ({"qk_norm": "full", "num_kv_heads": 1}, *[-128 + 2 * (8 + 4)] * 2, -256),
    "head norms": ({"qk_norm": "per_head"}, *[2 * (4 + 4)] * 2, 0),
    # one FFN expert of 384 more in each of two layers, wherever it comes from
    "all zero-computation gone": (
        {"moe.num_zero": 0, "moe.num_copy": 0, "moe.num_constant": 0},
        -2 * (3 * 8 + 3 * 8) - (49 - 16),
        -2 * (3 * 8 + 3 * 8) - (49 - 16) + 2 * 384,
        2 * (-2 * (3 * 8 + 2 * 8) - (49 - 16) + 2 * 384),  # of a constant expert the difference of two scores
    ),
    "a target": ({"moe.controller": {"target_ffn_experts": 2.0}}, 0, 2 * 384, 2 * 2 * 384 / 10),  # seats for 1.1
    "a threshold": ({"moe.router.threshold": 0.5, "moe.capacity_factor": 4.0}, 0, 2 * 384, 2 * 2 * 384),
}


@pytest.mark.parametrize("changes, total, activated, flops", CHANGED.values(), ids=CHANGED)
def test_every_setting_is_counted(
    recipe_file: Path, changes: dict[str, object], total: int, activated: int, flops: float
) -> None:
    overrides = [f"model.{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes.items()]
    plain, changed = (load_recipe(recipe_file, more).model for more in ([], overrides))
    assert count_parameters(changed).total - count_parameters(plain).total == total
    assert count_parameters(changed).activated - count_parameters(plain).activated == activated
    assert flops_per_token(changed, 16) - flops_per_token(plain, 16) == pytest.approx(flops)


def test_controller_rate_is_a_straight_line() -> None:
    controller = ControllerConfig(rate=0.5, final_rate=0.1)
    assert [controller_rate(controller, step, 5) for step in range(7)] == pytest.approx(
        [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]
    )
    assert controller_rate(controller, 0, 1) == 0.5  # a run of one update
    steady = ControllerConfig(rate=0.001, final_rate=0.001)
    assert {controller_rate(steady, step, 100) for step in range(100)} == {0.001}


def test_learning_rate_by_hand(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    rates = [recipe.learning_rate(step) for step in range(12)]
    assert rates[:5] == pytest.approx([0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    # five updates from the peak at 4 to the last at 9: cosines of 36, 72, 108, 144, 180 degrees
    cosines = [0.809017, 0.309017, -0.309017, -0.809017, -1.0]
    assert rates[5:10] == pytest.approx([1e-4 + 9e-4 * (1 + c) / 2 for c in cosines], rel=1e-6)
    assert rates[9:] == pytest.approx([1e-4] * 3)


@pytest.mark.parametrize(
    "overrides, step, rate",
    [
        (["train.warmup_steps=0"], 0, 1e-3),
        (["train.warmup_steps=0", "train.max_steps=1"], 0, 1e-3),
        (["train.warmup_steps=9"], 9, 1e-3),  # the peak is the last update
        (["train.warmup_steps=9"], 10, 1e-4),
        (["train.warmup_steps=20"], 9, 4.5e-4),  # the run ends inside the warm-up
    ],
)
def test_learning_rate_at_the_edges(recipe_file: Path, overrides: list[str], step: int, rate: float) -> None:
    assert load_recipe(recipe_file, overrides).learning_rate(step) == pytest.approx(rate)


@pytest.mark.parametrize(
    "overrides, steps, said",
    [
        ([], 10, "(train.max_steps)"),
        (["train.max_steps=null", "train.token_budget=5119"], 9, "(train.token_budget 5,119)"),
        (["train.token_budget=1e4"], 10, "(train.max_steps 10; train.token_budget 10,000 would allow 19)"),
        (["train.token_budget=2048"], 4, "(train.token_budget 2,048; train.max_steps 10 comes later)"),
    ],
)
def test_the_earlier_end_holds_and_is_said(
    recipe_file: Path, overrides: list[str], steps: int, said: str
) -> None:
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.total_steps == steps
    assert f"{steps} updates x 512 tokens = {steps * 512:,} tokens {said}" in recipe.arithmetic(2)


def test_layout_and_arithmetic(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["parallel.expert_parallel=2"])
    assert recipe.batch_rows == 32
    assert recipe.layout(2) == Layout(world=2, rows=32, micro_batch_size=4, accumulation_steps=4)
    lines = recipe.arithmetic(2)
    assert "4 rows x 16 tokens x 4 steps x 2 ranks = 512 tokens per update" in lines
    assert "2 layers (2 MoE) x 7 experts (4 FFN + 1 constant + 1 copy + 1 zero), top 2" in lines
    assert "learning rate 0 -> 0.001 over 4 updates, then a cosine to 0.0001 at update 10" in lines
    # 64 tokens x 2 x 1.1 / (3 + 3) = 23.47 seats, x 3/4 = 17.6
    assert (
        "18 seats in an FFN expert, 24 in a zero-computation expert for the 64 tokens of a micro batch"
        in lines
    )
    assert "2 ranks / expert parallel 2 = 1 copies of the FFN experts, 2 of each layer on each rank" in lines


def test_arithmetic_of_short_and_dropless_runs(recipe_file: Path) -> None:
    lines = load_recipe(recipe_file, ["train.warmup_steps=20", "model.moe.dropless=true"]).arithmetic(1)
    assert "learning rate 0 -> 0.001 over 20 updates; the run ends inside this warm-up, at 0.00045" in lines
    assert "dropless: every assignment is computed" in lines


def test_arithmetic_says_what_moves_the_load(recipe_file: Path) -> None:
    def lines(*moe_settings: str) -> list[str]:
        return load_recipe(recipe_file, [f"model.moe.{setting}" for setting in moe_settings]).arithmetic(1)

    plain = lines()
    assert not [line for line in plain if "balance" in line or "controller" in line]
    said = lines("router.threshold=0.3", "capacity_factor=2", "num_shared_experts=1")
    # 7 experts x 0.3 rounded up is 3, but there are seats for 2; half of the load is FFN experts'
    assert "2 layers (2 MoE) x 7 experts (4 FFN + 1 constant + 1 copy + 1 zero), threshold 0.3, and 1 shared" in said
    assert said[1].endswith(" activated per token at up to 1.00 routed and 1 shared FFN experts per token")
    assert "balance loss per_expert of first choices in the micro batch, weight 0.01" in said
    said = lines("balance=per_group", "balance_scope=global_batch", "balance_weight=0.5")
    assert "balance loss per_group of all choices in the previous update, weight 0.5" in said
    said = lines("balance=none", "controller={target_ffn_experts: 1.5, rule: sign, final_rate: 0}")
    # 18 seats of 4 experts for 64 tokens
    steering = "controller sign steers to 1.50 routed FFN experts per token, but there are seats for 1.12"
    assert said[-3:-1] == ["no balance loss", f"{steering}; rate 0.001 -> 0"]
    assert said[1].endswith(" activated per token at 1.50 FFN experts per token")
    said = lines("controller={}", "dropless=true")
    assert said[-2] == "controller proportional steers to 1.00 routed FFN experts per token; rate 0.5 -> 0.05"


def test_layouts_that_do_not_fit_name_those_that_do(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["parallel.expert_parallel=4"])
    with pytest.raises(
        RecipeError,
        match="expert_parallel 4 does not divide the world of 6 ranks; start 4 or 8 ranks, or set expert_parallel to "
        "one of 1, 2, 3, 6",
    ):
        recipe.layout(6)
    with pytest.raises(RecipeError, match="= 12; start 2 or 4 ranks, or begin a new run with 24 or 36 rows"):
        load_recipe(recipe_file, ["parallel.expert_parallel=1"]).layout(3)  # 32 rows are 8 passes of 4
    with pytest.raises(RecipeError, match="world of 3 ranks; start 4 ranks, or set expert_parallel to one of 1, 3"):
        recipe.layout(3)
    with pytest.raises(RecipeError, match="world of 9 ranks; start 8 ranks, or set expert_parallel"):
        recipe.layout(9)
    uneven = load_recipe(recipe_file, ["train.micro_batch_size=3", "parallel.expert_parallel=2"])
    with pytest.raises(RecipeError, match="= 6; begin a new run with 30 or 36 rows"):
        uneven.layout(2)  # no number of ranks would do
    with pytest.raises(RecipeError, match="world of 3 ranks; set expert_parallel to one of 1, 3"):
        uneven.layout(3)
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file).layout(3)
    assert (
        str(error.value)
        == "batch of 32 rows is not divisible by micro_batch_size 4 x world 3 = 12; "
        "start 2 or 4 ranks, or begin a new run with 24 or 36 rows "
        "(train.batch_tokens = rows x seq_len = 384 or 576)"
    )
    said = r"= 64; start 8 ranks, or begin a new run with 64 rows \(train.batch_tokens = rows x seq_len = 1024\)"
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe_file).layout(16)


# loading -----------------------------------------------------------------------------------------------


def test_round_trip_through_yaml(recipe_file: Path, tmp_path: Path) -> None:
    overrides = [
        "data.mixture={redpajama: {book: 0.1}, dolma: 0.9}",
        "train.adam_eps=1e-15",
        "train.max_lr=0.00123456789",
    ]
    recipe = load_recipe(recipe_file, overrides)
    again = tmp_path / "elsewhere" / "recipe.yaml"
    again.parent.mkdir()
    again.write_text(recipe.dump())
    assert load_recipe(again) == recipe
    assert load_recipe(again).dump() == recipe.dump()
    assert recipe.name == "tiny"  # the first file's stem, kept


def test_overrides_are_yaml_and_the_last_one_holds(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "train.max_lr=2e-3",
            "train.max_lr=5E-3",
            "checkpoint.keep=7",
            "name=other",
            "train.token_budget=100e9",
        ],
    )
    assert (recipe.train.max_lr, recipe.checkpoint.keep, recipe.name) == (5e-3, 7, "other")
    assert recipe.train.token_budget == 100_000_000_000


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "model.moe.top_kk=3",
            "model.moe.top_kk: unknown key; did you mean model.moe.top_k? (from --set model.moe.top_kk=3)",
        ),
        ("train.seq_len=3", "train.seq_len: unknown key; did you mean data.seq_len?"),
        ("modle.num_layers=3", "modle: unknown key; did you mean model?"),
        ("parallel.zzz=3", "parallel.zzz: unknown key; valid here: expert_parallel"),
        (
            "train.max_lr=fast",
            "train.max_lr: 'fast': input should be a valid number (from --set train.max_lr=fast)",
        ),
        ("train.max_steps=true", "train.max_steps: True: input should be a valid integer"),
        ("train.max_steps='8'", "train.max_steps: '8': input should be a valid integer"),
        ("train.max_lr=.inf", "train.max_lr: inf: input should be a finite number"),
        ("train.precision=bf17", "train.precision: 'bf17': input should be 'bf16', 'fp32' or 'fp16'"),
        ("train.max_steps=null", "train: the run has no end; give max_steps, token_budget, or both"),
        ("train.token_budget=511", "train: token_budget 511 is less than one update of batch_tokens 512"),
        (
            "train.final_lr=1",
            "train: max_lr 0.001 must be the highest rate, but warmup_start_lr is 0 and final_lr is 1",
        ),
        ("train.adam_betas=[0.9, 1.0]", "train: adam_betas [0.9, 1.0] must both be at least 0 and below 1"),
        (
            "train.batch_tokens=500",
            "train.batch_tokens 500 is not a multiple of data.seq_len 16; use 496 or 512",
        ),
        (
            "model.moe.top_k=8",
            "model.moe: top_k 8 is more than the 7 experts of a layer (4 FFN + 3 zero-computation)",
        ),
        (
            "model.moe.every=3",
            "model: moe.every 3 is more than num_layers 2, so no layer would be MoE; use moe.every 1 to 2",
        ),
        ("model.moe.tau=0", "model.moe.tau: 0: input should be greater than 0"),
        (
            "model.num_heads=3",
            "model.head_dim: is not given, and hidden_size 8 / num_heads 3 is no even number of features, which rotary "
            "positions need; use for example 1, 2, 4 heads, or give it",
        ),
        (
            "model.num_heads=8",
            "model.head_dim: is not given, and hidden_size 8 / num_heads 8 is no even number of features, which rotary "
            "positions need; use for example 1, 2, 4 heads, or give it",
        ),
        (
            "model.hidden_size=9",
            "hidden_size 9 / num_heads 2 is no even number of features, which rotary positions need; give it",
        ),
        (
            "model.head_dim=5",
            "model: head_dim 5 is odd; rotary positions turn pairs of features, so use an even number such as 6",
        ),
        ("model.num_kv_heads=4", "model: num_kv_heads 4 does not divide num_heads 2; use one of 1, 2"),
        ("model.qk_norm=some", "model.qk_norm: 'some': input should be 'none', 'full' or 'per_head'"),
        ("model.moe.router.treshold=0.5", "unknown key; did you mean model.moe.router.threshold?"),
        ("model.moe.threshold=0.5", "model.moe.threshold: unknown key; did you mean model.moe.router.threshold?"),
        ("model.moe.controller.rat=1", "model.moe.controller.rat: unknown key; did you mean model.moe.controller.rate"),
        (
            "model.moe.controller.zzz=1",
            "model.moe.controller.zzz: unknown key; valid here: rule, target_ffn_experts, rate, final_rate",
        ),
        ("model.moe.router=null", "model.moe.router: None: input should be a valid dictionary"),
        ("model.moe.router.threshold=1.5", "model.moe.router.threshold: 1.5: input should be less than or equal to 1"),
        (
            "model.moe.min_capacity=65",
            "model.moe.min_capacity 65 is more than the 64 tokens of a micro batch (train.micro_batch_size x "
            "data.seq_len), so no seat would ever be missing; lower it, or set model.moe.dropless to true",
        ),
        (
            "parallel.expert_parallel=3",
            "parallel.expert_parallel 3 does not divide model.moe.num_ffn_experts 4; use one of 1, 2, 4",
        ),
        ("data.mixture=strategy_3", "data.mixture: unknown mixture 'strategy_3'"),
        ("model.moe=3", "model.moe: 3: input should be a valid dictionary"),
        # tau is not in the file, so the override makes a section of it
        ("model.moe.tau.x=3", "model.moe.tau: {'x': 3}: input should be a valid number"),
        ("train.max_steps", "--set train.max_steps: write it as section.key=value"),
        ("train..max_steps=1", "--set train..max_steps=1: write it as section.key=value"),
        ("train.max_steps=[1", "--set train.max_steps=[1: the value is not valid YAML"),
        (
            "data.path.x=3",
            "--set data.path.x=3: data.path is the value 'shards', so nothing can be set below it",
        ),
        ("name=a/b", "name: 'a/b'"),
        ("name=..", "name: '..'"),
        # YAML 1.1 reads these two as 8 and 90
        ("train.max_steps=010", "train.max_steps: '010': input should be a valid integer"),
        ("train.max_steps=1:30", "train.max_steps: '1:30': input should be a valid integer"),
        ("Model.moe.num_zero=1", "did you mean model? (from --set Model.moe.num_zero=1)"),
        ("deepspeed=~nobody-here/x", "deepspeed: ~nobody-here/x: "),
        ("deepspeed=" + "x" * 5000, "was not found; tried, in this order"),
        ("train.max_steps=" + "[" * 5000, "the value is not valid YAML: it is nested too deeply"),
        ("data.mixture=&a {x: *a}", "mixture is nested deeper than 16 levels"),
        ("data.mixture=3", "data.mixture: mixture is 3; name a preset"),
    ],
)
def test_bad_values_are_refused_in_words(recipe_file: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, [override])
    assert words in str(error.value)


def test_nested_sections_are_set_key_by_key(recipe_file: Path) -> None:
    overrides = ["model.moe.router.threshold=0.5", "model.moe.capacity_factor=3", "model.moe.router.jitter=0.01"]
    config = load_recipe(recipe_file, overrides).model.moe
    assert (config.router.threshold, config.router.jitter, config.top_k) == (0.5, 0.01, None)
    # a section that is null, as in a saved recipe, is begun
    recipe_file.write_text(TINY.replace("{num_ffn_experts: 4}", "{num_ffn_experts: 4, controller: null}"))
    controller = load_recipe(recipe_file, ["model.moe.controller.rate=0.2"]).model.moe.controller
    assert controller == ControllerConfig(rate=0.2)
    assert load_recipe(recipe_file, ["model.moe.controller={}"]).model.moe.controller == ControllerConfig()
    assert load_recipe(recipe_file, ["model.moe.controller.rate=1", "model.moe.controller=null"]).model.moe == (
        load_recipe(recipe_file).model.moe
    )


def test_gradient_ratio_needs_a_balance_loss(recipe_file: Path) -> None:
    every = "monitor.gradient_ratio_every=5"
    assert load_recipe(recipe_file, [every]).monitor.gradient_ratio_every == 5
    for none in ("model.moe.balance_weight=0", "model.moe.balance=none"):
        with pytest.raises(RecipeError, match="the pull of the balance loss, and model.moe.balance_weight is 0"):
            load_recipe(recipe_file, [every, none])


# a model section from elsewhere ------------------------------------------------------------------------

SECTION = {
    **{"vocab_size": 70, "num_layers": 5, "hidden_size": 12, "num_heads": 3, "ffn_hidden_size": 20},
    "moe": {"num_ffn_experts": 6, "top_k": 3, "router": {"num_layers": 2, "jitter": 0.1}},
}


def test_a_model_section_from_elsewhere_is_under_the_recipes(recipe_file: Path) -> None:
    given: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SECTION))
    before, after = TINY[: TINY.index("model:")], TINY[TINY.index("data:") :]
    said = "model: {moe: {tau: 0.5, router: {jitter: 0.2}, controller: {rate: 0.3}}}\n"
    recipe_file.write_text(before + said + after)
    overrides = ["model.num_layers=4", "model.moe.router.z_loss_weight=1e-3"]
    model = load_recipe(recipe_file, overrides, model=given).model
    assert (model.vocab_size, model.num_layers, model.moe.num_ffn_experts, model.moe.tau) == (70, 4, 6, 0.5)
    router = model.moe.router
    assert (router.num_layers, router.jitter, router.z_loss_weight) == (2, 0.2, 1e-3)
    assert model.moe.controller == ControllerConfig(rate=0.3)
    assert given == SECTION  # what was given stays as it was

    for nothing in ("", "model:\n", "model: {}\n"):  # the recipe need not say anything of the model
        recipe_file.write_text(before + nothing + after)
        assert load_recipe(recipe_file, model=given).model.vocab_size == 70
        with pytest.raises(RecipeError, match="model"):
            load_recipe(recipe_file)
    recipe_file.write_text(f"{before}model: 3\n{after}")
    with pytest.raises(RecipeError, match="model: 3: input should be a valid dictionary"):
        load_recipe(recipe_file, model=given)


def test_a_recipes_null_replaces_what_is_under_it(recipe_file: Path) -> None:
    given = {**SECTION, "moe": {**SECTION["moe"], "controller": {"rate": 0.3}}}  # type: ignore[dict-item]
    recipe_file.write_text(TINY)  # which has sizes of its own, and they hold
    model = load_recipe(recipe_file, ["model.moe.top_k=null"], model=given).model
    assert (model.num_layers, model.moe.num_ffn_experts, model.moe.top_k) == (2, 4, 2)
    assert model.moe.controller == ControllerConfig(rate=0.3)
    assert load_recipe(recipe_file, ["model.moe.controller=null"], model=given).model.moe.controller is None


# what is listed ----------------------------------------------------------------------------------------


def test_all_problems_are_listed_at_once(recipe_file: Path) -> None:
    text = TINY.replace("num_layers: 2, ", "").replace("path: shards", "pth: shards")
    recipe_file.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, ["train.max_lr=x"])
    assert str(error.value).splitlines() == [
        f"{recipe_file}: 4 problems",
        "  model.num_layers: is required and not given",
        "  data.path: is required and not given",
        "  data.pth: unknown key; did you mean data.path?",
        "  train.max_lr: 'x': input should be a valid number (from --set train.max_lr=x)",
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("train: {max_steps: 1}\ntrain: {max_steps: 2}\n", "key 'train' is given a second time"),
        ("train: {max_steps: 1, max_steps: 2}\n", "key 'max_steps' is given a second time"),
        ("train: [1\n", "is not valid YAML"),
        ("- 1\n", "a recipe is a mapping of sections (model, data, train, ...), not [1]"),
        ("", "a recipe is a mapping of sections (model, data, train, ...), not None"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("? [a]\n: 1\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert words in str(error.value)


def test_files_that_cannot_be_read(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"tinny.yaml: there is no such recipe; did you mean .*tiny.yaml\?"):
        load_recipe(recipe_file.with_name("tinny.yaml"))
    with pytest.raises(RecipeError, match="cannot be read as a recipe"):
        load_recipe(recipe_file.parent)
    recipe_file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as a recipe"):
        load_recipe(recipe_file)


def test_deepspeed_json_is_found_from_here_else_above_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, here = tmp_path / "a" / "b", tmp_path / "here"
    for folder in (inner, here, tmp_path / "a"):
        folder.mkdir(exist_ok=True, parents=True)
    (inner / "r.yaml").write_text(TINY)
    monkeypatch.chdir(here)
    with pytest.raises(RecipeError) as error:
        load_recipe(inner / "r.yaml")
    tried = [here, inner, inner.parent, tmp_path]
    assert (
        f"ds.json was not found; tried, in this order:\n  {tried[0] / 'ds.json'}\n  {tried[1] / 'ds.json'}"
        in str(error.value)
    )
    for place in (tmp_path, inner.parent, here):  # from the last choice to the first
        (place / "ds.json").write_text("{}")
        assert load_recipe(inner / "r.yaml").deepspeed == str(place / "ds.json")
    absolute = f"deepspeed={tmp_path / 'ds.json'}"
    assert load_recipe(inner / "r.yaml", [absolute]).deepspeed == str(tmp_path / "ds.json")


def test_every_field_is_described_and_nothing_can_be_changed(recipe_file: Path) -> None:
    def walk(section: type[BaseModel], name: str) -> None:
        for key, field in section.model_fields.items():
            assert field.description, f"{name}{key} has no sentence under it"
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel) and key != "data":
                    walked.append(f"{name}{key}")
                    walk(kind, f"{name}{key}.")

    walked: list[str] = []
    walk(Recipe, "")
    assert {"model.moe", "model.moe.router", "model.moe.controller"} <= {*walked}
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file).train.max_steps = 3


def test_config_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, moepp_ds.config; print({'torch', 'deepspeed'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", ["5e-4", "010", "2026-11-22", "0.6b", "run"])
def test_names_that_look_like_numbers_survive_the_dump(tmp_path: Path, name: str) -> None:
    recipe = load_recipe("launch/recipes/quickstart.yaml", [f'name="{name}"'])
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
