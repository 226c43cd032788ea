"""The router: which experts a token asks for, and with what weight.

1. logits   G_1 = W x;  G_j = W_j x + Wg_j G_{j-1}   (MoE++, eq 6: the logits travel, earlier residuals included)
2. scores   p = softmax(G) over experts of all kinds   (eq 1)
3. choice   the K highest scores; combine weight = score, not renormalised   (eq 1)

Routing is a list of assignments, token by token, not a rectangle: nothing behind the router assumes that two tokens
chose equally many experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """What the router decided. N assignments, ordered by token, best choice first.

    logits_TE and probability_TE are fp32 (fp64 for fp64 input) and differentiable; gate_N, the combine weights, too.
    """

    logits_TE: Tensor
    probability_TE: Tensor
    token_N: Tensor
    expert_N: Tensor
    gate_N: Tensor


class Router(nn.Module):
    """Top-K router with gating residual (MoE++, eq 1 and 6).

    `has_residual` is False in the first MoE layer: it has no earlier logits, and a parameter that never gets a
    gradient would stall DeepSpeed's reduction.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int, has_residual: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight_ED = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.residual_EE = nn.Parameter(torch.empty(num_experts, num_experts)) if has_residual else None

    def forward(self, x_TD: Tensor, previous_logits_TE: Tensor | None) -> Routing:
        """Route x_TD. `previous_logits_TE`: the logits of the MoE layer before, None in the first.

        All of it runs in fp32 at least: in bf16 the softmax of 20 experts has near-ties by the thousand. The master
        weight is fp32 in ZeRO's optimizer; the bf16 copy is widened here.
        """
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = x_TD.to(dtype) @ self.weight_ED.to(dtype).t()
        if self.residual_EE is not None and previous_logits_TE is not None:
            logits_TE = logits_TE + previous_logits_TE @ self.residual_EE.to(dtype).t()
        probability_TE = torch.softmax(logits_TE, dim=-1)
        # By logits, not scores: where softmax underflows to 0 the order is lost.
        expert_TK = torch.topk(logits_TE, self.top_k, dim=-1).indices
        gate_TK = probability_TE.gather(-1, expert_TK)
        token_TK = torch.arange(len(x_TD), device=x_TD.device).unsqueeze(1).expand_as(expert_TK)
        return Routing(logits_TE, probability_TE, token_TK.flatten(), expert_TK.flatten(), gate_TK.flatten())
