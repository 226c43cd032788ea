"""Losses, as pure functions of what the layer returns.

L = L_ce + beta * sum over layers of L_b   (MoE++, eq 9; the paper does not say how layers add up, the field sums)
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepp_ds.products import linear


def balance_loss(*, probability_TE: Tensor, wanted_E: Tensor, num_ffn: int, tau: float) -> Tensor:
    """Heterogeneous load balance loss of one layer, a scalar (MoE++, eq 7).

    L_b = sum_i eta_i f_i P_i with eta = 1 for FFN experts and tau for zero-computation experts, f_i the share of the
    T tokens that chose expert i (all K choices count, so sum f = K), P_i its mean probability. No factor N, no 1/K.

    wanted_E counts what the router chose, before any seat was refused; no gradient passes through it.
    """
    num_tokens, num_experts = probability_TE.shape
    eta_E = probability_TE.new_full((num_experts,), tau)
    eta_E[:num_ffn] = 1.0
    share_E = wanted_E.to(probability_TE.dtype) / num_tokens
    return (eta_E * share_E * probability_TE.mean(dim=0)).sum()


def token_losses(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, [T] in fp32 at least, from the last hidden state and the output head."""
    logits_TV = linear(hidden_TD, head_VD)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="none")
