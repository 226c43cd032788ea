"""Names and keys: every element of every parameter has one place, and what a config says is what is computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import LAYOUTS, SETTINGS, recipe_for
from loaded_models import golden_recipe

from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.config import ModelConfig, RecipeError
from moepp_ds.hf_names import (
    Part,
    bias_names,
    layout_of,
    model_section,
    moepp_config,
    parts,
    released_config,
    released_differences,
    unused_tensors,
)


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_are_every_element_once_and_come_back(name: str) -> None:
    model = recipe_for(name).model
    reached: dict[str, int] = {}
    seen: set[str] = set()
    for part in parts(model):
        assert part.start == reached.get(part.parameter, 0)  # in order, without gap or overlap
        reached[part.parameter] = part.stop
        values_N = torch.rand(part.stop - part.start)
        tensors = part.to_hf(values_N)
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == dict(part.tensors)
        assert torch.equal(part.from_hf(tensors).flatten(), values_N)
        assert not seen & tensors.keys()
        seen |= tensors.keys()
    shapes = global_shapes(model)
    assert reached == {key: torch.Size(shape).numel() for key, shape in shapes.items()}


def test_an_experts_gate_lies_above_its_value() -> None:
    part = Part("p", 0, (2, 4), {"up": (4, 2)}, "transposed")
    # columns of ours: gate 0, gate 1, value 0, value 1; rows: features of the input
    tensors = part.to_hf(torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13]))
    assert tensors["up"].tolist() == [[0, 10], [1, 11], [2, 12], [3, 13]]


def test_a_dense_layers_gate_and_value_are_two_tensors() -> None:
    part = Part("p", 0, (2, 4), {"gate": (2, 2), "up": (2, 2)}, "halves")
    tensors = part.to_hf(torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13]))
    assert tensors["gate"].tolist() == [[0, 10], [1, 11]]
    assert tensors["up"].tolist() == [[2, 12], [3, 13]]


def test_names_of_a_layer() -> None:
    model = recipe_for("released").model
    named = {part.parameter: list(part.tensors) for part in parts(model) if part.start == 0}
    gate, experts = "model.layers.1.mlp.moe.gate.", "model.layers.1.mlp.moe.experts.experts."
    assert named["blocks.1.moe.router.hidden_XD"] == [gate + "wg.0.weight"]
    assert named["blocks.1.moe.router.weight_EX"] == [gate + "wg.2.weight"]
    assert named["blocks.1.moe.router.residual_EE"] == [gate + "gate_map.weight"]
    assert named["blocks.1.moe.experts.gate_up_EDG"] == [experts + "0.up_proj.weight"]
    assert named["blocks.1.moe.constants.value_JD"] == [experts + "4.constant"]
    assert named["blocks.1.moe.constants.selector_J2D"] == [experts + "4.wg.weight"]
    assert named["blocks.1.attention.q_proj.weight"] == ["model.layers.1.self_attn.q_proj.weight"]
    assert named["blocks.1.ffn_norm.weight"] == ["model.layers.1.post_attention_layernorm.weight"]
    assert "blocks.0.moe.router.residual_EE" not in named
    assert unused_tensors(model, "released") == {"model.layers.0.mlp.moe.gate.gate_map.weight": (8, 8)}
    assert unused_tensors(model, "moepp") == {}


def test_biases_of_moe_layers_alone() -> None:
    model = golden_recipe("model.moe.controller={}", "model.moe.every=3").model
    assert bias_names(model) == ["model.layers.2.mlp.moe.gate.bias"]
    assert bias_names(recipe_for("paper").model) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_our_config_says_the_whole_model(name: str) -> None:
    model = recipe_for(name).model
    config = moepp_config(model)
    assert layout_of(config) == "moepp"
    assert ModelConfig.model_validate(model_section(config)) == model


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout == "released"])
def test_released_config_says_what_is_computed(name: str) -> None:
    model = recipe_for(name).model
    back = ModelConfig.model_validate(model_section(released_config(model)))
    trained = {"document_attention", "moe"}
    assert back.model_dump(exclude=trained) == model.model_dump(exclude=trained)
    assert back.moe == model.moe


def test_keys_of_the_released_config() -> None:
    config = released_config(golden_recipe("model.moe.variant=released", "model.moe.expert_input_scale=1.0").model)
    assert config == {
        "model_type": "MoE++",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "pretraining_tp": 1,
        "num_experts": [8],
        "moe_expert_interval": 1,
        "moe_use_mixtral_gating": False,
        "moe_2layer_gate": True,
        "moe_use_logits_norm": False,
        "moe_gate_norm_std": 1.0,
        "moe_feature_no_mul_topk": True,
    }


def test_what_the_released_layout_cannot_say_is_listed() -> None:
    settings = ["num_copy=2", "num_shared_experts=1", "controller={}", "variant=released", "top_k=3"]
    model = golden_recipe("model.qkv_bias=true", *(f"model.moe.{setting}" for setting in settings)).model
    assert released_differences(model) == [
        "model.qkv_bias: True here, False there",
        "model.moe.num_copy: 2 here, 1 there",
        "model.moe.num_shared_experts: 1 here, 0 there",
        "model.moe.top_k: 3 here, 2 there",
        "model.moe.expert_input_scale: 3.0 here, 1.0 or 2.0 there",
        "model.moe.controller: given here, there are no biases there",
    ]
    with pytest.raises(RecipeError, match="use --layout moepp, or change these:\n  model.qkv_bias"):
        released_config(model)


def test_what_only_training_uses_is_no_difference() -> None:
    settings = ["variant=released", "tau=0.3", "dropless=true", "router.jitter=0.1", "balance=per_group"]
    assert released_differences(golden_recipe(*(f"model.moe.{setting}" for setting in settings)).model) == []


RELEASED: dict[str, Any] = {
    "model_type": "MoE++",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": [7],
}


def test_released_defaults() -> None:
    section = model_section(RELEASED)
    assert section["moe"] == {
        "variant": "released",
        "num_ffn_experts": 3,
        "num_constant": 2,
        "num_copy": 1,
        "num_zero": 1,
        "top_k": 2,
        "gating_residual": True,
        "router": {"num_layers": 2, "logit_std": None},
        "combine": "renormalize_computing",
        "expert_input_scale": 2.0,
    }
    assert ModelConfig.model_validate(section).rope_theta == 10000.0


def test_number_of_experts_may_stand_alone_and_positions_in_new_keys() -> None:
    said = {**RELEASED, "num_experts": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    section = model_section(said)
    assert section["moe"] == model_section(RELEASED)["moe"]
    assert section["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": [8, 16]}, "gating residual with unequal expert counts"),
        ({"num_experts": []}, "gating residual with unequal expert counts"),
        ({"num_experts": [4]}, "no FFN is left"),
        ({"moe_expert_interval": 2}, "moe_expert_interval 2: the released code runs 1 alone"),
        ({"moe_top_k": 4}, "moe_top_k 4: this key is not known"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': experts are SwiGLU"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary positions are not scaled"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary positions are not scaled"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters {'rope_theta': 1"),
        ({"sliding_window": 128}, "sliding_window 128"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"attention_dropout": 0.1}, "set it to 0 if it may go"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match="config.json says what moepp_ds does not compute") as caught:
        model_section({**RELEASED, **change})
    assert said in str(caught.value)


def test_all_of_it_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        model_section({**RELEASED, "hidden_act": "gelu", "sliding_window": 9, "num_experts": [6, 7]})
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": "eight"},
        {"num_experts": [None]},
        {"moe_use_logits_norm": True, "moe_gate_norm_std": "wide"},
        {"rope_scaling": "default"},
        {"model_type": "moepp_ds", "moe": 3},
    ],
)
def test_values_of_the_wrong_kind(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="config.json is damaged: a value is of the wrong kind|unequal expert counts"):
        model_section({**RELEASED, **change})


def test_missing_keys_and_other_models() -> None:
    lacking = copy.copy(RELEASED)
    del lacking["hidden_size"]
    with pytest.raises(RecipeError, match="lacks the key 'hidden_size'"):
        model_section(lacking)
    with pytest.raises(RecipeError, match="model_type 'mixtral' is not imported; moepp_ds and MoE\\+\\+ are"):
        layout_of({"model_type": "mixtral"})
