"""What a user would pick instead of this project's layer, with the same weights, for the same tokens.

* `PerExpertLoop`     the same MoE++ layer as released inference code computes it: expert by expert, its tokens found
                      with `where`, taken, and added back
* `DeepSpeedLayer`    `deepspeed.moe.layer.MoE` around a SwiGLU expert: all seats are computed, filled or not
* `MixtralLayer`      the sparse block of transformers' Mixtral: no seats
* `DenseLayer`        one SwiGLU FFN, as wide as the experts of one token together

DeepSpeed and Mixtral know FFN experts alone, and divide a token's combine weights by their sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moepp_ds.experts import FFNExperts
from moepp_ds.moe_layer import MoELayer


class PerExpertLoop(nn.Module):
    """Equations 1 to 5 of MoE++ one expert after the other, dropless, on the weights of `layer`.

    Each FFN expert has two matrices of its own, gate and value in one as in the released model; they share the memory
    of the layer's.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.kinds, self.top_k = layer.kinds, layer.settings.router.top_k or 1
        self.router, self.constants = layer.router, layer.constants
        weights = (layer.experts.gate_up_EDG, layer.experts.down_EFD)
        self.gate_up, self.down = (
            nn.ParameterList(nn.Parameter(piece) for piece in weight.detach()) for weight in weights
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """The output [T, D]."""
        probability_TE = F.softmax(x_TD.float() @ self.router.weight_ED.float().t(), dim=-1)
        gate_TK, expert_TK = torch.topk(probability_TE, self.top_k, dim=-1)
        output_TD = torch.zeros_like(x_TD)
        for expert in range(self.kinds.total):
            token_N, rank_N = torch.where(expert_TK == expert)
            result_ND = self._of_expert(expert, x_TD[token_N]) * gate_TK[token_N, rank_N, None]
            output_TD.index_add_(0, token_N, result_ND.to(x_TD.dtype))
        return output_TD

    def _of_expert(self, expert: int, x_ND: Tensor) -> Tensor:
        ranges = self.kinds.slices()
        if expert < ranges["ffn"].stop:
            gate_NF, value_NF = (x_ND @ self.gate_up[expert]).chunk(2, dim=-1)
            return (F.silu(gate_NF) * value_NF) @ self.down[expert]
        if expert in _places(ranges["constant"]):
            assert self.constants is not None
            j = expert - ranges["constant"].start
            keep_N2 = F.softmax(x_ND @ self.constants.selector_J2D[j].t(), dim=-1)
            return keep_N2[:, :1] * x_ND + keep_N2[:, 1:] * self.constants.value_JD[j]
        return x_ND if expert in _places(ranges["copy"]) else torch.zeros_like(x_ND)


def _places(at: slice) -> range:
    return range(at.start, at.stop)


class _SwiGLU(nn.Module):
    """One FFN expert as a module of linear layers, gate beside value."""

    def __init__(self, gate_up_DG: Tensor, down_FD: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = (
            nn.Linear(len(weight_XO), weight_XO.shape[1], bias=False).to(weight_XO)
            for weight_XO in (gate_up_DG, down_FD)
        )
        self.load(gate_up_DG, down_FD)

    @torch.no_grad()
    def load(self, gate_up_DG: Tensor, down_FD: Tensor) -> None:
        """Take these weights."""
        self.gate_up.weight.copy_(gate_up_DG.t())
        self.down.weight.copy_(down_FD.t())

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's own layer: top 2, with seats."""

    def __init__(self, experts: FFNExperts, weight_ED: Tensor, *, capacity_factor: float) -> None:
        super().__init__()
        weights = list(zip(experts.gate_up_EDG, experts.down_EFD))
        num_experts, width = weight_ED.shape
        self.moe = MoE(
            width,
            _SwiGLU(*weights[0]),
            num_experts,
            k=2,
            capacity_factor=capacity_factor,
            top2_2nd_expert_sampling=False,  # the second choice is the second best, as for everyone here
        ).to(weight_ED.device)
        for expert, weight in zip(self.moe.deepspeed_moe.experts.deepspeed_experts, weights):
            expert.load(*weight)
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(weight_ED)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The output [T, D] and the balance loss."""
        output_TD, balance_loss, _ = self.moe(x_TD)
        return output_TD, balance_loss


class MixtralLayer(nn.Module):
    """The block that transformers' Mixtral has in place of an FFN; `grouped_mm` is what it picks by itself."""

    def __init__(
        self,
        experts: FFNExperts,
        weight_ED: Tensor,
        *,
        top_k: int,
        implementation: Literal["grouped_mm", "eager"],
    ) -> None:
        super().__init__()
        num_experts, width = weight_ED.shape
        config = MixtralConfig(
            hidden_size=width,
            intermediate_size=experts.down_EFD.shape[1],
            num_local_experts=num_experts,
            num_experts_per_tok=top_k,
        )
        config._experts_implementation = implementation
        self.block = MixtralSparseMoeBlock(config).to(weight_ED.device, experts.down_EFD.dtype)
        with torch.no_grad():
            self.block.gate.weight.copy_(weight_ED)
            self.block.experts.gate_up_proj.copy_(experts.gate_up_EDG.transpose(1, 2))
            self.block.experts.down_proj.copy_(experts.down_EFD.transpose(1, 2))

    def forward(self, x_TD: Tensor) -> Tensor:
        """The output [T, D]."""
        return self.block(x_TD.unsqueeze(0)).squeeze(0)


class DenseLayer(nn.Module):
    """One FFN of the inner width of `top_k` experts; the weights are those of the first ones."""

    def __init__(self, experts: FFNExperts, *, top_k: int) -> None:
        super().__init__()
        gates, values = zip(*(weight_DG.chunk(2, dim=-1) for weight_DG in experts.gate_up_EDG[:top_k]))
        self.ffn = _SwiGLU(torch.cat([*gates, *values], dim=-1), experts.down_EFD[:top_k].flatten(0, 1))

    def forward(self, x_TD: Tensor) -> Tensor:
        """The output [T, D]."""
        return self.ffn(x_TD)
