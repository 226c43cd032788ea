"""Losses, as pure functions of what the layer returns.

L = L_ce + beta * sum over layers of L_b + zeta * sum over layers of L_z
    (MoE++, eq 9; the paper does not say how layers add up, the field sums)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moepp_ds.kinds import ExpertKinds

Balance = Literal["per_expert", "per_group", "null_averaged", "none"]


def balance_loss(
    *, probability_TE: Tensor, share_E: Tensor, kinds: ExpertKinds, tau: float, balance: Balance = "per_expert"
) -> Tensor:
    """Heterogeneous load balance loss of one layer, a scalar (MoE++, eq 7).

    L_b = sum_i eta_i f_i P_i with eta = 1 for FFN experts and tau for zero-computation experts, P_i the mean
    probability of expert i, and f_i = share_E[i] its choices over tokens (all choices of top-k count: sum f = K). No
    factor N, no 1/K. No gradient passes through f, and what it counts is the caller's choice.

    per_group: f is averaged over the FFN experts and over the others, so only the two groups are balanced
    (arXiv 2605.18643). null_averaged: f is averaged over the zero experts (AdaMoE, arXiv 2406.13233). none: 0.
    """
    if balance == "none":
        return probability_TE.new_zeros(())
    ranges = kinds.slices()
    share_E = share_E.to(probability_TE.dtype).clone()
    averaged = {
        "per_expert": [],
        "per_group": [ranges["ffn"], slice(kinds.num_ffn, kinds.total)],
        "null_averaged": [ranges["zero"]],
    }
    for group in averaged[balance]:
        share_E[group] = share_E[group].mean()
    eta_E = probability_TE.new_full((kinds.total,), tau)
    eta_E[: kinds.num_ffn] = 1.0
    return (eta_E * share_E * probability_TE.mean(dim=0)).sum()


def normalized_balance(loss: Tensor, *, share_E: Tensor, kinds: ExpertKinds, tau: float) -> Tensor:
    """A balance loss over its value at perfect balance: 1.0 is perfect, more is worse.

    At perfect balance P_i is proportional to 1 / eta_i and f_i = M P_i with M choices per token, which makes any of
    the losses M / (N_FFN + N_ZC / tau), their least value where f follows P.
    """
    return loss * (kinds.num_ffn + kinds.num_zero_computation / tau) / share_E.to(loss.dtype).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Router z-loss of one layer, a scalar: the mean over tokens of (log sum exp logits)^2 (ST-MoE, arXiv 2202.08906,
    eq 5). It keeps the logits small."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean()
