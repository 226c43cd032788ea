"""The released MoE++ model as plain numpy in float64: what its published inference code computes, rule by rule.

It judges the import and export of weights, so it knows neither torch nor the package: its input is a dict of arrays
under their Hugging Face names, and a config dict with the keys of config.json. The rules:

1. embed        row of model.embed_tokens
2. each layer   h = h + attention(rms_norm(h)); h = h + moe(rms_norm(h)); all layers are mixtures of experts
3. attention    LLaMA's: no biases, rotary positions on halves, causal, several query heads to a key-value head
4. gate         logits = W2 tanh(W1 x), or W x, + gate_map @ the previous layer's logits (not in the first layer)
5. choose       the two largest logits; weights by `choose_two`
6. experts      FFN..., constant, constant, copy, zero; they see the token times 2, unless a flag says not to
7. head         lm_head @ rms_norm(h)

Axis letters: S positions, D width, H query heads, G key-value heads, A head width, F expert width, N experts of all
kinds, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

NUM_CONSTANT = 2
NUM_OTHERS = NUM_CONSTANT + 2
"""Constant, constant, copy, zero: the released code knows no other numbers of them."""

Weights = Mapping[str, np.ndarray]
Config = Mapping[str, Any]


def released_logits(weights: Weights, config: Config, tokens: list[int]) -> np.ndarray:
    """Return the logits [S, V] that follow each of S tokens. Weights of any float type; all work is in float64.

    Raises ValueError for a config that the released code does not run.
    """
    _check(config)
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    eps = config["rms_norm_eps"]
    h_SD = np.stack([weights["model.embed_tokens.weight"][token] for token in tokens])
    gate_logits_SN = None
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normal_SD = rms_norm(h_SD, weights[prefix + "input_layernorm.weight"], eps)
        h_SD = h_SD + attention(weights, config, prefix + "self_attn.", normal_SD)
        normal_SD = rms_norm(h_SD, weights[prefix + "post_attention_layernorm.weight"], eps)
        moe_SD, gate_logits_SN = moe_layer(weights, config, prefix + "mlp.moe.", normal_SD, gate_logits_SN)
        h_SD = h_SD + moe_SD
    return rms_norm(h_SD, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def rms_norm(x_SD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """Each row over the root of its mean square, times the weight."""
    return np.stack([x_D / math.sqrt((x_D * x_D).mean() + eps) * weight_D for x_D in x_SD])


def rotate(x_A: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Turn feature i and feature i + A/2 of one head by the angle position * theta^(-2i/A)."""
    half, out_A = len(x_A) // 2, np.empty_like(x_A)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x_A))
        cosine, sine = math.cos(angle), math.sin(angle)
        out_A[i] = x_A[i] * cosine - x_A[i + half] * sine
        out_A[i + half] = x_A[i + half] * cosine + x_A[i] * sine
    return out_A


def attention(weights: Weights, config: Config, prefix: str, x_SD: np.ndarray) -> np.ndarray:
    """Causal attention; query head h reads key-value head h // (H / G)."""
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, theta = x_SD.shape[1] // num_heads, config.get("rope_theta", 10000.0)
    q, k, v = ((x_SD @ weights[f"{prefix}{name}_proj.weight"].T).reshape(len(x_SD), -1, width) for name in "qkv")
    mixed_SHA = np.zeros_like(q)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        keys = [rotate(k_A, position, theta) for position, k_A in enumerate(k[:, kv_head])]
        for position in range(len(x_SD)):
            query_A = rotate(q[position, head], position, theta)
            scores = np.array([query_A @ key_A for key_A in keys[: position + 1]]) / math.sqrt(width)
            for before, share in enumerate(softmax(scores)):
                mixed_SHA[position, head] += share * v[before, kv_head]
    return mixed_SHA.reshape(len(x_SD), -1) @ weights[prefix + "o_proj.weight"].T


def moe_layer(
    weights: Weights, config: Config, prefix: str, x_SD: np.ndarray, previous_SN: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the layer's output [S, D] and the gate's logits [S, N], which the next layer's gate reads."""
    untouched = config.get("moe_use_mixtral_gating", False) or config.get("moe_feature_no_mul_topk", False)
    outputs, all_logits = [], []
    for position, x_D in enumerate(x_SD):
        logits_N = gate_logits(weights, config, prefix + "gate.", x_D)
        if previous_SN is not None:
            logits_N = logits_N + weights[prefix + "gate.gate_map.weight"] @ previous_SN[position]
        all_logits.append(logits_N)
        y_D = np.zeros_like(x_D)
        for expert, weight in choose_two(logits_N, config):
            y_D += weight * run_expert(weights, config, prefix, expert, x_D if untouched else 2 * x_D)
        outputs.append(y_D)
    return np.stack(outputs), np.stack(all_logits)


def gate_logits(weights: Weights, config: Config, prefix: str, x_D: np.ndarray) -> np.ndarray:
    """What the gate makes of one token, without the previous layer's part."""
    if config.get("moe_2layer_gate", True):
        return weights[prefix + "wg.2.weight"] @ np.tanh(weights[prefix + "wg.0.weight"] @ x_D)
    return weights[prefix + "wg.weight"] @ x_D


def choose_two(logits_N: np.ndarray, config: Config) -> list[tuple[int, float]]:
    """The two experts of one token with their weights, the larger logit first; of equal ones the lower index.

    Mixtral gating: softmax over the two. Default: softmax over all, the zero expert's set to 0, over their sum. Both
    see the logits over their standard deviation (n - 1), times moe_gate_norm_std, if they are to be normalised.
    """
    if config.get("moe_use_logits_norm", False):
        logits_N = logits_N / (logits_N.std(ddof=1) / config.get("moe_gate_norm_std", 1.0))
    first, second = sorted(range(len(logits_N)), key=lambda expert: (-logits_N[expert], expert))[:2]
    if config.get("moe_use_mixtral_gating", False):
        weight_first, weight_second = softmax(logits_N[[first, second]])
        return [(first, weight_first), (second, weight_second)]
    share_N = softmax(logits_N)
    share_N[-1] = 0.0
    total = share_N[first] + share_N[second]
    return [(first, share_N[first] / total), (second, share_N[second] / total)]


def run_expert(weights: Weights, config: Config, prefix: str, expert: int, x_D: np.ndarray) -> np.ndarray:
    """What one expert makes of one token, already scaled."""
    num_experts, name = config["num_experts"][0], f"{prefix}experts.experts.{expert}."
    if expert == num_experts - 1:
        return np.zeros_like(x_D)
    if expert == num_experts - 2:
        return x_D
    if expert >= num_experts - NUM_OTHERS:
        a1, a2 = softmax(weights[name + "wg.weight"] @ x_D)
        return a1 * x_D + a2 * weights[name + "constant"]
    gate_F, value_F = np.split(weights[name + "up_proj.weight"] @ x_D, 2)
    return weights[name + "down_proj.weight"] @ (gate_F / (1 + np.exp(-gate_F)) * value_F)


def softmax(x: np.ndarray) -> np.ndarray:
    """Shares of one vector."""
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def _check(config: Config) -> None:
    """Refuse what the released code does not run."""
    runs = {"model_type": "MoE++", "moe_expert_interval": 1, "rope_scaling": None, "hidden_act": "silu"}
    for key, only in runs.items():
        if config.get(key, only) != only:
            raise ValueError(f"{key} is {config[key]!r}; the released model runs with {only!r} alone")
    if len(config["num_experts"]) != 1 or config["num_experts"][0] <= NUM_OTHERS:
        raise ValueError(f"num_experts is {config['num_experts']}, not a list with one number above {NUM_OTHERS}")


def make_released(seed: int, **changes: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Make a tiny random model: float32 weights under their released names, and its config.json as a dict.

    `changes` are config keys. Matrices keep the size of their input, those of gates make it somewhat larger: a token's
    gate logits deviate by 1 in the first layer and by 3 in the third, so tokens choose differently, yet not surely.
    """
    config: dict[str, Any] = {
        "model_type": "MoE++",
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts": [8],
        "moe_expert_interval": 1,
        "moe_use_mixtral_gating": False,
        "moe_2layer_gate": True,
        "moe_use_logits_norm": False,
        "moe_gate_norm_std": 1.0,
        "moe_feature_no_mul_topk": False,
        **changes,
    }
    _check(config)
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in released_shapes(config).items():
        values = generator.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif len(shape) == 2 and "embed_tokens" not in name:
            values *= (1.5 if ".gate." in name else 1.0) / math.sqrt(shape[1])
        weights[name] = values.astype(np.float32)
    return weights, config


def released_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, layer by layer."""
    V, D, F, N = config["vocab_size"], config["hidden_size"], config["intermediate_size"], config["num_experts"][0]
    kv_width = D // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in {"q": D, "k": kv_width, "v": kv_width, "o": D}.items():
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, D)
        shapes[prefix + "input_layernorm.weight"] = (D,)
        shapes[prefix + "post_attention_layernorm.weight"] = (D,)
        gate, experts = prefix + "mlp.moe.gate.", prefix + "mlp.moe.experts.experts."
        if config.get("moe_2layer_gate", True):
            shapes |= {gate + "wg.0.weight": (8 * N, D), gate + "wg.2.weight": (N, 8 * N)}
        else:
            shapes[gate + "wg.weight"] = (N, D)
        shapes[gate + "gate_map.weight"] = (N, N)
        for expert in range(N - NUM_OTHERS):
            shapes[f"{experts}{expert}.up_proj.weight"] = (2 * F, D)
            shapes[f"{experts}{expert}.down_proj.weight"] = (D, F)
        for expert in range(N - NUM_OTHERS, N - 2):
            shapes[f"{experts}{expert}.constant"] = (D,)
            shapes[f"{experts}{expert}.wg.weight"] = (2, D)
    return shapes | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}
