"""The mixture-of-experts section: what a null stands for, which choices exclude each other, and that a recipe that is
saved with every default filled in loads as the same one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from moepp_ds.config import MoEConfig, Recipe, RecipeError, RouterConfig, load_recipe
from moepp_ds.config.stored import stored_recipe

KINDS = ("num_zero", "num_copy", "num_constant")
VANILLA = dict.fromkeys(KINDS, 0)


def moe(**changes: Any) -> MoEConfig:
    """8 FFN + 2 constant + 1 copy + 1 zero experts, top 2, unless changed."""
    return MoEConfig.model_validate({"num_ffn_experts": 8, "num_constant": 2, **changes})


def problems(**changes: Any) -> list[str]:
    with pytest.raises(ValidationError) as error:
        moe(**changes)
    (found,) = error.value.errors()
    return found["msg"].removeprefix("Value error, ").split("\n")


# what a null stands for ----------------------------------------------------------------------------------

PLAIN = {
    **{"top_k": 2, "combine": "softmax", "expert_input_scale": 1.0, "balance_counts": "all", "balance_weight": 0.01},
    **{"capacity_factor": 1.1, "capacity_counts": "assignments", "min_capacity": 1, "drop_policy": "probability"},
}
NO_SEATS = dict.fromkeys(("capacity_factor", "capacity_counts", "min_capacity", "drop_policy"))
THRESHOLD = {"router": {"threshold": 0.9}, "capacity_factor": 4.0}


@pytest.mark.parametrize(
    "changes, filled_in",
    [
        ({}, {}),
        ({"dropless": True}, NO_SEATS),
        (
            THRESHOLD,
            {"top_k": None, "capacity_counts": "tokens", "drop_policy": "rank", "balance_counts": "first"}
            | {"capacity_factor": 4.0},
        ),
        (
            {"router": {"threshold": 0.9}, "dropless": True},
            {"top_k": None, **NO_SEATS, "balance_counts": "first"},
        ),
        ({"variant": "released"}, {"combine": "renormalize_computing", "expert_input_scale": 2.0}),
        (
            {"variant": "released", "top_k": 3},
            {"top_k": 3, "combine": "renormalize_computing", "expert_input_scale": 3.0},
        ),
        ({"variant": "released", "combine": "softmax"}, {"expert_input_scale": 2.0}),
        ({"variant": "released", "combine": "renormalize_selected"}, {"combine": "renormalize_selected"}),
        ({"variant": "released", "expert_input_scale": 1.0}, {"combine": "renormalize_computing"}),
        ({"balance": "none"}, {"balance_weight": 0.0}),
        ({"balance_counts": "first", "min_capacity": 4}, {"balance_counts": "first", "min_capacity": 4}),
        ({"capacity_counts": "tokens", "drop_policy": "rank"}, {"capacity_counts": "tokens", "drop_policy": "rank"}),
    ],
)
def test_nulls_are_filled_in_by_their_rules(changes: dict[str, Any], filled_in: dict[str, Any]) -> None:
    for config in (moe(**changes), moe(**{**dict.fromkeys(PLAIN), **changes})):  # left out, or null
        assert {name: getattr(config, name) for name in PLAIN} == {**PLAIN, **filled_in}


def test_the_released_variant_has_two_layers_and_two_constants_unless_told_otherwise() -> None:
    def released(**changes: Any) -> MoEConfig:
        return MoEConfig.model_validate({"num_ffn_experts": 8, "variant": "released", **changes})

    assert (released().router.num_layers, released().num_constant) == (2, 2)
    assert MoEConfig(num_ffn_experts=8).router.num_layers == 1 == MoEConfig(num_ffn_experts=8).num_constant
    assert released(router={"logit_std": 1.0}).router == RouterConfig(num_layers=2, logit_std=1.0)
    assert released(router={"num_layers": 1}, num_constant=0).router.num_layers == 1
    assert released(router=RouterConfig()).router.num_layers == 1
    with pytest.raises(ValidationError, match="router"):
        released(router=3)


@pytest.mark.parametrize(
    "changes, choices",
    [
        ({"top_k": 3}, 3.0),
        (THRESHOLD, 4.0),  # 0.9 x 12 rounded up is 11, and there are seats for 4
        ({"router": {"threshold": 0.9}, "dropless": True}, 11.0),
        ({"router": {"threshold": 1.0}, "dropless": True}, 12.0),
        ({"router": {"threshold": 0.0}, "dropless": True}, 1.0),
        ({"router": {"threshold": 0.25}, "dropless": True}, 3.0),  # exactly
    ],
)
def test_choices_per_token(changes: dict[str, Any], choices: float) -> None:
    config = moe(**changes)
    assert config.choices_per_token == choices
    assert config.mean_ffn_experts == pytest.approx(choices * 0.6)  # 6 / (6 + 4)
    steered = config.model_copy(update={"controller": moe(controller={"target_ffn_experts": 1.3}).controller})
    assert steered.mean_ffn_experts == 1.3


@pytest.mark.parametrize(
    "changes, computed",
    [
        ({}, 1.2),  # top 2, 6 / (6 + 4) of them for FFN experts, and seats for a tenth more
        ({"capacity_factor": 0.5}, 0.6),
        ({"capacity_counts": "tokens"}, 0.66),  # seats as if each token had one assignment
        ({"dropless": True}, 1.2),
        (THRESHOLD, 2.4),
        ({"controller": {"target_ffn_experts": 1.5}}, 1.32),
    ],
)
def test_no_more_ffn_experts_compute_than_there_are_seats_for(changes: dict[str, Any], computed: float) -> None:
    assert moe(**changes).computed_ffn_experts == pytest.approx(computed)


@pytest.mark.parametrize(
    "changes, rates",
    [
        ({}, (0.5, 0.05)),
        ({"rule": "sign"}, (0.001, 0.001)),  # moves by all of its rate at every update: DeepSeek-V3's step
        ({"rate": 0.25}, (0.25, 0.025)),
        ({"rule": "sign", "rate": 0.02, "final_rate": 0.0}, (0.02, 0.0)),
    ],
)
def test_rates_of_the_controller(changes: dict[str, Any], rates: tuple[float, float]) -> None:
    for section in (changes, {"rate": None, "final_rate": None, **changes}):
        controller = moe(controller=section).controller
        assert controller is not None and (controller.rate, controller.final_rate) == rates


def test_a_vanilla_moe_can_be_balanced_by_a_controller() -> None:
    config = moe(**VANILLA, controller={"rule": "sign"}, balance="none")
    assert config.mean_ffn_experts == 2.0


# which choices exclude each other ------------------------------------------------------------------------

STEERED: dict[str, Any] = {"controller": {}}


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {**THRESHOLD, "top_k": 2},
            "top_k 2 is given beside router.threshold 0.9, which decides how many experts a token takes; set one of "
            "them to null",
        ),
        (
            {"top_k": 13},
            "top_k 13 is more than the 12 experts of a layer (8 FFN + 4 zero-computation); use top_k 1 to 12",
        ),
        (
            {"top_k": 1, "combine": "renormalize_selected"},
            "combine renormalize_selected with top_k 1 gives every expert that computes the weight 1, so the language "
            "model teaches the router nothing; use combine softmax, or top_k 2",
        ),
        ({"top_k": 1, "variant": "released"}, "combine renormalize_computing with top_k 1 gives every expert that"),
        (
            {"num_ffn_experts": 1, **VANILLA, "top_k": 1, "router": {"logit_std": 1.0}},
            "router.logit_std needs at least 2 experts: one logit has no standard deviation; set it to null",
        ),
        (
            {"shared_expert_gate": True},
            "shared_expert_gate true has nothing to gate, since num_shared_experts is 0; set one of them",
        ),
        (
            {"dropless": True, "capacity_factor": 1.1},
            "dropless true has no seats, but capacity_factor 1.1 is given; set dropless to false, or these to null",
        ),
        (
            {"dropless": True, "min_capacity": 4, "drop_policy": "rank", "capacity_counts": "tokens"},
            "dropless true has no seats, but capacity_counts tokens, min_capacity 4, drop_policy rank are given; set "
            "dropless to false, or these to null",
        ),
        (
            {**THRESHOLD, "capacity_counts": "assignments"},
            "capacity_counts assignments needs top_k, and with router.threshold there is none; use capacity_counts "
            "tokens",
        ),
        (
            {"router": {"threshold": 0.5}},
            "capacity_factor must be given with router.threshold: it is the mean number of experts per token that "
            "there are seats for, 1 to 12; or set dropless to true",
        ),
        (
            {"balance": "none", "balance_weight": 0.01},
            "balance_weight 0.01 weighs a loss that balance none leaves out; set balance_weight to 0, or use balance "
            "per_expert",
        ),
        (
            {"balance": "null_averaged", "num_zero": 0},
            "balance null_averaged averages over zero experts, and num_zero is 0; use balance per_expert",
        ),
        (
            {"balance": "per_group", **VANILLA},
            "balance per_group weighs FFN against zero-computation experts, and there are none of the latter; use "
            "balance per_expert or none",
        ),
        (
            {**STEERED, "top_k": 12},
            "controller has nothing to steer: every token takes all 12 experts; set it to null",
        ),
        (
            {**STEERED, "router": {"threshold": 1.0}, "dropless": True},
            "controller has nothing to steer: every token takes all 12 experts; set it to null",
        ),
        (
            {**THRESHOLD, **VANILLA, "controller": {"target_ffn_experts": 2.0}},
            "controller cannot reach a budget with router.threshold and no zero-computation experts: raising or "
            "lowering all biases changes no choice; use top_k, or num_zero 1",
        ),
        (
            {**THRESHOLD, **STEERED},
            "controller.target_ffn_experts must be given with router.threshold: tau implies none there",
        ),
        (
            {**THRESHOLD, "controller": {"target_ffn_experts": 8.5}},
            "controller.target_ffn_experts 8.5 is outside 0 to 8, what router.threshold 0.9 leaves of 12 experts (8 "
            "FFN + 4 zero-computation)",
        ),
        (
            {"controller": {"target_ffn_experts": 2.5}},
            "controller.target_ffn_experts 2.5 is outside 0 to 2, what top_k 2 leaves of 12 experts (8 FFN + 4 "
            "zero-computation)",
        ),
        (
            {"top_k": 6, "controller": {"target_ffn_experts": 1.5}},
            "controller.target_ffn_experts 1.5 is outside 2 to 6, what top_k 6 leaves of 12 experts (8 FFN + 4 "
            "zero-computation)",
        ),
        ({**VANILLA, "controller": {"target_ffn_experts": 1.5}}, "controller.target_ffn_experts 1.5 is outside 2 to 2"),
        (
            {"controller": {"rate": 0.1, "final_rate": 0.2}},
            "final_rate 0.2 is more than rate 0.1; it decays from the one to the other",
        ),
        (
            {"num_ffn_experts": [4, 8]},
            "[4, 8] would give layers unequal numbers of experts, but a gating residual carries the logits of one MoE "
            "layer to the next, expert by expert; give one number for all layers",
        ),
        ({"num_constant": [1, 2]}, "[1, 2] would give layers unequal numbers of experts"),
    ],
)
def test_contradictions_are_refused_with_the_rule(changes: dict[str, Any], words: str) -> None:
    (problem,) = problems(**changes)
    assert problem.startswith(words)


def test_all_contradictions_are_listed_at_once(recipe_file: Path) -> None:
    overrides = ["router.threshold=0.5", "top_k=2", "dropless=true", "capacity_factor=2", "shared_expert_gate=true"]
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, [f"model.moe.{override}" for override in overrides])
    lines = str(error.value).splitlines()
    assert lines[0] == f"{recipe_file}: 3 problems"
    assert [line.split(":")[0] for line in lines[1:]] == ["  model.moe"] * 3
    assert [line.split()[1] for line in lines[1:]] == ["top_k", "shared_expert_gate", "dropless"]


def test_values_outside_their_range_are_refused() -> None:
    router = [{"jitter": 1.0}, {"num_layers": 3}, {"logit_std": 0.0}, {"threshold": -0.1}, {"z_loss_weight": -1.0}]
    bad: list[dict[str, Any]] = [{"router": section} for section in router] + [{"num_shared_experts": -1}]
    bad += [{"controller": {"target_ffn_experts": 0.0}}, {"controller": {"rate": 0.0}}, {"controller": {"rule": "x"}}]
    bad += [{"min_capacity": 0}, {"combine_scale": 0.0}, {"expert_input_scale": 0}, {"expert_ffn_hidden_size": 0}]
    bad += [{"combine": "sum"}, {"balance": "all"}, {"balance_scope": "run"}, {"drop_policy": "random"}, {"top_k": 0}]
    for changes in bad:
        with pytest.raises(ValidationError):
            moe(**changes)


# saved and loaded ----------------------------------------------------------------------------------------

TINY = """
deepspeed: ds.json
model: {vocab_size: 100, num_layers: 2, hidden_size: 8, num_heads: 2, ffn_hidden_size: 16, moe: {num_ffn_experts: 4}}
data: {path: shards, seq_len: 16}
train: {max_steps: 10, batch_tokens: 512, micro_batch_size: 4, warmup_steps: 4}
"""

CHOICES: list[dict[str, Any]] = [
    {},
    {"top_k": 1, "capacity_counts": "tokens", "min_capacity": 3},
    {"top_k": 3, "dropless": True},
    {"router": {"threshold": 0.5, "jitter": 0.01, "z_loss_weight": 1e-3}, "capacity_factor": 3.0},
    {"router": {"threshold": 1.0, "logit_std": 0.5}, "dropless": True, "drop_policy": None},
]
EXPERTS: list[dict[str, Any]] = [{}, VANILLA, {"num_shared_experts": 2, "shared_expert_gate": True, "num_copy": 0}]
COMBINES = ["softmax", "renormalize_selected", "renormalize_computing", None]
BALANCES = ["per_expert", "per_group", "null_averaged", "none"]
CONTROLLERS: list[dict[str, Any] | None] = [None, {}, {"rule": "sign", "target_ffn_experts": 1.5, "final_rate": 0}]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "ds.json").write_text("{}")
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


def test_every_combination_loads_as_it_was_saved_or_is_refused(recipe_file: Path) -> None:
    raw: dict[str, Any] = {**yaml.safe_load(TINY), "name": "tiny", "deepspeed": str(recipe_file.with_name("ds.json"))}
    again = recipe_file.with_name("again.yaml")
    loaded = refused = 0
    grid = itertools.product(CHOICES, EXPERTS, COMBINES, BALANCES, CONTROLLERS)
    for number, (choice, experts, combine, balance, controller) in enumerate(grid):
        section: dict[str, Any] = {"num_ffn_experts": 4, **choice, **experts, "combine": combine, "balance": balance}
        section |= {"controller": controller, "variant": "released" if number % 3 else "paper"}
        content = {**raw, "model": {**raw["model"], "moe": section}}
        try:
            recipe = stored_recipe(content, place="grid")
        except RecipeError:
            refused += 1
            continue
        assert stored_recipe(recipe.model_dump(mode="json"), place="dump") == recipe
        if loaded % 8 == 0:  # text takes a hundred times as long
            again.write_text(recipe.dump())
            assert load_recipe(again) == recipe and load_recipe(again).dump() == recipe.dump()
        loaded += 1
    assert loaded + refused == 5 * 3 * 4 * 4 * 3
    assert loaded > 250 and refused > 100
    assert isinstance(recipe, Recipe)


def test_a_saved_recipe_changes_its_mind_key_by_key(recipe_file: Path) -> None:
    saved = load_recipe(recipe_file).model_dump(mode="json")
    with pytest.raises(RecipeError) as error:
        stored_recipe(saved, ["model.moe.router.threshold=0.5"], place="recipe of X")
    assert str(error.value).splitlines()[0] == "recipe of X: 2 problems"  # top_k and capacity_counts are filled in
    overrides = ["router.threshold=0.5", "top_k=null", "capacity_counts=null", "capacity_factor=2"]
    config = stored_recipe(saved, [f"model.moe.{override}" for override in overrides], place="").model.moe
    assert (config.top_k, config.capacity_counts, config.router.threshold) == (None, "tokens", 0.5)
