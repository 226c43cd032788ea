"""Rows of tokens for the FFN experts, and their results back to the tokens.

A row is an assignment that an FFN expert works on; rows are sorted by expert. Both directions read: where a token's
rows are is listed once, token by token, and a sum over them is one pass over the rows (an embedding bag), which neither
waits for writes that collide nor depends on their order. Each direction's gradient is the other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepp_ds.blocks import row_blocks
from moepp_ds.dispatch import count_by


@dataclass(frozen=True)
class TokenRows:
    """Which row is of which token.

    token_R: int64, the token of every row. row_R: int64, the rows listed token by token, in the order of their experts.
    first_T: int64, where in row_R a token's rows begin.
    """

    token_R: Tensor
    row_R: Tensor
    first_T: Tensor

    def take(self, x_TD: Tensor) -> Tensor:
        """The rows [R, D] of x_TD."""
        return _Take.apply(x_TD, self)

    def combine(self, result_RD: Tensor, gate_R: Tensor, onto_TD: Tensor) -> Tensor:
        """Add to each token of onto_TD its rows times their gates, in place; a sum is rounded once.

        Sums are made in the dtype of the gates, fp32 at least.
        """
        return _Combine.apply(result_RD, gate_R, onto_TD, self)


@torch.no_grad()
def list_rows(token_R: Tensor, num_tokens: int) -> TokenRows:
    """Find every token's rows; nothing is read by the host."""
    count_T = count_by(token_R, num_tokens)
    return TokenRows(token_R, torch.argsort(token_R, stable=True), torch.cumsum(count_T, dim=0) - count_T)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: TokenRows) -> Tensor:
        ctx.rows = rows
        return x_TD.index_select(0, rows.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grad_RD,) = gradients
        of_x_TD = grad_RD.new_empty(len(ctx.rows.first_T), grad_RD.shape[1])
        for at, sum_BD in _sums_by_token(grad_RD, None, ctx.rows):
            of_x_TD[at] = sum_BD
        return of_x_TD, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result_RD: Tensor, gate_R: Tensor, onto_TD: Tensor, rows: TokenRows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(result_RD, gate_R)
        ctx.mark_dirty(onto_TD)
        for at, sum_BD in _sums_by_token(result_RD, gate_R, rows):
            onto_TD[at] += sum_BD
        return onto_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad_TD,) = gradients
        result_RD, gate_R = ctx.saved_tensors
        of_result_RD, of_gate_R = torch.empty_like(result_RD), torch.empty_like(gate_R)
        for at in row_blocks(result_RD.shape, result_RD.device):
            grad_BD = grad_TD.index_select(0, ctx.rows.token_R[at]).to(gate_R.dtype)
            of_gate_R[at] = torch.linalg.vecdot(grad_BD, result_RD[at].to(gate_R.dtype))
            of_result_RD[at] = grad_BD.mul_(gate_R[at].unsqueeze(-1))
        return of_result_RD, of_gate_R, grad_TD, None


def _sums_by_token(rows_RD: Tensor, gate_R: Tensor | None, rows: TokenRows) -> Iterator[tuple[slice, Tensor]]:
    """For a block of tokens after the other the sum of each token's rows, times their gates if any."""
    dtype = torch.promote_types(rows_RD.dtype, torch.float32) if gate_R is None else gate_R.dtype
    blocks = list(row_blocks((len(rows.first_T), rows_RD.shape[1]), rows_RD.device))
    # On a GPU there is one block, and the host reads nothing.
    starts = [0] if len(blocks) < 2 else rows.first_T[:: blocks[0].stop].tolist()
    for at, start, stop in zip(blocks, starts, [*starts[1:], len(rows.row_R)]):
        row_B = rows.row_R[start:stop]
        if rows_RD.dtype == dtype:
            number_B, row_BD = row_B, rows_RD
        else:
            number_B, row_BD = torch.arange(len(row_B), device=row_B.device), rows_RD.index_select(0, row_B).to(dtype)
        yield at, torch.nn.functional.embedding_bag(
            number_B,
            row_BD,
            rows.first_T[at] - start,
            mode="sum",
            per_sample_weights=None if gate_R is None else gate_R[row_B],
        )
