"""Cross-entropy of the output head without ever holding the logits of all tokens.

Logits are made, used and forgotten, so many tokens at a time. For the mean over tokens, which training wants, the
gradients follow from each block's logits at once, but for one factor that the backward pass knows: no product is made
twice, and what waits for the backward pass is as large as the hidden states and the head, not as the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepp_ds.products import multiply, product_dtype

LOGITS_AT_ONCE = {"cpu": 2**26, "cuda": 2**27}
"""Numbers in a block of logits by device, in fp32 256 and 512 MiB: the head's gradient is added to once for each."""


def token_losses(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, [T] in fp32 at least, from the last hidden state and the output head.

    Where gradients are wanted the logits stay in the graph; training has `mean_token_loss`.
    """
    wide_VD = head_VD.to(product_dtype(hidden_TD))
    losses = [
        torch.nn.functional.cross_entropy(
            _rounded(hidden_TD[at].to(wide_VD.dtype) @ wide_VD.t(), hidden_TD.dtype), target_T[at], reduction="none"
        )
        for at in _token_blocks(hidden_TD, head_VD)
    ]
    return torch.cat(losses)


def mean_token_loss(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor) -> Tensor:
    """The mean of `token_losses`, a scalar, for training: it may be differentiated once. No target may be left out."""
    wanted = torch.is_grad_enabled() and (hidden_TD.requires_grad or head_VD.requires_grad)
    return _MeanTokenLoss.apply(hidden_TD, head_VD, target_T, wanted)


class _MeanTokenLoss(torch.autograd.Function):
    """With p = softmax(h W^T): dL/dlogits = (p - one hot of the target) / T."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, wanted: bool) -> Tensor:
        wide_VD = head_VD.to(product_dtype(hidden_TD))
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        loss_T = hidden_TD.new_empty(len(target_T), dtype=dtype)
        of_hidden_TD = hidden_TD.new_empty(hidden_TD.shape if wanted else (0,), dtype=dtype)
        of_head_VD = hidden_TD.new_zeros(head_VD.shape if wanted else (0,), dtype=dtype)
        for at in _token_blocks(hidden_TD, head_VD):
            hidden_BD, target_B1 = hidden_TD[at].to(wide_VD.dtype), target_T[at].unsqueeze(-1)
            logits_BV = _rounded(multiply(hidden_BD, wide_VD.t()), hidden_TD.dtype)
            log_BV = torch.log_softmax(logits_BV, dim=-1)
            del logits_BV
            own_B1 = log_BV.gather(-1, target_B1)
            loss_T[at] = -own_B1.squeeze(-1)
            if wanted:
                pull_BV = log_BV.exp_().scatter_add_(-1, target_B1, torch.full_like(own_B1, -1.0)).to(wide_VD.dtype)
                multiply(pull_BV, wide_VD, out=of_hidden_TD[at])
                of_head_VD += _sum_of_products(pull_BV.t(), hidden_BD)
        ctx.save_for_backward(of_hidden_TD, of_head_VD)
        ctx.dtypes = hidden_TD.dtype, head_VD.dtype
        return loss_T.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0] / len(ctx.saved_tensors[0])
        found = [
            (unscaled * factor).to(dtype) if wanted else None
            for unscaled, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
        ]
        return found[0], found[1], None, None


def _sum_of_products(left_VB: Tensor, right_BD: Tensor) -> Tensor:
    """left @ right where it may be beyond fp16: no loss scale has made these gradients smaller yet."""
    if left_VB.is_cuda and left_VB.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left_VB, right_BD, out_dtype=torch.float32)
    if left_VB.dtype == torch.float16:
        return left_VB.float() @ right_BD.float()
    return multiply(left_VB, right_BD)


def _rounded(product_BV: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits in fp32 at least, once rounded to the dtype of the hidden states as those of a whole product are."""
    logits_BV = product_BV.to(dtype)
    return logits_BV.to(torch.promote_types(dtype, torch.float32))


def _token_blocks(hidden_TD: Tensor, head_VD: Tensor) -> Iterator[slice]:
    at_once = LOGITS_AT_ONCE["cpu" if hidden_TD.device.type == "cpu" else "cuda"]
    step, length = max(1, at_once // len(head_VD)), len(hidden_TD)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
