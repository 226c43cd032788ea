"""Zero-computation experts, all together: one scale of x and one small product, for every token in place.

zero      E(x) = 0                                    (MoE++, eq 3)
copy      E(x) = x                                    (eq 4)
constant  E(x) = a1 x + a2 v, [a1, a2] = softmax(W_c x)   (eq 5)

The sum over a token's experts is s x + m V: s the gates of copy experts and of constant experts times a1, m those of
constant experts times a2, V their values. Nothing is gathered or scattered, and of what is as wide as the model the
backward pass is kept x alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moepp_ds.blocks import row_blocks


class ConstantExperts(nn.Module):
    """J constant experts: selectors W_c [J, 2, D] and values v [J, D] (MoE++, eq 5)."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.selector_J2D = nn.Parameter(torch.empty(num_experts, 2, hidden_size))
        self.value_JD = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TD: Tensor, scale_T: Tensor, gate_TJ: Tensor) -> Tensor:
        """What these experts add to scale_T x: [T, D] in the dtype of x."""
        return _ScaleAndConstants.apply(x_TD, scale_T, gate_TJ, self.selector_J2D, self.value_JD)


def zero_computation_output(
    x_TD: Tensor, *, copy_gate_T: Tensor, constant_gate_TJ: Tensor, constants: ConstantExperts | None
) -> Tensor:
    """What all zero-computation experts together give, [T, D] in the dtype of x, memory of its own.

    Zero experts add nothing, so they have no argument. Gates are fp32 and 0 where there is no assignment; all of it is
    computed in their dtype.
    """
    if constants is not None:
        return constants(x_TD, copy_gate_T, constant_gate_TJ)
    none_J2D, none_JD = x_TD.new_empty(0, 2, x_TD.shape[1]), x_TD.new_empty(0, x_TD.shape[1])
    return _ScaleAndConstants.apply(x_TD, copy_gate_T, constant_gate_TJ, none_J2D, none_JD)


class _ScaleAndConstants(torch.autograd.Function):
    """y = s x + m V with a1 = sigmoid of the difference of the two scores, which is softmax of two."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, scale_T: Tensor, gate_TJ: Tensor, selector_J2D: Tensor, value_JD: Tensor
    ) -> Tensor:
        dtype = gate_TJ.dtype
        difference_JD, wide_JD = _difference(selector_J2D, dtype), value_JD.to(dtype)
        keep_TJ, out_TD = torch.empty_like(gate_TJ), torch.empty_like(x_TD)
        for at in row_blocks(x_TD.shape, x_TD.device):
            x_BD = x_TD[at].to(dtype)
            keep_BJ = torch.sigmoid(x_BD @ difference_JD.t(), out=keep_TJ[at])
            scale_B1, mix_BJ = _weights(scale_T[at], gate_TJ[at], keep_BJ)
            _write_sum(x_BD, scale_B1, mix_BJ, wide_JD, out=out_TD[at])
        ctx.save_for_backward(x_TD, scale_T, gate_TJ, keep_TJ, selector_J2D, value_JD)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TD,) = gradients
        x_TD, scale_T, gate_TJ, keep_TJ, selector_J2D, value_JD = ctx.saved_tensors
        dtype = gate_TJ.dtype
        difference_JD, wide_JD = _difference(selector_J2D, dtype), value_JD.to(dtype)
        of_x_TD, of_scale_T, of_gate_TJ = (torch.empty_like(tensor) for tensor in (x_TD, scale_T, gate_TJ))
        of_difference_JD, of_value_JD = torch.zeros_like(difference_JD), torch.zeros_like(wide_JD)
        for at in row_blocks(x_TD.shape, x_TD.device):
            x_BD, grad_BD, gate_BJ, keep_BJ = x_TD[at].to(dtype), grad_TD[at].to(dtype), gate_TJ[at], keep_TJ[at]
            scale_B1, mix_BJ = _weights(scale_T[at], gate_BJ, keep_BJ)
            of_scale_B = torch.linalg.vecdot(grad_BD, x_BD)
            of_mix_BJ = grad_BD @ wide_JD.t()
            lead_BJ = of_scale_B.unsqueeze(-1) - of_mix_BJ  # what it is worth to keep more of x and take less of v
            of_score_BJ = lead_BJ * gate_BJ * keep_BJ * (1 - keep_BJ)
            of_scale_T[at] = of_scale_B
            of_gate_TJ[at] = of_mix_BJ + lead_BJ * keep_BJ
            _write_sum(grad_BD, scale_B1, of_score_BJ, difference_JD, out=of_x_TD[at])
            of_difference_JD.addmm_(of_score_BJ.t(), x_BD)
            of_value_JD.addmm_(mix_BJ.t(), grad_BD)
        of_selector_J2D = torch.stack([of_difference_JD, -of_difference_JD], dim=1).to(selector_J2D.dtype)
        return of_x_TD, of_scale_T, of_gate_TJ, of_selector_J2D, of_value_JD.to(value_JD.dtype)


def _difference(selector_J2D: Tensor, dtype: torch.dtype) -> Tensor:
    keep_JD, take_JD = selector_J2D.to(dtype).unbind(1)
    return keep_JD - take_JD


def _weights(scale_B: Tensor, gate_BJ: Tensor, keep_BJ: Tensor) -> tuple[Tensor, Tensor]:
    """s, as a column, and m."""
    kept_BJ = gate_BJ * keep_BJ
    return (scale_B + kept_BJ.sum(dim=-1)).unsqueeze(-1), gate_BJ - kept_BJ


def _write_sum(y_BD: Tensor, scale_B1: Tensor, weight_BJ: Tensor, row_JD: Tensor, *, out: Tensor) -> None:
    """out_BD = scale y + weight row, rounded once, with no more than one block as wide as the model in between."""
    sum_BD = out if out.dtype == y_BD.dtype else torch.empty_like(y_BD)
    torch.mul(y_BD, scale_B1, out=sum_BD)
    sum_BD.addmm_(weight_BJ, row_JD)
    if sum_BD is not out:
        out.copy_(sum_BD)
