"""The section `model`: the transformer around the mixture-of-experts layers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moepp_ds.config.moe import MoEConfig
from moepp_ds.config.section import Section


class ModelConfig(Section):
    """The transformer: RMSNorm, rotary positions, causal attention, SwiGLU experts, untied head."""

    vocab_size: int = Field(ge=2)
    """Rows of the embedding and of the head; the shards' tokenizer must have as many ids or fewer. Tokens."""

    num_layers: int = Field(ge=1)
    """Blocks of attention and FFN. Layers."""

    hidden_size: int = Field(ge=2)
    """Width of the residual stream (D). Features."""

    num_heads: int = Field(ge=1)
    """Attention heads. Heads."""

    num_kv_heads: int = Field(default=None, ge=1, validate_default=True)
    """Heads of keys and values, each shared by num_heads / num_kv_heads heads of queries; null gives num_heads.
    Heads."""

    head_dim: int = Field(default=None, ge=1, validate_default=True)
    """Width of one attention head (A), an even number; null gives hidden_size / num_heads. Features."""

    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases, as in Qwen2."""

    qk_norm: Literal["none", "full", "per_head"] = "none"
    """RMSNorm of queries and keys before rotation: over all heads together (OLMoE) or within each head (Qwen3)."""

    ffn_hidden_size: int = Field(ge=1)
    """Inner width of a dense FFN (F), and of one FFN expert unless moe.expert_ffn_hidden_size is given. Features."""

    norm_eps: float = Field(default=1e-6, gt=0.0)
    """Added to the mean square in RMSNorm."""

    rope_theta: float = Field(default=1e4, gt=1.0)
    """Base of the rotary frequencies."""

    init_std: float = Field(default=0.02, gt=0.0)
    """Standard deviation of the normal distribution that weights start from."""

    document_attention: bool = False
    """Whether attention stops at document ends and positions restart there."""

    moe: MoEConfig
    """The mixture-of-experts layers."""

    @field_validator("num_kv_heads", mode="before")
    @classmethod
    def _kv_heads_by_rule(cls, value: Any, info: ValidationInfo) -> Any:
        return info.data.get("num_heads", 1) if value is None else value

    @field_validator("head_dim", mode="before")
    @classmethod
    def _head_dim_by_rule(cls, value: Any, info: ValidationInfo) -> Any:
        width, heads = info.data.get("hidden_size"), info.data.get("num_heads")
        if value is not None or width is None or heads is None:
            return 2 if value is None else value  # 2: a field above failed and is what gets reported
        if width % (2 * heads):
            near = sorted((n for n in range(1, width + 1) if width % (2 * n) == 0), key=lambda n: abs(n - heads))[:3]
            use = f"use for example {', '.join(map(str, sorted(near)))} heads, or give it" if near else "give it"
            raise ValueError(
                f"is not given, and hidden_size {width} / num_heads {heads} is no even number of features, which "
                f"rotary positions need; {use}"
            )
        return width // heads

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd; rotary positions turn pairs of features, so use "
                f"an even number such as {self.head_dim + 1}"
            )
        if self.num_heads % self.num_kv_heads:
            fits = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}; "
                f"use one of {', '.join(map(str, fits))}"
            )
        if self.moe.every > self.num_layers:
            raise ValueError(
                f"moe.every {self.moe.every} is more than num_layers {self.num_layers}, so no layer would be"
                f" MoE; use moe.every 1 to {self.num_layers}"
            )
        return self

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Inner width of one FFN expert, routed or shared. Features."""
        return self.moe.expert_ffn_hidden_size or self.ffn_hidden_size

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, is a mixture-of-experts layer."""
        return (layer + 1) % self.moe.every == 0

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers in the model. Layers."""
        return self.num_layers // self.moe.every
