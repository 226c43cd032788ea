"""How strongly the balance loss pulls at each router, beside everything else.

Of layer l, the ratio of two norms at the logits that its router made: of the gradient of its own weighted balance loss,
and of the rest of the gradient of the whole loss: the language model's, the z-loss's, and what the balance losses of
later layers send back through the gating residual. Above 1 the router serves balance rather than prediction.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moepp_ds.model import ModelOutput


def watch_routers(output: ModelOutput, balance_weight: float) -> Tensor:
    """Call before the backward pass of `output.loss`; afterwards the returned [L, 2] holds the two squared norms.

    No product is done twice: the gradient of a balance loss reaches its router's logits through a softmax alone. That
    the engine scales the loss (accumulation, fp16) is seen at the loss itself and taken out.
    """
    squares_L2 = torch.zeros(len(output.layers), 2, device=output.loss.device)
    scale: list[Tensor] = []
    output.loss.register_hook(scale.append)  # the backward pass begins there
    for squares_2, layer in zip(squares_L2, output.layers):
        pull_TE = torch.zeros_like(layer.logits_TE)
        if layer.balance_loss.requires_grad:
            (pull_TE,) = torch.autograd.grad(balance_weight * layer.balance_loss, layer.logits_TE, retain_graph=True)
        layer.logits_TE.register_hook(partial(_record, squares_2, pull_TE, scale))
    return squares_L2


def _record(squares_2: Tensor, pull_TE: Tensor, scale: list[Tensor], gradient_TE: Tensor) -> None:
    rest_TE = gradient_TE / scale[-1] - pull_TE
    squares_2.copy_(torch.stack([pull_TE.square().sum(), rest_TE.square().sum()]))
