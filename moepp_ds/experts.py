"""The experts: FFN experts as a grouped product, zero-computation experts as one scale and one small product.

FFN       E(x) = (silu(x W_gate) * (x W_up)) W_down   (SwiGLU, no biases)
zero      E(x) = 0                                    (MoE++, eq 3)
copy      E(x) = x                                    (eq 4)
constant  E(x) = a1 x + a2 v, [a1, a2] = softmax(W_c x)   (eq 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from moepp_ds.swiglu import swiglu_by_expert

Backend = Literal["auto", "slices", "grouped_mm"]


def _check_counts(rows_RX: Tensor, num_experts: int, counts: Sequence[int]) -> None:
    if len(counts) != num_experts or sum(counts) != len(rows_RX):
        raise ValueError(
            f"{len(rows_RX)} rows for {num_experts} experts, but {len(counts)} counts that sum to {sum(counts)}; "
            "the dispatch plan is not theirs"
        )


def _is_aligned(dtype: torch.dtype, widths: Sequence[int]) -> bool:
    """grouped_mm takes bf16, fp16 and fp32 with rows of a multiple of 16 bytes."""
    return dtype != torch.float64 and all(width * dtype.itemsize % 16 == 0 for width in widths)


class FFNExperts(nn.Module):
    """`num_experts` SwiGLU networks in two stacked weights: gate beside value [E, D, 2F], and down [E, F, D].

    One expert and all rows for it is a dense FFN layer.
    """

    def __init__(self, num_experts: int, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_up_EDG = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * ffn_hidden_size))
        self.down_EFD = nn.Parameter(torch.empty(num_experts, ffn_hidden_size, hidden_size))

    def forward(self, rows_RD: Tensor, counts: Sequence[int], *, backend: Backend = "auto") -> Tensor:
        """Apply expert e to its `counts[e]` consecutive rows; [R, D] in and out.

        Every expert takes part in the graph, also with no rows, so every expert has a gradient on every rank:
        DeepSpeed's reduction waits for each parameter.

        backend: `grouped_mm` is one kernel for all experts and the fast path on a GPU, on a CPU a loop inside;
        `slices` takes one expert after the other, in every dtype and width. `auto` picks.
        """
        _check_counts(rows_RD, len(self.gate_up_EDG), counts)
        if backend == "auto":
            widths = (rows_RD.shape[-1], self.down_EFD.shape[1])
            backend = "grouped_mm" if rows_RD.is_cuda and _is_aligned(rows_RD.dtype, widths) else "slices"
        if backend == "slices":
            return swiglu_by_expert(rows_RD, self.gate_up_EDG, self.down_EFD, counts)
        ends_E = torch.tensor(counts, device=rows_RD.device).cumsum(0).to(torch.int32)
        product_RG = nn.functional.grouped_mm(rows_RD, self.gate_up_EDG, offs=ends_E)
        gate_RF, value_RF = product_RG.chunk(2, dim=-1)
        return nn.functional.grouped_mm(nn.functional.silu(gate_RF) * value_RF, self.down_EFD, offs=ends_E)


class ConstantExperts(nn.Module):
    """J constant experts: selectors W_c [J, 2, D] and values v [J, D] (MoE++, eq 5)."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.selector_J2D = nn.Parameter(torch.empty(num_experts, 2, hidden_size))
        self.value_JD = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TD: Tensor, gate_TJ: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the constant experts add, as a scale of x and a sum of values: ([T], [T, D]).

        gate_TJ is 0 where a token did not choose (or was refused by) the expert, so no token is gathered or scattered.
        """
        dtype = gate_TJ.dtype
        logits_TJ2 = torch.einsum("td,jad->tja", x_TD.to(dtype), self.selector_J2D.to(dtype))
        keep_TJ, value_TJ = torch.softmax(logits_TJ2, dim=-1).unbind(-1)
        scale_T = (gate_TJ * keep_TJ).sum(dim=-1)
        return scale_T, (gate_TJ * value_TJ) @ self.value_JD.to(dtype)


def zero_computation_output(
    x_TD: Tensor, *, copy_gate_T: Tensor, constant_gate_TJ: Tensor, constants: ConstantExperts | None
) -> Tensor:
    """What all zero-computation experts together give, [T, D] in the dtype of x: one scale of x and one small product.

    Zero experts add nothing, so they have no argument. Gates are fp32 and 0 where there is no assignment.
    """
    scale_T, values_TD = copy_gate_T, None
    if constants is not None:
        constant_scale_T, values_TD = constants(x_TD, constant_gate_TJ)
        scale_T = scale_T + constant_scale_T
    output_TD = scale_T.unsqueeze(-1) * x_TD
    return (output_TD if values_TD is None else output_TD + values_TD).to(x_TD.dtype)
