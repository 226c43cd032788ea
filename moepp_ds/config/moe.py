"""The section `model.moe`: which experts, how tokens find them, how many seats there are, what is balanced.

1. Fields are read in their order, and a null is replaced by the rule its field states, so that every reader and
   the saved recipe see the value (`_by_rule`).
2. Then all choices that contradict each other are refused at once, each with the rule (`_choices_agree`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moepp_ds.config.routing import ControllerConfig, RouterConfig
from moepp_ds.config.section import Section

SEAT_KEYS = ("capacity_factor", "capacity_counts", "min_capacity", "drop_policy")
"""Settings of seats, which a dropless layer has none of."""


class MoEConfig(Section):
    """The mixture-of-experts layers. A vanilla MoE has `num_zero`, `num_copy` and `num_constant` all 0."""

    variant: Literal["paper", "released"] = "paper"
    """What is meant where nothing is said: the equations of the MoE++ paper, or what its released inference code does:
    router.num_layers 2, num_constant 2, combine renormalize_computing, expert_input_scale top_k."""

    every: int = Field(default=1, ge=1)
    """Layer i (from 0) is MoE when (i + 1) is a multiple of this; the others have one dense FFN. Layers."""

    num_ffn_experts: int = Field(ge=1)
    """FFN experts in each MoE layer that a router chooses from, over all ranks. Experts."""

    num_zero: int = Field(default=1, ge=0)
    """Zero experts, E(x) = 0. Experts."""

    num_copy: int = Field(default=1, ge=0)
    """Copy experts, E(x) = x. Experts."""

    num_constant: int = Field(default=None, ge=0, validate_default=True)
    """Constant experts, E(x) = a1 x + a2 v; null gives max(num_ffn_experts / 4 - zero - copy, 1), and 2 with the
    variant released. Experts."""

    num_shared_experts: int = Field(default=0, ge=0)
    """FFN experts that every token uses beside those it chooses; on every rank, not counted in top_k. Experts."""

    shared_expert_gate: bool = False
    """Whether the shared experts' output is multiplied by a learned sigmoid of the token, as in Qwen-MoE."""

    expert_ffn_hidden_size: int | None = Field(default=None, ge=1)
    """Inner width of one FFN expert, shared ones included, where it differs from model.ffn_hidden_size: fine-grained
    experts. Null is that width. Features."""

    router: RouterConfig = RouterConfig()
    """How a router scores experts, and whether a threshold decides how many of them a token gets."""

    top_k: int | None = Field(default=None, ge=1, validate_default=True)
    """Experts of any kind that each token chooses; null gives 2, and stays null with router.threshold, which decides
    instead. Experts per token."""

    gating_residual: bool = True
    """Whether a router adds a learned map of the previous MoE layer's logits to its own."""

    controller: ControllerConfig | None = None
    """Steers the load by a bias for selection; null is none."""

    combine: Literal["softmax", "renormalize_selected", "renormalize_computing"] = Field(
        default=None, validate_default=True
    )
    """Weight of a chosen expert: its probability (equation 1), or that over the sum of all chosen ones, or over the
    sum of the chosen ones that compute something, zero experts excepted. Null gives softmax, and renormalize_computing
    with the variant released."""

    combine_scale: float = Field(default=1.0, gt=0.0)
    """All combine weights are multiplied by this (LongCat's routed scaling factor). Ratio."""

    expert_input_scale: float = Field(default=None, gt=0.0, validate_default=True)
    """The input of all experts but shared ones is multiplied by this; null gives 1, and top_k with the variant
    released unless it renormalizes over all selected. Ratio."""

    tau: float = Field(default=0.75, gt=0.0, le=1.0)
    """Weight of an FFN expert's load and seats against a zero-computation expert's; lower is cheaper. Ratio."""

    dropless: bool = False
    """Whether every assignment is computed, whatever the load; no capacity setting may be given then."""

    capacity_factor: float | None = Field(default=None, gt=0.0, validate_default=True)
    """Seats offered over assignments expected (gamma of equation 8); null gives 1.1. With router.threshold the mean
    number of experts per token that there are seats for, which must be given. Ratio."""

    capacity_counts: Literal["assignments", "tokens"] | None = Field(default=None, validate_default=True)
    """Whether seats are for all top_k assignments of a token, or for one (equation 8 read literally; XMoE). Null gives
    assignments, and tokens with router.threshold."""

    min_capacity: int | None = Field(default=None, ge=1, validate_default=True)
    """Fewest seats of an expert; null gives 1. Seats."""

    drop_policy: Literal["probability", "position", "rank"] | None = Field(default=None, validate_default=True)
    """Who keeps a seat of a full expert: the highest router probability, the earliest token, or first choices before
    second ones and the highest probability among them (XMoE). Null gives probability, and rank with
    router.threshold."""

    balance: Literal["per_expert", "per_group", "null_averaged", "none"] = "per_expert"
    """Whose load the balance loss evens out: each expert's (equation 7), that of FFN and of zero-computation experts
    as two groups, each expert's with all zero experts taken for equally loaded (AdaMoE), or nobody's."""

    balance_counts: Literal["all", "first"] = Field(default=None, validate_default=True)
    """Which choices of a token are load to the balance loss: all, or the first (XMoE). Null gives all, and first with
    router.threshold."""

    balance_scope: Literal["micro_batch", "global_batch"] = "micro_batch"
    """Where load is counted for the balance loss: in the micro batch, or in the whole previous update."""

    balance_weight: float = Field(default=None, ge=0.0, validate_default=True)
    """Weight of the balance loss beside the language-model loss (beta of equation 9); null gives 0.01, and 0 with
    balance none. Ratio."""

    @model_validator(mode="before")
    @classmethod
    def _router_of_the_variant(cls, raw: Any) -> Any:
        """Give the released variant its two-layer router; the other fields that depend on the variant are null."""
        if not isinstance(raw, dict) or raw.get("variant") != "released" or not isinstance(raw.get("router", {}), dict):
            return raw
        return {**raw, "router": {"num_layers": 2, **raw.get("router", {})}}

    @field_validator("num_ffn_experts", "num_zero", "num_copy", "num_constant", mode="before")
    @classmethod
    def _one_number_for_all_layers(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            raise ValueError(
                f"{list(value)} would give layers unequal numbers of experts, but a gating residual carries the logits "
                "of one MoE layer to the next, expert by expert; give one number for all layers"
            )
        return value

    @field_validator(
        *("num_constant", "top_k", "combine", "expert_input_scale", "balance_counts", "balance_weight"),
        *SEAT_KEYS,
        mode="before",
    )
    @classmethod
    def _null_by_rule(cls, value: Any, info: ValidationInfo) -> Any:
        return _by_rule(info.data)[str(info.field_name)] if value is None else value

    @model_validator(mode="after")
    def _choices_agree(self) -> MoEConfig:
        problems = [*self._selection_problems(), *self._seat_problems(), *self._balance_problems()]
        if self.controller is not None:
            problems += self._controller_problems(self.controller)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _selection_problems(self) -> Iterator[str]:
        threshold = self.router.threshold
        if self.top_k is not None and threshold is not None:
            yield (
                f"top_k {self.top_k} is given beside router.threshold {threshold:g}, which decides how many experts a "
                "token takes; set one of them to null"
            )
        elif self.top_k is not None and self.top_k > self.num_experts:
            yield (
                f"top_k {self.top_k} is more than the {self.num_experts} experts of a layer {self._kinds()}; "
                f"use top_k 1 to {self.num_experts}"
            )
        if self.top_k == 1 < self.num_experts and self.combine != "softmax":
            yield (
                f"combine {self.combine} with top_k 1 gives every expert that computes the weight 1, so the language "
                "model teaches the router nothing; use combine softmax, or top_k 2"
            )
        if self.router.logit_std is not None and self.num_experts == 1:
            yield "router.logit_std needs at least 2 experts: one logit has no standard deviation; set it to null"
        if self.shared_expert_gate and not self.num_shared_experts:
            yield "shared_expert_gate true has nothing to gate, since num_shared_experts is 0; set one of them"

    def _seat_problems(self) -> Iterator[str]:
        given = [f"{name} {getattr(self, name)}" for name in SEAT_KEYS if getattr(self, name) is not None]
        if self.dropless and given:
            yield (
                f"dropless true has no seats, but {', '.join(given)} {'is' if len(given) == 1 else 'are'} given; set "
                "dropless to false, or these to null"
            )
        if self.dropless or self.router.threshold is None:
            return
        if self.capacity_counts == "assignments":
            yield (
                "capacity_counts assignments needs top_k, and with router.threshold there is none; "
                "use capacity_counts tokens"
            )
        if self.capacity_factor is None:
            yield (
                "capacity_factor must be given with router.threshold: it is the mean number of experts per token that "
                f"there are seats for, 1 to {self.num_experts}; or set dropless to true"
            )

    def _balance_problems(self) -> Iterator[str]:
        if self.balance == "none" and self.balance_weight:
            yield (
                f"balance_weight {self.balance_weight:g} weighs a loss that balance none leaves out; "
                "set balance_weight to 0, or use balance per_expert"
            )
        if self.balance == "null_averaged" and not self.num_zero:
            yield "balance null_averaged averages over zero experts, and num_zero is 0; use balance per_expert"
        if self.balance == "per_group" and not self.num_zero_computation:
            yield (
                "balance per_group weighs FFN against zero-computation experts, and there are none of the latter; "
                "use balance per_expert or none"
            )

    def _controller_problems(self, controller: ControllerConfig) -> Iterator[str]:
        if self.top_k == self.num_experts or self.router.threshold == 1:
            yield f"controller has nothing to steer: every token takes all {self.num_experts} experts; set it to null"
            return
        by_threshold, target = self.router.threshold is not None, controller.target_ffn_experts
        if by_threshold and not self.num_zero_computation:
            yield (
                "controller cannot reach a budget with router.threshold and no zero-computation experts: raising or "
                "lowering all biases changes no choice; use top_k, or num_zero 1"
            )
        if by_threshold and target is None:
            yield "controller.target_ffn_experts must be given with router.threshold: tau implies none there"
            return
        least = 0 if self.top_k is None else max(0, self.top_k - self.num_zero_computation)
        most = self.num_ffn_experts if self.top_k is None else min(self.top_k, self.num_ffn_experts)
        if not least <= self.mean_ffn_experts <= most:
            takes = f"top_k {self.top_k}" if self.top_k is not None else f"router.threshold {self.router.threshold:g}"
            yield (
                f"controller.target_ffn_experts {self.mean_ffn_experts:g} is outside {least} to {most}, "
                f"what {takes} leaves of {self.num_experts} experts {self._kinds()}"
            )

    def _kinds(self) -> str:
        return f"({self.num_ffn_experts} FFN + {self.num_zero_computation} zero-computation)"

    @property
    def num_zero_computation(self) -> int:
        """Experts that cost no FFN: zero, copy and constant together (N_ZC)."""
        return self.num_zero + self.num_copy + self.num_constant

    @property
    def num_experts(self) -> int:
        """Experts of all kinds that a router chooses from (E), in index order FFN, constant, copy, zero."""
        return self.num_ffn_experts + self.num_zero_computation

    @property
    def ffn_share(self) -> float:
        """Share of all assignments that go to FFN experts when the load is as the balance loss wants it."""
        weighted = self.tau * self.num_ffn_experts
        return weighted / (weighted + self.num_zero_computation)

    @property
    def choices_per_token(self) -> float:
        """Experts of any kind that a token has computed: top_k; with a threshold, the most there can be on average.

        That is what there are seats for. Dropless, and in evaluation, a token takes most where all experts are equally
        probable: threshold x experts, rounded up.
        """
        if self.top_k is not None:
            return float(self.top_k)
        even = max(1, math.ceil(Fraction(repr(self.router.threshold)) * self.num_experts))
        return float(even if self.capacity_factor is None else min(even, self.capacity_factor))

    @property
    def mean_ffn_experts(self) -> float:
        """Routed FFN experts that a token uses on average: the controller's target, else what tau implies.

        top_k for a vanilla MoE; with a threshold and no controller, the most there can be at the load that tau implies.
        """
        if self.controller is not None and self.controller.target_ffn_experts is not None:
            return self.controller.target_ffn_experts
        return self.choices_per_token * self.ffn_share

    @property
    def computed_ffn_experts(self) -> float:
        """Routed FFN experts that compute a token of a training step on average: no more than have seats."""
        if self.capacity_factor is None:
            return self.mean_ffn_experts
        asked = (self.top_k or 1) if self.capacity_counts == "assignments" else 1
        return min(self.mean_ffn_experts, self.capacity_factor * asked * self.ffn_share)


def _by_rule(known: Mapping[str, Any]) -> dict[str, Any]:
    """What a null stands for, by field; `known` are the valid ones of the fields above it.

    A field above that failed is what gets reported, so here it may be anything.
    """
    released, seats = known.get("variant") == "released", not known.get("dropless")
    by_threshold = "router" in known and known["router"].threshold is not None
    fourth = known.get("num_ffn_experts", 0) // 4
    by_top_k = released and known.get("combine") != "renormalize_selected"
    return {
        "num_constant": 2 if released else max(fourth - known.get("num_zero", 0) - known.get("num_copy", 0), 1),
        "top_k": None if by_threshold else 2,
        "combine": "renormalize_computing" if released else "softmax",
        "expert_input_scale": float(known.get("top_k") or 1) if by_top_k else 1.0,
        "capacity_factor": 1.1 if seats and not by_threshold else None,
        "capacity_counts": ("tokens" if by_threshold else "assignments") if seats else None,
        "min_capacity": 1 if seats else None,
        "drop_policy": ("rank" if by_threshold else "probability") if seats else None,
        "balance_counts": "first" if by_threshold else "all",
        "balance_weight": 0.0 if known.get("balance") == "none" else 0.01,
    }
