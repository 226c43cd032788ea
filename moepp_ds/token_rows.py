"""Rows of tokens for the FFN experts, and their results back to the tokens.

A row is an assignment that an FFN expert works on; rows are sorted by expert. Both directions read: where a token's
rows are is listed once, token by token, and a sum over them is one pass over the rows (an embedding bag), which neither
waits for writes that collide nor depends on their order. Each direction's gradient is the other one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    def combine(self, result_RD: Tensor, gate_R: Tensor) -> Tensor:
        """Each token's rows, times their gates, added up: [T, D] in the dtype of the gates, fp32 at least."""
        return _Combine.apply(result_RD, gate_R, self)


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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grad_RD,) = gradients
        return _sum_by_token(grad_RD, None, ctx.rows), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result_RD: Tensor, gate_R: Tensor, rows: TokenRows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(result_RD, gate_R)
        return _sum_by_token(result_RD.to(gate_R.dtype), gate_R, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_TD,) = gradients
        result_RD, gate_R = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, ctx.rows.token_R)
        of_gate_R = torch.linalg.vecdot(grad_RD, result_RD.to(grad_RD.dtype))
        return grad_RD.mul_(gate_R.unsqueeze(-1)).to(result_RD.dtype), of_gate_R, None


def _sum_by_token(rows_RD: Tensor, gate_R: Tensor | None, rows: TokenRows) -> Tensor:
    weights = None if gate_R is None else gate_R[rows.row_R]
    return torch.nn.functional.embedding_bag(
        rows.row_R, rows_RD, rows.first_T, mode="sum", per_sample_weights=weights
    )
