"""Configuration of MoE++ models for `transformers`: our own layout and that of the released MoE++ model.

This file and `modeling_moepp.py` import torch and transformers alone: both travel inside exported folders
(`trust_remote_code=True`).

* `MoEPPConfig`          model type `moepp_ds`: LLaMA's keys, and under `moe` that section of a moepp_ds recipe
* `ReleasedMoEPPConfig`  model type `MoE++`: the keys of the released model, which name a subset of the same layers

Either one gives the choices of its layers with `moe_choices()`, all that the modeling file asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

COMBINES = ("softmax", "renormalize_selected", "renormalize_computing")
QK_NORMS = ("none", "full", "per_head")

# Keys of the recipe's `moe` section that decide what is computed: they must be there.
COMPUTED = {
    "every",
    "num_ffn_experts",
    "num_zero",
    "num_copy",
    "num_constant",
    "num_shared_experts",
    "shared_expert_gate",
    "expert_ffn_hidden_size",
    "router",
    "top_k",
    "gating_residual",
    "controller",
    "combine",
    "combine_scale",
    "expert_input_scale",
}
COMPUTED_BY_ROUTER = {"threshold", "num_layers", "logit_std"}

# Keys that shape training alone: evaluation gives every token all experts that it chose, and has no losses.
TRAINED = {
    "variant",
    "tau",
    "dropless",
    "capacity_factor",
    "capacity_counts",
    "min_capacity",
    "drop_policy",
    "balance",
    "balance_counts",
    "balance_scope",
    "balance_weight",
}
TRAINED_BY_ROUTER = {"jitter", "z_loss_weight"}


@dataclass(frozen=True)
class MoEChoices:
    """What the MoE layers of a model compute. Expert indices: FFN, then constant, copy, zero.

    Exactly one of top_k and threshold is given. selection_bias: a bias for each expert counts in the choice and
    nowhere else. first_residual_map: the first MoE layer holds a map of logits that no layer before it makes, as the
    released model does; it is never used.
    """

    every: int
    num_ffn_experts: int
    num_constant: int
    num_copy: int
    num_zero: int
    num_shared_experts: int
    shared_expert_gate: bool
    expert_ffn_hidden_size: int
    router_layers: int
    top_k: int | None
    threshold: float | None
    logit_std: float | None
    gating_residual: bool
    selection_bias: bool
    combine: str
    combine_scale: float
    expert_input_scale: float
    first_residual_map: bool = False

    def __post_init__(self) -> None:
        if (self.top_k is None) == (self.threshold is None):
            raise ValueError(f"moe: top_k {self.top_k}, threshold {self.threshold}: give exactly one of the two")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"moe: top_k {self.top_k} of {self.num_experts} experts; use 1 to {self.num_experts}")
        if self.combine not in COMBINES:
            raise ValueError(f"moe: combine {self.combine!r} is none of {', '.join(COMBINES)}")
        if self.router_layers not in (1, 2):
            raise ValueError(f"moe: a router has 1 or 2 layers, not {self.router_layers}")
        if self.num_ffn_experts < 1:
            raise ValueError(f"moe: num_ffn_experts {self.num_ffn_experts}; use 1 or more")

    @property
    def num_experts(self) -> int:
        """Experts of all kinds that a router chooses from."""
        return self.num_ffn_experts + self.num_constant + self.num_copy + self.num_zero

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, is a mixture-of-experts layer."""
        return (layer + 1) % self.every == 0

    def has_residual_map(self, layer: int) -> bool:
        """Whether MoE layer `layer` holds a map of the logits before it."""
        return self.gating_residual and (self.first_residual_map or layer >= self.every)


class MoEPPConfig(PreTrainedConfig):
    """A model trained by moepp_ds.

    LLaMA's keys mean what they mean there; attention_bias is for queries, keys and values alone. intermediate_size:
    inner width of a dense FFN, and of an FFN expert unless moe.expert_ffn_hidden_size is given. qk_norm: "none",
    "full" or "per_head". document_attention: whether training kept attention inside documents; a forward pass here
    takes a row for one document, unless position_ids start anew in it (packing; without a mask and a cache). moe: that
    section of a recipe, whole.
    """

    model_type = "moepp_ds"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        attention_bias: bool = False,
        qk_norm: str = "none",
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        document_attention: bool = False,
        moe: Mapping[str, Any] | None = None,
        use_cache: bool = True,
        output_router_logits: bool = False,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = _rope_theta(rope_theta, kwargs)
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.document_attention = document_attention
        self.moe = dict(_SMALLEST if moe is None else moe)
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        self._check()
        common: dict[str, Any] = {
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**common, **kwargs)

    def _check(self) -> None:
        """Refuse what the modeling file does not compute, rather than compute something else."""
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported; MoE++ experts are SwiGLU (silu)")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm {self.qk_norm!r} is none of {', '.join(QK_NORMS)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        self.moe_choices()

    def moe_choices(self) -> MoEChoices:
        """What the MoE layers compute; refuses a `moe` section that lacks a key or has one that is not known."""
        moe = self.moe
        _check_keys("moe", moe, COMPUTED, TRAINED)
        _check_keys("moe.router", moe["router"], COMPUTED_BY_ROUTER, TRAINED_BY_ROUTER)
        taken = {name: moe[name] for name in (field.name for field in fields(MoEChoices)) if name in moe}
        taken["expert_ffn_hidden_size"] = moe["expert_ffn_hidden_size"] or self.intermediate_size
        return MoEChoices(
            **taken,
            router_layers=moe["router"]["num_layers"],
            threshold=moe["router"]["threshold"],
            logit_std=moe["router"]["logit_std"],
            selection_bias=moe["controller"] is not None,
        )


class ReleasedMoEPPConfig(MoEPPConfig):
    """The released MoE++ model, with the keys it came with: two constant experts, one copy, one zero, top 2.

    num_experts: experts of all kinds in a layer, a list of one number. moe_use_mixtral_gating: the two chosen
    experts' logits share the weight; else zero experts weigh nothing and the rest share it. moe_feature_no_mul_topk:
    the input of the experts is not doubled. moe_use_logits_norm: a token's logits get the standard deviation
    moe_gate_norm_std. moe_2layer_gate: the router is tanh between two layers.
    """

    model_type = "MoE++"

    def __init__(
        self,
        num_experts: list[int] | int = 32,
        moe_expert_interval: int = 1,
        moe_use_mixtral_gating: bool = False,
        moe_2layer_gate: bool = True,
        moe_use_logits_norm: bool = False,
        moe_gate_norm_std: float = 1.0,
        moe_feature_no_mul_topk: bool = False,
        **kwargs: Any,
    ) -> None:
        self.num_experts = num_experts if isinstance(num_experts, int) else list(num_experts)
        self.moe_expert_interval = moe_expert_interval
        self.moe_use_mixtral_gating = moe_use_mixtral_gating
        self.moe_2layer_gate = moe_2layer_gate
        self.moe_use_logits_norm = moe_use_logits_norm
        self.moe_gate_norm_std = moe_gate_norm_std
        self.moe_feature_no_mul_topk = moe_feature_no_mul_topk
        if kwargs.pop("moe", None):
            raise ValueError("model type MoE++ has no `moe` section; that is of model type moepp_ds")
        super().__init__(**kwargs)
        del self.moe  # it would be saved, and the released layout has no such key

    def moe_choices(self) -> MoEChoices:
        """What the MoE layers compute; refuses what the released code does not run."""
        counts = [self.num_experts] if isinstance(self.num_experts, int) else self.num_experts
        if len(set(counts)) != 1:
            raise ValueError(f"num_experts {counts}: a gating residual needs equally many experts in every layer")
        if self.moe_expert_interval != 1:
            raise ValueError(f"moe_expert_interval {self.moe_expert_interval}: the released layout knows 1 alone")
        if self.attention_bias or self.qk_norm != "none":
            raise ValueError("the released layout has attention without biases and norms")
        doubled = not (self.moe_use_mixtral_gating or self.moe_feature_no_mul_topk)
        return MoEChoices(
            every=1,
            num_ffn_experts=counts[0] - 4,
            num_constant=2,
            num_copy=1,
            num_zero=1,
            num_shared_experts=0,
            shared_expert_gate=False,
            expert_ffn_hidden_size=self.intermediate_size,
            router_layers=2 if self.moe_2layer_gate else 1,
            top_k=2,
            threshold=None,
            logit_std=self.moe_gate_norm_std if self.moe_use_logits_norm else None,
            gating_residual=True,
            selection_bias=False,
            combine="renormalize_selected" if self.moe_use_mixtral_gating else "renormalize_computing",
            combine_scale=1.0,
            expert_input_scale=2.0 if doubled else 1.0,
            first_residual_map=True,
        )


# What a configuration made of nothing holds: transformers makes one to see what differs from the defaults.
_SMALLEST: dict[str, Any] = {
    "every": 1,
    "num_ffn_experts": 8,
    "num_zero": 1,
    "num_copy": 1,
    "num_constant": 2,
    "num_shared_experts": 0,
    "shared_expert_gate": False,
    "expert_ffn_hidden_size": None,
    "router": {"threshold": None, "num_layers": 1, "logit_std": None},
    "top_k": 2,
    "gating_residual": True,
    "controller": None,
    "combine": "softmax",
    "combine_scale": 1.0,
    "expert_input_scale": 1.0,
}


def _check_keys(place: str, section: Mapping[str, Any], needed: set[str], unused: set[str]) -> None:
    unknown, missing = sorted(set(section) - needed - unused), sorted(needed - set(section))
    if unknown:
        raise ValueError(
            f"{place} has keys that this version does not know: {', '.join(unknown)}; they may change what the model "
            "computes, so load it with the files of the version that wrote it"
        )
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}")


def _rope_theta(rope_theta: float, others: dict[str, Any]) -> float:
    """The base of the rotary frequencies, wherever a version of transformers put it; refuses scaled positions."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = others.pop(name, None)
        if not rope:
            continue
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"{name} {rope}: scaled rotary positions are not supported")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"{name} {rope}: rotary positions of a part of the features are not supported")
        rope_theta = rope.get("rope_theta", rope_theta)
    return float(rope_theta)
