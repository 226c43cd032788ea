"""The FFN experts as a grouped product: E(x) = (silu(x W_gate) * (x W_up)) W_down   (SwiGLU, no biases)."""

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
