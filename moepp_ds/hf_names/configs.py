"""Which of our settings is which key of a Hugging Face config.json, in two layouts, and what none of them can say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ValidationError

from moepp_ds.config import ModelConfig, RecipeError

Layout = Literal["moepp", "released"]
MODEL_TYPES: Mapping[Layout, str] = {"moepp": "moepp_ds", "released": "MoE++"}

RELEASED_EXPERTS: Mapping[str, int] = {"num_constant": 2, "num_copy": 1, "num_zero": 1}
RELEASED_FLAGS: Mapping[str, Any] = {
    "moe_expert_interval": 1,
    "moe_use_mixtral_gating": False,
    "moe_2layer_gate": True,
    "moe_use_logits_norm": False,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": False,
}
"""The released model's own keys and what they mean when they are not given."""


def moepp_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that say what the model is, in our layout."""
    return {
        "model_type": MODEL_TYPES["moepp"],
        **_llama_keys(model),
        "head_dim": model.head_dim,
        "attention_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "document_attention": model.document_attention,
        "moe": model.moe.model_dump(mode="json"),
    }


def released_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that say what the model is, in the released layout; RecipeError if they cannot."""
    differences = released_differences(model)
    if differences:
        said = "the released layout cannot say this model; use --layout moepp, or change these:"
        raise RecipeError("\n  ".join([said, *differences]))
    moe = model.moe
    mixtral = moe.combine == "renormalize_selected"
    return {
        "model_type": MODEL_TYPES["released"],
        **_llama_keys(model),
        "intermediate_size": model.expert_ffn_hidden_size,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "num_experts": [moe.num_experts],
        **RELEASED_FLAGS,
        "moe_use_mixtral_gating": mixtral,
        "moe_2layer_gate": moe.router.num_layers == 2,
        "moe_use_logits_norm": moe.router.logit_std is not None,
        "moe_gate_norm_std": 1.0 if moe.router.logit_std is None else moe.router.logit_std,
        "moe_feature_no_mul_topk": not mixtral and moe.expert_input_scale == 1.0,
    }


def _llama_keys(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
    }


def released_differences(model: ModelConfig) -> list[str]:
    """The settings that the released layout has no key for and that would compute something else; a line for each.

    Only what an evaluation computes counts: seats, losses and jitter are not in any layout of the released kind.
    """
    moe = model.moe
    mixtral = moe.combine == "renormalize_selected"
    combines, scales = ("renormalize_computing", "renormalize_selected"), (1.0,) if mixtral else (1.0, 2.0)
    allowed: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "model.head_dim": (model.head_dim, (model.hidden_size // model.num_heads,)),
        "model.qkv_bias": (model.qkv_bias, (False,)),
        "model.qk_norm": (model.qk_norm, ("none",)),
        "model.moe.every": (moe.every, (1,)),
        **{f"model.moe.{name}": (getattr(moe, name), (count,)) for name, count in RELEASED_EXPERTS.items()},
        "model.moe.num_shared_experts": (moe.num_shared_experts, (0,)),
        "model.moe.top_k": (moe.top_k, (2,)),
        "model.moe.gating_residual": (moe.gating_residual, (True,)),
        "model.moe.combine": (moe.combine, combines),
        "model.moe.combine_scale": (moe.combine_scale, (1.0,)),
        "model.moe.expert_input_scale": (moe.expert_input_scale, scales),
    }
    lines = [
        f"{key}: {value} here, {' or '.join(map(str, fits))} there"
        for key, (value, fits) in allowed.items()
        if value not in fits
    ]
    return lines + ([] if moe.controller is None else ["model.moe.controller: given here, there are no biases there"])


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout of a folder with this config.json; RecipeError if it is neither."""
    for layout, model_type in MODEL_TYPES.items():
        if config.get("model_type") == model_type:
            return layout
    raise RecipeError(
        f"config.json: model_type {config.get('model_type')!r} is not imported; {' and '.join(MODEL_TYPES.values())} "
        "are (moepp upcycle makes a start of other models)"
    )


def model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a recipe that a config.json says; RecipeError lists all that a recipe cannot say."""
    layout = layout_of(config)
    try:
        problems = _unsayable(config) + (_unsayable_released(config) if layout == "released" else [])
        if not problems:
            return _section(config, layout)
    except KeyError as error:
        raise RecipeError(f"config.json lacks the key {error}; fetch the folder again") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"config.json is damaged: a value is of the wrong kind ({error}); fetch it again") from error
    raise RecipeError("\n  ".join(["config.json says what moepp_ds does not compute:", *problems]))


def changed_settings(section: Mapping[str, Any], model: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Keys that a model section and a model have different values for, each with both.

    What the section does not say counts as its default.
    """
    try:
        told = ModelConfig.model_validate(section).model_dump(mode="json")
    except ValidationError:  # it alone is no model: then what it says, without what would follow from it
        told = dict(section)
    stack: list[tuple[str, Any, Any]] = [("model", told, model.model_dump(mode="json"))]
    while stack:
        name, one, other = stack.pop()
        if isinstance(one, dict) and isinstance(other, dict):
            stack += [(f"{name}.{key}", one[key], other[key]) for key in reversed(sorted(one))]
        elif one != other:
            yield name, one, other


def _section(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    section = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "ffn_hidden_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": _rope(config).get("rope_theta") or config.get("rope_theta", 10000.0),
        "init_std": config.get("initializer_range", 0.02),
    }
    if layout == "released":
        return {**section, "moe": _released_moe(config)}
    return {
        **section,
        "qkv_bias": config.get("attention_bias", False),
        "qk_norm": config.get("qk_norm", "none"),
        "document_attention": config.get("document_attention", False),
        "moe": dict(config["moe"]),
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of rotary positions beside their base, under whatever name; empty if there are none."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _unsayable(config: Mapping[str, Any]) -> list[str]:
    """What LLaMA's keys can ask for and our attention and experts do not do."""
    rope = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    refused = {
        "hidden_act": (config.get("hidden_act", "silu") != "silu", "experts are SwiGLU (silu)"),
        rope: (not _is_plain(_rope(config)), "rotary positions are not scaled, and turn all features"),
        "sliding_window": (config.get("sliding_window") is not None, "attention sees all of a row"),
        "attention_dropout": (bool(config.get("attention_dropout")), "there is no dropout; set it to 0 if it may go"),
        "mlp_bias": (bool(config.get("mlp_bias")), "FFNs have no biases"),
    }
    return [f"{key} {config.get(key)!r}: {rule}" for key, (wrong, rule) in refused.items() if wrong]


def _is_plain(rope: Mapping[str, Any]) -> bool:
    """Whether settings of rotary positions leave them as they are."""
    return rope.get("rope_type", rope.get("type", "default")) == "default" and rope.get("partial_rotary_factor", 1) == 1


def _unsayable_released(config: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{key} {value!r}: this key is not known, and may change what a layer computes"
        for key, value in config.items()
        if key.startswith("moe") and key not in RELEASED_FLAGS
    ]
    counts = _expert_counts(config)
    if len(set(counts)) != 1:
        lines.append(f"num_experts {config.get('num_experts')!r}: gating residual with unequal expert counts")
    elif counts[0] <= sum(RELEASED_EXPERTS.values()):
        lines.append(f"num_experts {counts[0]}: 4 of them are constant, copy and zero experts, so no FFN is left")
    if config.get("moe_expert_interval", 1) != 1:
        lines.append(f"moe_expert_interval {config['moe_expert_interval']!r}: the released code runs 1 alone")
    if config.get("attention_bias"):
        lines.append("attention_bias True: the released attention has no biases")
    return lines


def _expert_counts(config: Mapping[str, Any]) -> list[int]:
    counts = config.get("num_experts", [])
    return [counts] if isinstance(counts, int) else list(counts or [])


def _released_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    flags = {key: config.get(key, default) for key, default in RELEASED_FLAGS.items()}
    mixtral = flags["moe_use_mixtral_gating"]
    return {
        "variant": "released",
        "num_ffn_experts": _expert_counts(config)[0] - sum(RELEASED_EXPERTS.values()),
        **RELEASED_EXPERTS,
        "top_k": 2,
        "gating_residual": True,
        "router": {
            "num_layers": 2 if flags["moe_2layer_gate"] else 1,
            "logit_std": float(flags["moe_gate_norm_std"]) if flags["moe_use_logits_norm"] else None,
        },
        "combine": "renormalize_selected" if mixtral else "renormalize_computing",
        "expert_input_scale": 1.0 if mixtral or flags["moe_feature_no_mul_topk"] else 2.0,
    }
