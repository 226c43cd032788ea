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

from moepp_ds.products import product_dtype

Backend = Literal["auto", "slices", "grouped_mm"]


def grouped_product(
    rows_RX: Tensor, weight_EXO: Tensor, counts: Sequence[int], *, backend: Backend = "auto"
) -> Tensor:
    """Multiply consecutive blocks of rows, `counts[e]` of them, by weight e. Returns [R, O] in the dtype of the rows.

    Every expert takes part in the graph, also with no rows, so every expert has a gradient on every rank: DeepSpeed's
    reduction waits for each parameter.

    backend: `grouped_mm` is one kernel and the fast path on a GPU; on a CPU it is a loop inside, and plain `slices`
    are as fast and take every dtype. `auto` picks.
    """
    if len(counts) != len(weight_EXO) or sum(counts) != len(rows_RX):
        raise ValueError(
            f"{len(rows_RX)} rows for {len(weight_EXO)} experts, but {len(counts)} counts that sum to {sum(counts)}; "
            "the dispatch plan is not theirs"
        )
    dtype = product_dtype(rows_RX)
    if backend == "auto":
        backend = "grouped_mm" if rows_RX.is_cuda and _is_aligned(rows_RX, weight_EXO) else "slices"
    if backend == "grouped_mm":
        ends_E = torch.tensor(counts, device=rows_RX.device).cumsum(0).to(torch.int32)
        return nn.functional.grouped_mm(rows_RX, weight_EXO, offs=ends_E)
    blocks = rows_RX.to(dtype).split(list(counts))
    # unbind, not indexing: the backward of an index writes a zero tensor of the whole weight for each expert.
    weights = weight_EXO.to(dtype).unbind(0)
    return torch.cat([block @ weight for block, weight in zip(blocks, weights)]).to(rows_RX.dtype)


def _is_aligned(rows_RX: Tensor, weight_EXO: Tensor) -> bool:
    """grouped_mm takes bf16, fp16 and fp32 with rows of a multiple of 16 bytes."""
    widths = (rows_RX.shape[-1] * rows_RX.element_size(), weight_EXO.shape[-1] * weight_EXO.element_size())
    return rows_RX.dtype != torch.float64 and all(width % 16 == 0 for width in widths)


class FFNExperts(nn.Module):
    """`num_experts` SwiGLU networks in two stacked weights: gate beside value [E, D, 2F], and down [E, F, D].

    One expert and all rows for it is a dense FFN layer.
    """

    def __init__(self, num_experts: int, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_up_EDG = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * ffn_hidden_size))
        self.down_EFD = nn.Parameter(torch.empty(num_experts, ffn_hidden_size, hidden_size))

    def forward(self, rows_RD: Tensor, counts: Sequence[int], *, backend: Backend = "auto") -> Tensor:
        """Apply expert e to its `counts[e]` consecutive rows; [R, D] in and out."""
        gate_RF, value_RF = grouped_product(rows_RD, self.gate_up_EDG, counts, backend=backend).chunk(2, dim=-1)
        hidden_RF = nn.functional.silu(gate_RF) * value_RF
        return grouped_product(hidden_RF, self.down_EFD, counts, backend=backend)


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
