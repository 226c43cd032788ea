"""The sections of a recipe: strict, frozen, and closed to keys they do not know.

Strict means that a number is a number: "8" is refused where 8 is meant, and true is no 1. Checks that need
two sections are in `recipe`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


def _whole(value: Any) -> Any:
    """Turn 1e11 into 100000000000: token counts are written that way, and YAML reads them as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


TokenCount = Annotated[int, BeforeValidator(_whole), Field(gt=0)]


class Section(BaseModel):
    """What all sections share."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class MoEConfig(Section):
    """The mixture-of-experts layers: which experts, how tokens find them, how many seats there are.

    A vanilla MoE is this with `num_zero`, `num_copy` and `num_constant` all 0.
    """

    every: int = Field(default=1, ge=1)
    """Layer i (from 0) is MoE when (i + 1) is a multiple of this; the others have one dense FFN. Layers."""

    num_ffn_experts: int = Field(ge=1)
    """FFN experts in each MoE layer, over all ranks. Experts."""

    num_zero: int = Field(default=1, ge=0)
    """Zero experts, E(x) = 0. Experts."""

    num_copy: int = Field(default=1, ge=0)
    """Copy experts, E(x) = x. Experts."""

    num_constant: int = Field(default=None, ge=0, validate_default=True)
    """Constant experts, E(x) = a1 x + a2 v; null gives max(num_ffn_experts / 4 - zero - copy, 1). Experts."""

    top_k: int = Field(default=2, ge=1)
    """Experts of any kind that each token chooses. Experts per token."""

    tau: float = Field(default=0.75, gt=0.0, le=1.0)
    """Weight of an FFN expert's seats against a zero-computation expert's; lower is cheaper. Ratio."""

    capacity_factor: float = Field(default=1.1, gt=0.0)
    """Seats offered over assignments expected (gamma of equation 8). Ratio."""

    capacity_counts: Literal["assignments", "tokens"] = "assignments"
    """Whether seats are for all top_k assignments of a token, or for one (equation 8 read literally)."""

    drop_policy: Literal["probability", "position"] = "probability"
    """Who keeps a seat of a full expert: the highest router probability, or the earliest token."""

    dropless: bool = False
    """Whether every assignment is computed, whatever the load; capacity is then not used."""

    balance_weight: float = Field(default=0.01, ge=0.0)
    """Weight of the balance loss beside the language-model loss (beta of equation 9). Ratio."""

    gating_residual: bool = True
    """Whether a router adds a learned map of the previous MoE layer's logits to its own."""

    @field_validator("num_constant", mode="before")
    @classmethod
    def _constants_by_rule(cls, value: Any, info: ValidationInfo) -> Any:
        """Replace null by equation 10, so that every reader and the saved recipe see the number."""
        known = info.data
        if value is not None or not {"num_ffn_experts", "num_zero", "num_copy"} <= known.keys():
            return 0 if value is None else value  # 0: a field above failed and is what gets reported
        return max(known["num_ffn_experts"] // 4 - known["num_zero"] - known["num_copy"], 1)

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k {self.top_k} is more than the {self.num_experts} experts of a layer "
                f"({self.num_ffn_experts} FFN + {self.num_zero_computation} zero-computation); "
                f"use top_k 1 to {self.num_experts}"
            )
        return self

    @property
    def num_zero_computation(self) -> int:
        """Experts that cost no FFN: zero, copy and constant together (N_ZC)."""
        return self.num_zero + self.num_copy + self.num_constant

    @property
    def num_experts(self) -> int:
        """Experts of all kinds (E), in index order FFN, constant, copy, zero."""
        return self.num_ffn_experts + self.num_zero_computation

    @property
    def ffn_share(self) -> float:
        """Share of all assignments that go to FFN experts when the load is as the balance loss wants it."""
        weighted = self.tau * self.num_ffn_experts
        return weighted / (weighted + self.num_zero_computation)

    @property
    def mean_ffn_experts(self) -> float:
        """FFN experts that a token uses on average under that load; top_k for a vanilla MoE."""
        return self.top_k * self.ffn_share


class ModelConfig(Section):
    """The transformer: RMSNorm, rotary positions, causal attention, SwiGLU experts, untied head."""

    vocab_size: int = Field(ge=2)
    """Rows of the embedding and of the head; the shards' tokenizer must have as many ids or fewer. Tokens."""

    num_layers: int = Field(ge=1)
    """Blocks of attention and FFN. Layers."""

    hidden_size: int = Field(ge=2)
    """Width of the residual stream (D). Features."""

    num_heads: int = Field(ge=1)
    """Attention heads; each is hidden_size / num_heads wide, an even number. Heads."""

    ffn_hidden_size: int = Field(ge=1)
    """Inner width of one FFN expert and of a dense FFN (F). Features."""

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

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            near = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            near = sorted(sorted(near, key=lambda n: abs(n - self.num_heads))[:3])
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}; "
                f"use for example {', '.join(map(str, near))} heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} = {self.head_dim} is odd; "
                "rotary positions turn pairs of features, so a head must be an even number wide"
            )
        if self.moe.every > self.num_layers:
            raise ValueError(
                f"moe.every {self.moe.every} is more than num_layers {self.num_layers}, so no layer would be"
                f" MoE; use moe.every 1 to {self.num_layers}"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head (A). Features."""
        return self.hidden_size // self.num_heads

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, is a mixture-of-experts layer."""
        return (layer + 1) % self.moe.every == 0

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers in the model. Layers."""
        return self.num_layers // self.moe.every


class TrainConfig(Section):
    """Length, batch, optimizer and schedule of the run.

    The run ends after `max_steps` updates or after the last whole update inside `token_budget`, whichever
    comes first; at least one of the two must be given. The learning rate reaches `final_lr` at that end.
    """

    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights; the order of the data has its own, data.seed."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer updates in the whole run. Steps."""

    token_budget: TokenCount | None = None
    """Tokens in the whole run, never exceeded. Tokens."""

    batch_tokens: TokenCount = 4_194_304
    """Tokens per optimizer update over all ranks, a multiple of data.seq_len. Tokens."""

    micro_batch_size: int = Field(default=8, ge=1)
    """Rows in one pass of one rank; capacity and balance loss are counted over these. Rows."""

    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Type of weights and activations in forward and backward; the optimizer always works in fp32."""

    max_lr: float = Field(default=5e-4, gt=0.0)
    """Learning rate at the end of the warm-up."""

    final_lr: float = Field(default=5e-5, ge=0.0)
    """Learning rate of the last update, reached along a cosine."""

    warmup_steps: int = Field(default=2000, ge=0)
    """Updates over which the learning rate rises in a straight line. Steps."""

    warmup_start_lr: float = Field(default=1e-7, ge=0.0)
    """Learning rate of the first update when there is a warm-up."""

    adam_betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    """Decay of AdamW's running mean and running square, each in [0, 1)."""

    adam_eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of AdamW's running square."""

    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled decay of matrices; norms and vectors are not decayed. Per unit of learning rate."""

    gradient_clipping: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm that an update uses; 0 turns clipping off."""

    activation_checkpointing: bool = False
    """Whether blocks are recomputed in the backward pass instead of kept: less memory, a third more work."""

    log_every: int = Field(default=1, ge=1)
    """Updates between progress lines; metrics.jsonl has every update. Steps."""

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.max_steps is None and self.token_budget is None:
            raise ValueError(
                "the run has no end; give max_steps, token_budget, or both (the earlier end holds)"
            )
        if self.token_budget is not None and self.token_budget < self.batch_tokens:
            raise ValueError(
                f"token_budget {self.token_budget:,} is less than one update of batch_tokens"
                f" {self.batch_tokens:,}; raise the one or lower the other"
            )
        if self.final_lr > self.max_lr or self.warmup_start_lr > self.max_lr:
            raise ValueError(
                f"max_lr {self.max_lr:g} must be the highest rate, but warmup_start_lr is "
                f"{self.warmup_start_lr:g} and final_lr is {self.final_lr:g}"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.adam_betas):
            raise ValueError(f"adam_betas {list(self.adam_betas)} must both be at least 0 and below 1")
        return self


class ParallelConfig(Section):
    """How the model is spread over ranks."""

    expert_parallel: int = Field(default=1, ge=1)
    """Ranks that share one set of FFN experts; divides the world and model.moe.num_ffn_experts. Ranks."""


class CheckpointConfig(Section):
    """When the run is saved. The last step and a stop signal always save."""

    every: int = Field(default=1000, ge=1)
    """Updates between checkpoints. Steps."""

    keep: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept; older ones are deleted. Checkpoints."""


class EvaluationConfig(Section):
    """When the held-out text of each source is scored. The last step always is."""

    every: int = Field(default=1000, ge=1)
    """Updates between evaluations. Steps."""

    rows: int = Field(default=64, ge=1)
    """Most rows that are scored of each source. Rows."""


class MonitorConfig(Section):
    """Where numbers go besides metrics.jsonl."""

    tensorboard: bool = True
    """Whether curves are written to the run folder's tensorboard/."""
