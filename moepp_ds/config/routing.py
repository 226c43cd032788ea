"""The two small sections inside `model.moe`: the router, and the controller that steers it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moepp_ds.config.section import Section


class RouterConfig(Section):
    """How a router scores experts, and whether a threshold decides how many of them a token gets."""

    threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    """XMoE's threshold: a token takes experts, best first, while those before hold less than this probability mass,
    and always one; 1 takes all. Null leaves the number to moe.top_k. Probability."""

    num_layers: Literal[1, 2] = 1
    """1: W x. 2: W2 tanh(W1 x) with 8 hidden features for each expert, as the released MoE++ model has it (and its
    variant means). Layers."""

    logit_std: float | None = Field(default=None, gt=0.0)
    """Logits are divided by their standard deviation over the experts of a token and multiplied by this, before the
    softmax; the gating residual carries them as they were. Null leaves them. Logits."""

    jitter: float = Field(default=0.0, ge=0.0, lt=1.0)
    """While training, each feature that the router sees is multiplied by a number drawn from 1 - jitter to 1 + jitter,
    which depends on seed, row and layer alone. Ratio."""

    z_loss_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the router z-loss, the mean square of log sum exp of a token's logits, as they enter the softmax.
    Ratio."""


class ControllerConfig(Section):
    """A bias for each FFN expert, added for selection alone, that steers the load after every update.

    LongCat-Flash's budget controller is the rule `proportional`, DeepSeek's auxiliary-loss-free balancing `sign`.
    """

    rule: Literal["proportional", "sign"] = "proportional"
    """Whether a bias moves by the rate times what its expert is short of, or by the rate itself."""

    target_ffn_experts: float | None = Field(default=None, gt=0.0)
    """Mean routed FFN experts per token that is steered to; null is what tau implies. Experts per token."""

    rate: float = Field(default=None, gt=0.0, validate_default=True)
    """Step of the biases after the first update (mu): probability, per unit of load for `proportional`. Null gives 0.5,
    and 0.001 with the rule `sign`, which moves by all of it every time."""

    final_rate: float = Field(default=None, ge=0.0, validate_default=True)
    """Step of the biases after the last update, reached along a straight line. As rate; null gives a
    tenth of rate, and all of it with the rule `sign`."""

    @field_validator("rate", mode="before")
    @classmethod
    def _rate_by_rule(cls, value: Any, info: ValidationInfo) -> Any:
        return {"sign": 0.001}.get(info.data.get("rule", ""), 0.5) if value is None else value

    @field_validator("final_rate", mode="before")
    @classmethod
    def _final_rate_by_rule(cls, value: Any, info: ValidationInfo) -> Any:
        stays = info.data.get("rule") == "sign"
        return info.data.get("rate", 0.5) / (1 if stays else 10) if value is None else value

    @model_validator(mode="after")
    def _rate_falls(self) -> ControllerConfig:
        if self.final_rate > self.rate:
            raise ValueError(
                f"final_rate {self.final_rate:g} is more than rate {self.rate:g}; it decays from the one to the other"
            )
        return self
