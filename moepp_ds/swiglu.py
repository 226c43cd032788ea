"""SwiGLU experts one after the other: E(x) = (silu(x W_gate) * (x W_up)) W_down on consecutive blocks of rows.

On a CPU such a layer is bound by its matrix products as long as nothing else touches memory twice. So everything of
one expert happens while its block is in the cache, products write where their result belongs (or, where another library
is faster, are copied there), and of the forward pass only the products before the activation are kept: the activation
is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepp_ds.products import multiply, product_dtype

_aten = torch.ops.aten


def swiglu_by_expert(
    rows_RD: Tensor, gate_up_EDG: Tensor, down_EFD: Tensor, counts: Sequence[int]
) -> Tensor:
    """Apply expert e to its `counts[e]` consecutive rows; [R, D] in the dtype of the rows.

    Products run in `product_dtype`; what is kept for the backward pass has the dtype of the rows. Every expert takes
    part in the graph, also with no rows: the gradient of its weights is then 0.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (rows_RD, gate_up_EDG, down_EFD))
    return _SwiGLUByExpert.apply(rows_RD, gate_up_EDG, down_EFD, tuple(counts), wanted)


class _SwiGLUByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, gate_up_EDG: Tensor, down_EFD: Tensor, counts: tuple[int, ...], wanted: bool
    ) -> Tensor:
        dtype = product_dtype(rows_RD)
        most, width = max(counts), down_EFD.shape[1]
        out_RD = torch.empty_like(rows_RD)
        kept_RG = rows_RD.new_empty(len(rows_RD) if wanted else 0, 2 * width)
        product_CG, hidden_CF = (rows_RD.new_empty(most, columns, dtype=dtype) for columns in (2 * width, width))
        for e, at in _blocks(counts):
            count = at.stop - at.start
            in_place = wanted and dtype == rows_RD.dtype
            product_BG = kept_RG[at] if in_place else product_CG[:count]
            multiply(rows_RD[at].to(dtype), gate_up_EDG[e].to(dtype), out=product_BG)
            if wanted and not in_place:
                kept_RG[at] = product_BG
            gate_BF, value_BF = product_BG.split(width, dim=1)
            hidden_BF = hidden_CF[:count]
            _aten.silu.out(gate_BF, out=hidden_BF)
            multiply(hidden_BF.mul_(value_BF), down_EFD[e].to(dtype), out=out_RD[at])
        ctx.counts = counts
        ctx.save_for_backward(rows_RD, gate_up_EDG, down_EFD, kept_RG)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_RD,) = gradients
        rows_RD, gate_up_EDG, down_EFD, kept_RG = ctx.saved_tensors
        dtype = product_dtype(rows_RD)
        most, width = max(ctx.counts), down_EFD.shape[1]
        of_rows, of_gate_up, of_down = (
            torch.empty_like(tensor) if wanted else None
            for tensor, wanted in zip((rows_RD, gate_up_EDG, down_EFD), ctx.needs_input_grad)
        )
        before_CG = rows_RD.new_empty(most, 2 * width, dtype=dtype)
        silu_CF, hidden_CF, back_CF = (rows_RD.new_empty(most, width, dtype=dtype) for _ in range(3))
        for e, at in _blocks(ctx.counts):
            count = at.stop - at.start
            before_BG, silu_BF, hidden_BF, back_BF = (
                buffer[:count] for buffer in (before_CG, silu_CF, hidden_CF, back_CF)
            )
            grad_BD = grad_RD[at].to(dtype)
            gate_BF, value_BF = kept_RG[at].to(dtype).split(width, dim=1)
            multiply(grad_BD, down_EFD[e].to(dtype).t(), out=back_BF)
            _aten.silu.out(gate_BF, out=silu_BF)
            torch.mul(silu_BF, value_BF, out=hidden_BF)
            torch.mul(silu_BF, back_BF, out=before_BG[:, width:])
            _aten.silu_backward.grad_input(back_BF.mul_(value_BF), gate_BF, grad_input=before_BG[:, :width])
            if of_rows is not None:
                multiply(before_BG, gate_up_EDG[e].to(dtype).t(), out=of_rows[at])
            if of_gate_up is not None:
                multiply(rows_RD[at].to(dtype).t(), before_BG, out=of_gate_up[e])
            if of_down is not None:
                multiply(hidden_BF.t(), grad_BD, out=of_down[e])
        return of_rows, of_gate_up, of_down, None, None


def _blocks(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows."""
    start = 0
    for e, count in enumerate(counts):
        yield e, slice(start, start + count)
        start += count
