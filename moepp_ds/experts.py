"""The FFN experts as a grouped product: E(x) = (silu(x W_gate) * (x W_up)) W_down   (SwiGLU, no biases)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moepp_ds.swiglu import swiglu_by_expert

Backend = Literal["auto", "slices", "grouped_mm"]


def _check_counts(rows_RX: Tensor, num_experts: int, counts: Sequence[int]) -> None:
    if len(counts) != num_experts or sum(counts) != len(rows_RX):
        raise ValueError(
            f"{len(rows_RX)} rows for {num_experts} experts, but {len(counts)} counts that sum to {sum(counts)}; "
            "the dispatch plan is not theirs"
        )


def _has_grouped_kernel(rows_RX: Tensor, widths: Sequence[int], counts: Sequence[int]) -> bool:
    """Whether PyTorch multiplies all groups in one kernel: bf16, rows of a multiple of 16 bytes, Hopper or Blackwell.

    On Blackwell the weight gradient of a group without rows is not 0 (pytorch issue 172439).
    """
    if not rows_RX.is_cuda or rows_RX.dtype != torch.bfloat16 or any(2 * width % 16 for width in widths):
        return False
    generation, _ = torch.cuda.get_device_capability(rows_RX.device)
    return generation == 9 or (generation == 10 and 0 not in counts)


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

        backend: `grouped_mm` is one kernel for all experts where PyTorch has it, for bf16 on Hopper and later;
        elsewhere it is a loop that waits for the GPU. `slices` takes one expert after the other, in every dtype and
        width. `auto` picks.
        """
        _check_counts(rows_RD, len(self.gate_up_EDG), counts)
        if backend == "auto":
            widths = (rows_RD.shape[-1], self.down_EFD.shape[1])
            backend = "grouped_mm" if _has_grouped_kernel(rows_RD, widths, counts) else "slices"
        if backend == "slices":
            return swiglu_by_expert(rows_RD, self.gate_up_EDG, self.down_EFD, counts)
        # made on the host and copied without waiting for the GPU
        ends_E = torch.tensor(list(accumulate(counts)), dtype=torch.int32).to(rows_RD.device, non_blocking=True)
        product_RG = nn.functional.grouped_mm(rows_RD, self.gate_up_EDG, offs=ends_E)
        if not torch.is_grad_enabled():
            return _activate_and_project(product_RG, self.down_EFD, ends_E)
        inputs = (product_RG, self.down_EFD, ends_E)
        return checkpoint(_activate_and_project, *inputs, use_reentrant=False, preserve_rng_state=False)


def _activate_and_project(product_RG: Tensor, down_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """The second half of SwiGLU. In training only its inputs are kept: of 4 F numbers a row, 2 F."""
    gate_RF, value_RF = product_RG.chunk(2, dim=-1)
    return nn.functional.grouped_mm(nn.functional.silu(gate_RF) * value_RF, down_EFD, offs=ends_E)
