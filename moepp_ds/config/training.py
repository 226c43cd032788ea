"""The sections of the run itself: train, parallel, checkpoint, evaluation, monitor.

Checks that need two sections are in `recipe`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import TokenCount
from moepp_ds.config.section import Section

ActivationCheckpointing = Literal["none", "selective", "full"]


class TrainConfig(Section):
    """Length, batch, optimizer and schedule of the run.

    The run ends after `max_steps` updates or after the last whole update inside `token_budget`, whichever
    comes first; at least one of the two must be given. The learning rate reaches `final_lr` at that end.
    """

    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the routers' jitter; the order of the data has its own, data.seed."""

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

    activation_checkpointing: ActivationCheckpointing = "none"
    """What the backward pass computes again instead of finding it kept. `selective`: attention up to its scores, a
    small share of the work, and no assignment is sent again. `full`: blocks but for routing, a third more work, and
    with expert parallelism half as much again is sent."""

    compile: bool = False
    """Whether torch.compile fuses norms and attention: some per cent of a step, for half a minute at the start and
    other rounding. Needs a compiler."""

    deterministic: bool = False
    """Whether runs on the same layout must be equal bit for bit, on a GPU too, at some cost in speed."""

    log_every: int = Field(default=1, ge=1)
    """Updates between progress lines; metrics.jsonl has every update. Steps."""

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _was_a_switch(cls, value: object) -> object:
        """Recipes in older checkpoints say whether, not how much."""
        return ("full" if value else "none") if isinstance(value, bool) else value

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
    """Newest checkpoints that are kept; older ones are deleted, and those of a part of the run that a resumed one went
    back behind and has passed. Checkpoints."""

    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints after each multiple of so many updates are kept for good and do not count for `keep`; null keeps none
    so. A multiple of `every`. Steps."""

    background: bool = False
    """Whether training goes on, from a copy in host memory, while a checkpoint is written; else while it is proven."""

    wait_for_room: int = Field(default=300, ge=0)
    """How long the last save, at the end or at a stop, is tried again where the disk is full. The launcher's
    --stop_grace must cover it. Seconds."""

    @model_validator(mode="after")
    def _milestones_are_saved(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.every:
            near = max(1, round(self.keep_every / self.every)) * self.every
            raise ValueError(
                f"keep_every {self.keep_every} is not a multiple of every {self.every}, so no checkpoint would be made "
                f"at some of its updates; use {near}, or another `every`"
            )
        return self


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

    gradient_ratio_every: int | None = Field(default=None, ge=1)
    """Updates between measurements of how strong the balance loss pulls at each router beside the language-model loss;
    null never measures. Steps."""
