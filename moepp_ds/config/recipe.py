"""The whole recipe: its sections, the checks that need two of them, and the arithmetic printed at start."""

from __future__ import annotations

import re

import yaml
from pydantic import Field, model_validator

from data_pipeline.config import DataConfig
from moepp_ds.config.derived import (
    Layout,
    count_parameters,
    count_steps,
    expert_capacity,
    flops_per_token,
    plan_layout,
    recomputed_flops_per_token,
    scheduled_learning_rate,
)
from moepp_ds.config.model import ModelConfig
from moepp_ds.config.safety import SafetyConfig
from moepp_ds.config.section import Section
from moepp_ds.config.training import CheckpointConfig, EvaluationConfig, MonitorConfig, ParallelConfig, TrainConfig


class _RecipeDumper(yaml.SafeDumper):
    """Quotes every text that begins like a number: recipes read 5e-4 as one, YAML 1.1 does not."""


_RecipeDumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+.]?[0-9].*$"), list("-+.0123456789"))


class Recipe(Section):
    """Everything that decides a run, except the machines it runs on."""

    name: str = Field(min_length=1, pattern=r"^[^/\\]*[^/\\.][^/\\]*$")
    """Name of the run and of its folder; the recipe's file name without its ending when not given."""

    deepspeed: str = Field(min_length=1)
    """Path of the DeepSpeed JSON, which holds DeepSpeed's own switches and no number that is set here."""

    model: ModelConfig
    """The network."""

    data: DataConfig
    """The token shards, or the raw files, and the mixture drawn from them."""

    train: TrainConfig
    """Length, batch, optimizer and schedule."""

    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over ranks."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""

    safety: SafetyConfig = SafetyConfig()
    """What the run looks out for, and what it does about it."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """When held-out text is scored."""

    monitor: MonitorConfig = MonitorConfig()
    """Where numbers go besides metrics.jsonl."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        tokens, seq_len = self.train.batch_tokens, self.data.seq_len
        if tokens % seq_len:
            below = tokens // seq_len * seq_len
            fits = " or ".join(str(n) for n in (below, below + seq_len) if n)
            raise ValueError(
                f"train.batch_tokens {tokens} is not a multiple of data.seq_len {seq_len}; use {fits}"
            )
        moe, ways = self.model.moe, self.parallel.expert_parallel
        if moe.num_ffn_experts % ways:
            fits = ", ".join(str(n) for n in range(1, moe.num_ffn_experts + 1) if moe.num_ffn_experts % n == 0)
            raise ValueError(
                f"parallel.expert_parallel {ways} does not divide model.moe.num_ffn_experts {moe.num_ffn_experts}; "
                f"use one of {fits}"
            )
        together = self.train.micro_batch_size * seq_len
        if moe.min_capacity is not None and moe.min_capacity > together:
            raise ValueError(
                f"model.moe.min_capacity {moe.min_capacity:,} is more than the {together:,} tokens of a micro batch "
                "(train.micro_batch_size x data.seq_len), so no seat would ever be missing; lower it, or set "
                "model.moe.dropless to true"
            )
        if self.monitor.gradient_ratio_every is not None and not moe.balance_weight:
            raise ValueError(
                "monitor.gradient_ratio_every measures the pull of the balance loss, and model.moe.balance_weight is "
                "0; set one of them, or gradient_ratio_every to null"
            )
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer updates in the whole run. Steps."""
        return count_steps(self.train)

    @property
    def batch_rows(self) -> int:
        """Rows of one optimizer update over all ranks. Rows."""
        return self.train.batch_tokens // self.data.seq_len

    @property
    def flops_per_update(self) -> float:
        """Of all ranks: forward, twice as much backward, and what activation checkpointing does again."""
        model, seq_len, again = self.model, self.data.seq_len, self.train.activation_checkpointing
        once = flops_per_token(model, seq_len)
        return (3 * once + recomputed_flops_per_token(model, seq_len, again)) * self.train.batch_tokens

    def layout(self, world: int) -> Layout:
        """Cut one update for `world` ranks; RecipeError names the values that fit when it cannot be cut."""
        return plan_layout(self.train, self.parallel, seq_len=self.data.seq_len, world=world)

    def accumulation_steps(self, world: int) -> int:
        """Forward passes of one rank in one update on `world` ranks. Micro batches."""
        return self.layout(world).accumulation_steps

    def learning_rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0."""
        return scheduled_learning_rate(self.train, step)

    def dump(self) -> str:
        """Return the recipe as YAML with every default filled in; loading that gives an equal recipe."""
        return yaml.dump(
            self.model_dump(mode="json"), Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=100
        )

    def arithmetic(self, world: int) -> list[str]:
        """Return what a run on `world` ranks prints at start: its numbers and where they come from."""
        model, train, layout = self.model, self.train, self.layout(world)
        counts, steps, ways = count_parameters(model), self.total_steps, self.parallel.expert_parallel
        return [
            f"{model.num_layers} layers ({model.num_moe_layers} MoE) x {self._experts()}",
            f"{counts.total:,} parameters, {counts.activated:,} activated per token at {self._ffn_experts()}",
            f"{flops_per_token(model, self.data.seq_len) / 1e9:.3g} GFLOP per token forward, three times that to train",
            f"{layout.micro_batch_size} rows x {self.data.seq_len} tokens x "
            f"{layout.accumulation_steps} steps x {world} ranks = {train.batch_tokens:,} tokens per update",
            f"{steps:,} updates x {train.batch_tokens:,} tokens = {steps * train.batch_tokens:,} tokens "
            f"({self._what_ends_the_run()})",
            self._schedule(),
            self._seats(layout.micro_batch_size * self.data.seq_len),
            *self._steering(layout.micro_batch_size * self.data.seq_len),
            f"{world} ranks / expert parallel {ways} = {world // ways} copies of the FFN experts, "
            f"{model.moe.num_ffn_experts // ways} of each layer on each rank",
        ]

    def _experts(self) -> str:
        moe = self.model.moe
        chosen = f"top {moe.top_k}" if moe.top_k is not None else f"threshold {moe.router.threshold:g}"
        shared = f", and {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
        return (
            f"{moe.num_experts} experts ({moe.num_ffn_experts} FFN + {moe.num_constant} constant + {moe.num_copy} copy "
            f"+ {moe.num_zero} zero), {chosen}{shared}"
        )

    def _ffn_experts(self) -> str:
        moe = self.model.moe
        bound = "up to " if moe.top_k is None and moe.controller is None else ""
        shared = f" and {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
        return f"{bound}{moe.mean_ffn_experts:.2f}{' routed' * bool(shared)}{shared} FFN experts per token"

    def _steering(self, tokens: int) -> list[str]:
        """What moves the load, where that is not equation 7 alone."""
        moe, lines = self.model.moe, []
        if moe.balance == "none":
            lines.append("no balance loss")
        elif (moe.balance, moe.balance_counts, moe.balance_scope) != ("per_expert", "all", "micro_batch"):
            counted = {"all": "all choices", "first": "first choices"}[moe.balance_counts]
            where = {"micro_batch": "the micro batch", "global_batch": "the previous update"}[moe.balance_scope]
            lines.append(f"balance loss {moe.balance} of {counted} in {where}, weight {moe.balance_weight:g}")
        if moe.controller is not None:
            short = ""
            if not moe.dropless:
                seats = expert_capacity(moe, tokens).ffn * moe.num_ffn_experts / tokens
                short = f", but there are seats for {seats:.2f}" if seats < moe.mean_ffn_experts else ""
            lines.append(
                f"controller {moe.controller.rule} steers to {moe.mean_ffn_experts:.2f} routed FFN experts per token"
                f"{short}; rate {moe.controller.rate:g} -> {moe.controller.final_rate:g}"
            )
        return lines

    def _what_ends_the_run(self) -> str:
        train, steps = self.train, self.total_steps
        if train.token_budget is None:
            return "train.max_steps"
        budget = f"train.token_budget {train.token_budget:,}"
        if train.max_steps is None:
            return budget
        within = train.token_budget // train.batch_tokens
        if steps == train.max_steps:
            return f"train.max_steps {steps:,}; {budget} would allow {within:,}"
        return f"{budget}; train.max_steps {train.max_steps:,} comes later"

    def _schedule(self) -> str:
        train, steps = self.train, self.total_steps
        rise = f"{train.warmup_start_lr:g} -> {train.max_lr:g} over {train.warmup_steps:,} updates"
        if steps <= train.warmup_steps:
            last = self.learning_rate(steps - 1)
            return f"learning rate {rise}; the run ends inside this warm-up, at {last:g}"
        return f"learning rate {rise}, then a cosine to {train.final_lr:g} at update {steps:,}"

    def _seats(self, tokens: int) -> str:
        if self.model.moe.dropless:
            return "dropless: every assignment is computed"
        seats = expert_capacity(self.model.moe, tokens)
        others = f", {seats.zero_computation:,} in a zero-computation expert"
        moe = self.model.moe
        mean = f", {moe.capacity_factor:g} a token on average" if moe.top_k is None else ""
        return (
            f"{seats.ffn:,} seats in an FFN expert{others if moe.num_zero_computation else ''} "
            f"for the {tokens:,} tokens of a micro batch{mean}"
        )
