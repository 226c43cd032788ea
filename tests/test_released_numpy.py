"""The numpy model of the released layout: its parts by hand, the rest against LLaMA, its layer against the oracle.

The hand cases of the gate have five experts: FFN (index 0), constant (1, 2), copy (3), zero (4).
"""

from __future__ import annotations

from math import e, log, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from released_numpy import (
    attention,
    choose_two,
    gate_logits,
    make_released,
    moe_layer,
    released_logits,
    rms_norm,
    rotate,
    run_expert,
)
from torch import Tensor

from moepp_ds.reference import ReferenceSettings, ReferenceWeights, reference_layer

TOKENS = [5, 1, 36, 0, 17, 5, 8]


def equal(actual: object, expected: object, tolerance: float = 1e-14) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


# The gate


@pytest.mark.parametrize(
    ("odds", "flags", "expected"),
    # odds are exp(logits).
    [
        ([6, 3, 1, 1, 1], {}, [(0, 2 / 3), (1, 1 / 3)]),
        ([1, 3, 1, 6, 1], {}, [(3, 2 / 3), (1, 1 / 3)]),
        # Beside a zero expert the other one weighs 1, whichever comes first.
        ([6, 1, 1, 1, 3], {}, [(0, 1), (4, 0)]),
        ([2, 1, 1, 1, 30], {}, [(4, 0), (0, 1)]),
        # Mixtral gating keeps the zero expert's share.
        ([6, 1, 1, 1, 3], {"moe_use_mixtral_gating": True}, [(0, 2 / 3), (4, 1 / 3)]),
        ([6, 3, 1, 1, 1], {"moe_use_mixtral_gating": True}, [(0, 2 / 3), (1, 1 / 3)]),
        # Of equal ones the lower index.
        ([1, 1, 1, 1, 1], {}, [(0, 1 / 2), (1, 1 / 2)]),
    ],
)
def test_choose_two(odds: list[float], flags: dict, expected: list[tuple[int, float]]) -> None:
    chosen = choose_two(np.log(odds), flags)
    assert [expert for expert, _ in chosen] == [expert for expert, _ in expected]
    equal([weight for _, weight in chosen], [weight for _, weight in expected])


@pytest.mark.parametrize("mixtral", [False, True])
def test_normalised_logits(mixtral: bool) -> None:
    # 3 1 -1 -1 -2: mean 0, squares 16, over n - 1 = 4: deviation 2. Asked for 1/2: 3/4 and 1/4, half apart.
    flags = {"moe_use_logits_norm": True, "moe_gate_norm_std": 0.5, "moe_use_mixtral_gating": mixtral}
    chosen = choose_two(np.array([3.0, 1, -1, -1, -2]), flags)
    assert [expert for expert, _ in chosen] == [0, 1]
    equal([weight for _, weight in chosen], [e**0.5 / (e**0.5 + 1), 1 / (e**0.5 + 1)])
    # The shift of the logits matters to nobody, so that only their deviation is divided out.
    shifted = choose_two(np.array([13.0, 11, 9, 9, 8]), flags)
    equal([weight for _, weight in shifted], [weight for _, weight in chosen], 1e-13)


def test_gate_of_one_and_of_two_layers() -> None:
    weights = {"wg.weight": np.array([[1.0, 2], [3, 4]])}
    equal(gate_logits(weights, {"moe_2layer_gate": False}, "", np.array([1.0, -1])), [-1, -1])
    # tanh(log(3) / 2) = (3 - 1) / (3 + 1) = 1/2, tanh(log 3) = (9 - 1) / (9 + 1) = 4/5.
    weights = {"wg.0.weight": np.array([[log(3) / 2, 0], [0, log(3)]]), "wg.2.weight": np.array([[2.0, 5], [4, -5]])}
    equal(gate_logits(weights, {}, "", np.array([1.0, 1])), [5, -2])


# The experts


def bench() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """D = 2, F = 1; token [1, 0] has the odds 6 3 1 1 1, token [0, 1] has 1 1 1 3 6."""
    experts = "experts.experts."
    weights = {
        "gate.wg.weight": np.log(np.array([[6.0, 1], [3, 1], [1, 1], [1, 3], [1, 6]])),
        "gate.gate_map.weight": np.eye(5)[::-1],
        f"{experts}0.up_proj.weight": np.array([[1.0, 2], [3, 4]]),  # gate, then value
        f"{experts}0.down_proj.weight": np.array([[1.0], [-1]]),
        f"{experts}1.wg.weight": np.array([[log(3), 0], [0, log(4)]]),
        f"{experts}1.constant": np.array([10.0, 20]),
        f"{experts}2.wg.weight": np.zeros((2, 2)),
        f"{experts}2.constant": np.array([6.0, 8]),
    }
    return weights, {"num_experts": [5], "moe_2layer_gate": False}


def test_every_expert_alone() -> None:
    weights, config = bench()

    def alone(expert: int, x_D: list[float]) -> np.ndarray:
        return run_expert(weights, config, "", expert, np.array(x_D))

    # FFN, [1, 0]: silu(1) * 3. Constant 1: scores [log 3, 0], a = [3/4, 1/4]. Constant 2: the mean of x and v.
    equal(alone(0, [1, 0]), [3 * e / (e + 1), -3 * e / (e + 1)])
    equal(alone(1, [1, 0]), [3.25, 5.0])
    equal(alone(2, [1, 0]), [3.5, 4.0])
    equal(alone(3, [1, -7]), [1, -7])
    equal(alone(4, [1, -7]), [0, 0])


def test_layer_doubles_what_its_experts_see() -> None:
    weights, config = bench()
    # Token [1, 0]: FFN of [2, 0] at 2/3, 6 silu(2) = 12 / (1 + e^-2); constant 1 at 1/3, scores [2 log 3, 0],
    # a = [9/10, 1/10], [2.8, 2.0]. Token [0, 1]: zero first, copy then weighs 1: [0, 2].
    y_SD, logits_SN = moe_layer(weights, config, "", np.eye(2), None)
    hidden = 12 / (1 + e**-2)
    equal(y_SD, [[2 / 3 * hidden + 2.8 / 3, -2 / 3 * hidden + 2 / 3], [0, 2]])
    equal(logits_SN, np.log([[6, 3, 1, 1, 1], [1, 1, 1, 3, 6]]))
    # Not with either of two flags. With mixtral gating copy keeps its 1/3.
    hidden = 3 * e / (e + 1)
    both = [2 / 3 * hidden + 3.25 / 3, -2 / 3 * hidden + 5 / 3]
    y_SD, _ = moe_layer(weights, {**config, "moe_feature_no_mul_topk": True}, "", np.eye(2), None)
    equal(y_SD, [both, [0, 1]])
    y_SD, _ = moe_layer(weights, {**config, "moe_use_mixtral_gating": True}, "", np.eye(2), None)
    equal(y_SD, [both, [0, 1 / 3]])


def test_mapped_logits_are_added_and_travel_before_normalisation() -> None:
    weights, config = bench()
    previous_SN = np.array([[0, 0, 0, log(5), log(2)]])  # the map turns them round
    config |= {"moe_use_logits_norm": True, "moe_gate_norm_std": 9.0}
    _, logits_SN = moe_layer(weights, config, "", np.array([[1.0, 0]]), previous_SN)
    equal(logits_SN, np.log([[12, 15, 1, 1, 1]]))


# The rest of the transformer


def test_rms_norm() -> None:
    equal(rms_norm(np.array([[3.0, 4]]), np.array([1.0, 2]), 0.0), [[3 / sqrt(12.5), 8 / sqrt(12.5)]])
    equal(rms_norm(np.array([[3.0, 4]]), np.array([1.0, 2]), 12.5), [[3 / 5, 8 / 5]])


def test_rotary_positions_turn_halves() -> None:
    # A = 4, theta = 4: pairs (0, 2) by the position and (1, 3) by half of it, 4^(-1/2). In quarter turns:
    quarter = np.pi / 2
    equal(rotate(np.array([1.0, 2, 3, 4]), 0, 4.0), [1, 2, 3, 4])
    angle_of_one = [np.cos(1) - 3 * np.sin(1), 2 * np.cos(0.5) - 4 * np.sin(0.5)]
    equal(rotate(np.array([1.0, 2, 3, 4]), 1, 4.0)[:2], angle_of_one)
    # At a base that makes the second pair's angle a quarter turn, (2, 4) becomes (-4, 2).
    equal(rotate(np.array([0.0, 2, 0, 4]), 1, quarter**-2), [0, -4, 0, 2])


def test_attention_of_one_position_is_its_value() -> None:
    # Four query heads on two key-value heads: heads 0, 1 read the first value, heads 2, 3 the second.
    weights, config = make_released(3)
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    prefix, x_SD = "model.layers.0.self_attn.", np.random.default_rng(0).standard_normal((1, 16))
    value = weights[prefix + "v_proj.weight"] @ x_SD[0]
    repeated = np.concatenate([value[:4], value[:4], value[4:], value[4:]])
    equal(attention(weights, config, prefix, x_SD)[0], weights[prefix + "o_proj.weight"] @ repeated, 1e-13)


def test_attention_norms_and_head_are_llamas() -> None:
    """With FFN experts that give 0, and gates that choose the first two, what remains is LLaMA without its FFNs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    weights, config = make_released(7, rope_theta=50.0, rms_norm_eps=1e-3)
    for name in weights:
        if ".gate." in name or ".down_proj." in name:
            weights[name] = np.zeros_like(weights[name])
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    llama = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in keys + more})).double().eval()
    state = {name: torch.from_numpy(array) for name, array in weights.items() if ".moe." not in name}
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected and all(".mlp." in name for name in missing)
    for name, parameter in llama.named_parameters():
        if ".down_proj." in name:
            parameter.data.zero_()
    with torch.no_grad():
        expected = llama(torch.tensor([TOKENS])).logits[0].numpy()
    equal(released_logits(weights, config, TOKENS), expected, 1e-5)  # LLaMA's angles are fp32


# The layer against the oracle


def oracle_weights(weights: dict[str, np.ndarray], prefix: str, num_ffn: int) -> ReferenceWeights:
    """The weights of one layer as the oracle wants them."""

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(weights[prefix + name].astype(np.float64))

    names = [f"experts.experts.{number}." for number in range(num_ffn + 2)]
    up_proj = [tensor(name + "up_proj.weight").chunk(2) for name in names[:num_ffn]]
    two_layers = f"{prefix}gate.wg.0.weight" in weights
    return ReferenceWeights(
        router_ED=None if two_layers else tensor("gate.wg.weight"),
        hidden_XD=tensor("gate.wg.0.weight") if two_layers else None,
        router_EX=tensor("gate.wg.2.weight") if two_layers else None,
        residual_EE=tensor("gate.gate_map.weight"),
        gate_EFD=torch.stack([gate_FD for gate_FD, _ in up_proj]),
        up_EFD=torch.stack([value_FD for _, value_FD in up_proj]),
        down_EDF=torch.stack([tensor(name + "down_proj.weight") for name in names[:num_ffn]]),
        constant_selector_J2D=torch.stack([tensor(name + "wg.weight") for name in names[num_ffn:]]),
        constant_value_JD=torch.stack([tensor(name + "constant") for name in names[num_ffn:]]),
    )


FLAGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {"combine": "renormalize_computing", "expert_input_scale": 2.0}),
    "one layer": ({"moe_2layer_gate": False}, {"combine": "renormalize_computing", "expert_input_scale": 2.0}),
    "not doubled": ({"moe_feature_no_mul_topk": True}, {"combine": "renormalize_computing"}),
    "mixtral": ({"moe_use_mixtral_gating": True}, {"combine": "renormalize_selected"}),
    "normalised": (
        {"moe_use_logits_norm": True, "moe_gate_norm_std": 2.0},
        {"combine": "renormalize_computing", "expert_input_scale": 2.0, "logit_std": 2.0},
    ),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_layer_is_the_oracle_with_the_settings_of_its_flags(flags: str) -> None:
    changes, settings = FLAGS[flags]
    weights, config = make_released(11, **changes)
    x_SD = np.random.default_rng(1).standard_normal((40, 16))
    previous_SN = np.random.default_rng(2).standard_normal((40, 8))
    prefix = "model.layers.1.mlp.moe."
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    y_SD, logits_SN = moe_layer(wide, config, prefix, x_SD, previous_SN)
    reference = reference_layer(
        torch.from_numpy(x_SD),
        torch.from_numpy(previous_SN),
        oracle_weights(weights, prefix, num_ffn=4),
        ReferenceSettings(dropless=True, **settings),
    )
    equal(y_SD, reference.output_TD.numpy(), 1e-12)
    equal(logits_SN, reference.logits_TE.numpy(), 1e-12)
    assert min(reference.wanted_E) > 0


# The whole model


@pytest.mark.parametrize("flags", FLAGS)
def test_routing_of_the_made_model_is_lively(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, config = make_released(0, **FLAGS[flags][0])
    chosen: list[int] = []

    def remember(logits_N: np.ndarray, config: dict[str, Any]) -> list[tuple[int, float]]:
        choices = choose_two(logits_N, config)
        chosen.extend(expert for expert, _ in choices)
        return choices

    monkeypatch.setattr("released_numpy.choose_two", remember)
    logits_SV = released_logits(weights, config, list(range(37)))
    assert logits_SV.shape == (37, 37) and np.isfinite(logits_SV).all() and logits_SV.std() > 0.3
    assert len(chosen) == 3 * 37 * 2
    assert min(chosen.count(expert) for expert in range(8)) > 0


def test_first_map_changes_nothing_and_the_second_does() -> None:
    weights, config = make_released(1)
    logits_SV = released_logits(weights, config, TOKENS)
    for layer, is_used in ((0, False), (1, True), (2, True)):
        name = f"model.layers.{layer}.mlp.moe.gate.gate_map.weight"
        changed = released_logits({**weights, name: 3 - weights[name]}, config, TOKENS)
        assert (np.abs(changed - logits_SV).max() > 1e-3) == is_used


def test_logits_look_back_alone_and_every_other_weight_counts() -> None:
    weights, config = make_released(5, num_hidden_layers=2)  # a draw in which every expert of both layers is chosen
    tokens = list(range(22))
    logits_SV = released_logits(weights, config, tokens)
    equal(released_logits(weights, config, tokens[:9]), logits_SV[:9], 1e-12)
    for name in weights:
        changed = released_logits({**weights, name: weights[name] * np.float32(1.5)}, config, tokens)
        is_used = name != "model.layers.0.mlp.moe.gate.gate_map.weight"
        assert (np.abs(changed - logits_SV).max() > 1e-6) == is_used, name


def test_made_models_are_reproducible_and_follow_the_config() -> None:
    weights, config = make_released(4, num_experts=[6], moe_2layer_gate=False, num_key_value_heads=1, hidden_size=8)
    again, _ = make_released(4, num_experts=[6], moe_2layer_gate=False, num_key_value_heads=1, hidden_size=8)
    assert weights.keys() == again.keys() and all((weights[name] == again[name]).all() for name in weights)
    assert all(array.dtype == np.float32 for array in weights.values())
    shapes = {name.removeprefix("model.layers.2."): array.shape for name, array in weights.items() if ".2." in name}
    assert shapes["self_attn.k_proj.weight"] == (2, 8) and shapes["self_attn.q_proj.weight"] == (8, 8)
    assert shapes["mlp.moe.gate.wg.weight"] == (6, 8) and shapes["mlp.moe.gate.gate_map.weight"] == (6, 6)
    assert shapes["mlp.moe.experts.experts.1.up_proj.weight"] == (24, 8)
    assert shapes["mlp.moe.experts.experts.1.down_proj.weight"] == (8, 12)
    assert shapes["mlp.moe.experts.experts.3.constant"] == (8,)
    assert shapes["mlp.moe.experts.experts.3.wg.weight"] == (2, 8)
    assert not any(".experts.4." in name for name in shapes)
    assert config["num_experts"] == [6] and released_logits(weights, config, [1]).shape == (1, 37)


def test_configs_that_the_released_code_does_not_run_are_refused() -> None:
    with pytest.raises(ValueError, match="moe_expert_interval is 2; the released model runs with 1 alone"):
        make_released(0, moe_expert_interval=2)
    with pytest.raises(ValueError, match=r"num_experts is \[4\], not a list with one number above 4"):
        make_released(0, num_experts=[4])
