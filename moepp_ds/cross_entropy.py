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

from moepp_ds.products import product_dtype

LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}
"""Numbers in a block of logits by device; a GPU needs more of them to be busy. In fp32 64 and 512 MiB."""


def token_losses(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, [T] in fp32 at least, from the last hidden state and the output head.

    Where gradients are wanted the logits stay in the graph; training has `mean_token_loss`.
    """
    wide_VD = head_VD.to(product_dtype(hidden_TD))
    losses = [
        torch.nn.functional.cross_entropy(_logits(hidden_TD[at], wide_VD), target_T[at], reduction="none")
        for at in _token_blocks(hidden_TD, head_VD)
    ]
    return torch.cat(losses)


def mean_token_loss(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor) -> Tensor:
    """The mean of `token_losses`, a scalar, for training: it may be differentiated once."""
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
            logits_BV, target_B1 = _logits(hidden_TD[at], wide_VD), target_T[at].unsqueeze(-1)
            lse_B1 = torch.logsumexp(logits_BV, dim=-1, keepdim=True)
            loss_T[at] = (lse_B1 - logits_BV.gather(-1, target_B1)).squeeze(-1)
            if wanted:
                pull_BV = logits_BV.sub_(lse_B1).exp_()
                pull_BV.scatter_add_(-1, target_B1, torch.full_like(lse_B1, -1.0))
                pull_BV = pull_BV.to(wide_VD.dtype)
                of_hidden_TD[at] = pull_BV @ wide_VD
                _add_product(of_head_VD, pull_BV.t(), hidden_TD[at].to(wide_VD.dtype))
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


def _add_product(onto: Tensor, left: Tensor, right: Tensor) -> None:
    """onto += left @ right, also where the product is narrower than the sum."""
    if onto.dtype == left.dtype:
        onto.addmm_(left, right)
    else:
        onto += left @ right


def _logits(hidden_BD: Tensor, wide_VD: Tensor) -> Tensor:
    """In fp32 at least, once rounded to the dtype of the hidden states as those of a whole product are."""
    logits_BV = (hidden_BD.to(wide_VD.dtype) @ wide_VD.t()).to(hidden_BD.dtype)
    return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))


def _token_blocks(hidden_TD: Tensor, head_VD: Tensor) -> Iterator[slice]:
    at_once = LOGITS_AT_ONCE["cpu" if hidden_TD.device.type == "cpu" else "cuda"]
    step, length = max(1, at_once // len(head_VD)), len(hidden_TD)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
