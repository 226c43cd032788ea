"""What no checkpoint has: routers of dense models, rows for zero-computation experts, constants, gating residuals.

They are chosen so that the model begins as close as it can to what the checkpoint computes.

* Gating residuals start at zero: every layer's logits are then its router's own.
* A router row of a zero-computation expert starts as the mean of the layer's FFN rows. A router is linear and has no
  bias, so for every token that expert's logit is the mean of the token's FFN logits. Then it is never a token's first
  choice, it is chosen only where fewer than top_k logits are above their mean, and M such experts beside N FFN experts
  take at most M / (N + M) of the softmax, since the mean of exp is at least exp of the mean. A fresh normal row has
  logits about 0 instead, which is no neutral place: routers trained with a z-loss keep all their logits below 0, and
  zero-computation experts would take over every token. A row that is never chosen (logits far below) would be as safe,
  but it would get no gradient; the mean is within reach of the balance loss, the budget controller and the task.
  Noise of 1 % of the FFN rows' spread tells the zero-computation experts apart.
  Measured on an OLMoE of 3 layers and 16 experts, 4 a token, trained for 400 updates with a z-loss (mean logit -1.5),
  that gains 4 zero-computation experts: held-out loss 2.793 before; 2.798 with mean rows, 3.518 with normal(0, 0.02).
  After 200 more updates 2.503 against 2.571, and with the budget controller, which brings the FFN experts of a token
  from 4.0 to the 3.0 asked for within 100 of them, 2.528 against 2.557.
* The router of a dense model's experts starts normal(0, init_std): copies have to be told apart by it. Where a split
  model takes all experts (threshold 1), its FFN rows start at zero: all parts count alike, as they do in the dense FFN,
  and differ enough to be told apart.
* Constants start as `initialize` makes them.

Random numbers are keyed by (seed, parameter name) in the way of `initialize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepp_ds.config import ModelConfig
from moepp_ds.keyed import keyed_generator

ROW_NOISE = 0.01
"""Noise on the rows of zero-computation experts, over the spread of the FFN rows about their mean. Ratio."""


def normal(shape: list[int], key: str, *, seed: int) -> Tensor:
    """Standard normal fp32 numbers that depend on (seed, key) alone."""
    return torch.randn(shape, generator=keyed_generator(f"{seed}/{key}"))


def complete_router(name: str, shape: list[int], rows_MX: Tensor, *, seed: int) -> Tensor:
    """A router's output weight [E, X] whose first rows are the FFN experts' and the others their mean and noise."""
    mean_X = rows_MX.mean(dim=0)
    spread = (rows_MX - mean_X).square().mean().sqrt()
    others = shape[0] - len(rows_MX)
    noise_EX = normal([others, *shape[1:]], f"{name}/zero_computation", seed=seed)
    return torch.cat((rows_MX, mean_X + ROW_NOISE * spread * noise_EX))


def fresh_parameter(name: str, shape: list[int], model: ModelConfig, *, seed: int, even: bool) -> Tensor | None:
    """What `name` starts from when no checkpoint has it; None if it is none of the parameters above.

    even: whether a router starts with all FFN experts alike.
    """
    last = name.rpartition(".")[2]
    if last == "residual_EE":
        return torch.zeros(shape)
    if last in ("selector_J2D", "value_JD", "hidden_XD"):
        return normal(shape, name, seed=seed) * model.init_std
    if last in ("weight_ED", "weight_EX"):
        rows_MX = normal(shape, name, seed=seed)[: model.moe.num_ffn_experts] * (0.0 if even else model.init_std)
        return complete_router(name, shape, rows_MX, seed=seed)
    return None
